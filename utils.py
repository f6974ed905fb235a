"""The few helpers that code of yours may import."""

from preference_training.core.errors import UserError
from preference_training.core.files import load_tensors
from preference_training.core.random_streams import seed_everything

__all__ = ["UserError", "load_tensors", "seed_everything"]
