"""What programs that are forked find imported. Nothing here starts a thread or draws a number."""

import gc

from preference_training.core.machine import quiet_libraries

# First: it also hides what libraries say of this machine while they are imported.
quiet_libraries()

import pandas  # noqa: E402, F401
import pyarrow.dataset  # noqa: E402, F401
import transformers.generation.utils  # noqa: E402
import transformers.models.llama.modeling_llama  # noqa: E402, F401
import wandb.sdk.launch.inputs.internal  # noqa: E402, F401

import train  # noqa: E402, F401
from preference_training.checkpointing import resume  # noqa: E402, F401
from preference_training.distributed import launching  # noqa: E402, F401
from preference_training.dry_run import preview  # noqa: E402, F401
from preference_training.evaluation import runs as evaluation_runs  # noqa: E402, F401
from preference_training.modeling import reference_cache  # noqa: E402, F401
from preference_training.training import runs  # noqa: E402, F401

# A fork need not go through what is here to find what it could free.
gc.freeze()
