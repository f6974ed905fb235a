"""Checkpoints of this framework as a source of answers, so that a model trained on judgments can be judged next.

Prompts are formatted as in training, with the template in the run's config.yaml. torch and transformers are imported only when
a checkpoint is used: the app runs without them.
"""

import json
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from omegaconf import OmegaConf

from preference_training.core.errors import UserError, first_line
from preference_training.data.records.record import Prompt
from preference_training.data.rows.templates import build_template, turns_of
from preference_training.generation.servers import Reply

# Only one model computes at a time, since the global random stream is shared.
COMPUTING = threading.Lock()
LOADING = threading.Lock()
# PEFT's configuration in an adapter checkpoint; transformers loads the adapter onto the base model that it names.
ADAPTER = "adapter_config.json"
WEIGHTS = "config.json"


@dataclass(frozen=True)
class CheckpointSource:
    """The checkpoints of runs in some folders: */LATEST, and */*/LATEST for groups of runs."""

    folders: tuple[Path, ...]

    def models(self) -> list[str]:
        """The paths of the checkpoints, newest first."""
        forms = ("*/LATEST", "*/*/LATEST")
        found = {path.absolute() for folder in self.folders for form in forms for path in folder.glob(form)}
        whole = [path for path in found if is_whole(path)]
        return [str(path) for path in sorted(whole, key=lambda path: path.stat().st_mtime, reverse=True)]

    def stream(self, request, stop) -> Iterator[Reply]:
        """Stream the reply in parts. The last says why it ended: stop, or length."""
        # Two replies are requested at once: only one may load the model and import the libraries, which is not thread-safe.
        with LOADING:
            loaded = load_checkpoint(_now_at(request.model))
            from transformers import TextIteratorStreamer
        streamer = TextIteratorStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
        ends: list[str | Exception] = []
        thread = threading.Thread(target=_generate, args=(loaded, request, stop, streamer, ends), daemon=True)
        thread.start()
        yield from (Reply(piece) for piece in streamer)
        thread.join()
        if isinstance(ends[0], Exception):
            raise UserError(f"{request.model}: {first_line(ends[0])}.") from ends[0]
        yield Reply("", ends[0])


def checkpoint_at(path: Path) -> Path:
    """The checkpoint of a path: itself, or LATEST of a run. Raises UserError if neither is one."""
    for found in (path, path / "LATEST"):
        if is_whole(found):
            # LATEST stays a link: a run in progress moves it.
            return found.absolute()
    adapter = next((found for found in (path, path / "LATEST") if (found / ADAPTER).is_file()), None)
    if adapter:
        raise UserError(
            f"{path}: an adapter that does not name its base model. Expected a checkpoint that can be loaded alone."
        )
    raise UserError(f"{path}: no checkpoint. Expected a directory with {WEIGHTS} or {ADAPTER}, or a run with LATEST.")


def is_whole(checkpoint: Path) -> bool:
    """Whether a directory has a model, or an adapter that names its base model."""
    return (checkpoint / WEIGHTS).is_file() or is_adapter_of_another(checkpoint)


def is_adapter_of_another(checkpoint: Path) -> bool:
    """Whether a checkpoint is an adapter that names its base model; with a base built from scratch it does not."""
    try:
        return isinstance(json.loads((checkpoint / ADAPTER).read_text())["base_model_name_or_path"], str)
    except (OSError, ValueError, LookupError, TypeError):
        return False


@dataclass(frozen=True)
class Loaded:
    """A loaded checkpoint. template is the one used in training."""

    model: object
    tokenizer: object
    template: object

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt, as in training."""
        text, _ = self.template(turns_of(prompt), [])
        ids = self.tokenizer(text).input_ids
        return ids[:-1] if ids[-1] == self.tokenizer.eos_token_id else ids

    def response_ids(self, prompt: Prompt, response: str) -> list[int]:
        """The token ids of a response, as in training, with the end-of-sequence token."""
        _, [text] = self.template(turns_of(prompt), [response])
        return [*self.tokenizer(text, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]


@lru_cache(maxsize=1)
def load_checkpoint(path: str) -> Loaded:
    """Load a checkpoint; the last one stays in memory. Raises UserError if it cannot be loaded."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise UserError(f"checkpoints: {first_line(error)}. Install: pip install -r requirements.txt") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        if (Path(path) / ADAPTER).is_file() and find_spec("peft") is None:
            raise ImportError("peft")
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoints: {path} cannot be loaded: {first_line(error)}.") from error
    except ImportError as error:
        raise UserError(f"checkpoints: {path} is an adapter. Install: pip install -r requirements/lora.txt") from error
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    run = Path(path).parent / "config.yaml"
    config = OmegaConf.load(run) if run.is_file() else {}
    template = build_template(config.get("template"), config.get("system_prompt"), tokenizer)
    return Loaded(model.to(device), tokenizer, template)


def _now_at(path: str) -> str:
    """The checkpoint that LATEST currently points to; a run in progress moves it."""
    return str(Path(path).resolve()) if Path(path).exists() else path


@contextmanager
def _drawing(seed: int):
    """Sample with a separate seed, and restore the global random state afterwards."""
    import torch

    with COMPUTING, torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        yield


def _generate(loaded: Loaded, request, stop, streamer, ends: list) -> None:
    """Generate, and add why it ended to `ends`: stop, length, or an error."""
    import torch
    from transformers import StoppingCriteriaList

    try:
        with _drawing(request.seed):
            ids = torch.tensor([loaded.prompt_ids(request.prompt)], device=loaded.model.device)
            made = loaded.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), streamer=streamer, max_new_tokens=request.max_tokens,
                do_sample=request.temperature > 0, temperature=request.temperature or None, top_k=0,
                pad_token_id=loaded.tokenizer.pad_token_id, eos_token_id=loaded.tokenizer.eos_token_id,
                stopping_criteria=StoppingCriteriaList([lambda ids, _: torch.full((len(ids),), stop.asked, device=ids.device)]),
            )  # fmt: skip
        ends.append("stop" if made[0, -1] == loaded.tokenizer.eos_token_id else "length")
    except Exception as error:  # pass any error on to the waiting thread
        ends.append(error)
        streamer.end()


def margins(path: str, comparisons: Iterable) -> Iterator[tuple[str, float]]:
    """How much a checkpoint prefers the first answer of each comparison, in nats: (its id, log p(first) - log p(second)).

    Of more than two answers, how much it prefers its favorite to the next.
    """
    import torch

    loaded = load_checkpoint(_now_at(path))

    def logp(answer) -> float:
        prompt, response = loaded.prompt_ids(answer.prompt), loaded.response_ids(answer.prompt, answer.text)
        ids = torch.tensor([prompt + response], device=loaded.model.device)
        # Position i predicts token i + 1.
        logits = loaded.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).sum().item()

    for comparison in comparisons:
        with COMPUTING, torch.no_grad():
            first, second, *rest = map(logp, comparison.answers)
        if rest:
            first, second, *_ = sorted([first, second, *rest], reverse=True)
        yield comparison.id, first - second
