"""Python's, numpy's and torch's global random streams: seeded, saved and restored."""

import random


def seed_everything(seed: int) -> None:
    """Seed Python's, torch's and (where it is loaded) numpy's global random streams."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_streams() -> dict:
    """The state of the global random streams, in plain values and uint8 tensors, for `restore_random_streams`."""
    import numpy
    import torch

    _, key, position, has_gauss, gauss = numpy.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [key.tolist(), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_streams(streams: dict) -> None:
    """Restore the global random streams to a state of `random_streams`."""
    import numpy
    import torch

    version, words, gauss = streams["python"]
    random.setstate((version, tuple(words), gauss))
    numpy.random.set_state(("MT19937", *streams["numpy"]))
    torch.set_rng_state(streams["torch"])
    if streams["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(streams["cuda"])
