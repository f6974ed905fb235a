"""Other libraries' own output."""

import os


def quiet_libraries() -> None:
    """Keep the bars and hints of other libraries out of a run's own output."""
    import logging
    import warnings

    import transformers

    # transformers imports torchao where it is installed, which then says what of it this machine cannot use.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # What is said by whoever writes a checkpoint in one process.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    # A second adapter lies beside the first on purpose.
    warnings.filterwarnings("ignore", message="Already found a `peft_config`")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # Its hints are about kernels for other machines and what each layer casts.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # The tokenizers' own threads are done before any worker process starts.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
