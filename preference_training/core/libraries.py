"""Other libraries' output."""

import os


def quiet_libraries() -> None:
    """Keep the progress bars and hints of other libraries out of a run's output."""
    import logging
    import warnings

    import transformers

    # transformers imports torchao where it is installed, which then logs what this machine cannot use of it.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Of writing a checkpoint in one process.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    # There is a second adapter on purpose.
    warnings.filterwarnings("ignore", message="Already found a `peft_config`")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # Hints about kernels for other machines and each layer's casts.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # The tokenizers' threads have ended before any worker process starts.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
