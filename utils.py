"""Small things that several modules need, and nothing else. Imports no heavy library at the top."""

import os
import random
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class UserError(Exception):
    """A mistake of the user's. `train.py` prints the message without a traceback and exits with status 2."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause that names what `name` may have meant: "did you mean loss.beta?", or the known names if none is near."""
    by_lower = {key.lower(): key for key in sorted(known)}
    close = get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f"did you mean {by_lower[close[0]]}?" if close else f"known are: {', '.join(by_lower.values())}."


def first_existing(folders: Iterable[str]) -> Path:
    """The first of `folders` that exists, else the last one; absolute, not created."""
    paths = [Path(folder).expanduser().absolute() for folder in folders]
    return next((path for path in paths if path.is_dir()), paths[-1])


def seed_everything(seed: int) -> None:
    """Seed Python's, torch's and (where it is loaded) numpy's global random streams."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def quiet_libraries() -> None:
    """Keep the bars and hints of other libraries out of a run's own output."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # The tokenizers' own threads are done before any worker process starts.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def pick_device():
    """The `torch.device` that computes: cuda, else mps, else cpu."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def replace_symlink(link: Path, target: str) -> None:
    """Point `link` at `target` in one step: a reader sees the old target or the new one, never neither."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)
