"""A run's model, or a checkpoint's, as a directory from which it can be served, with a model card.

python scripts/export.py RUN_OR_CHECKPOINT --to DIRECTORY [--dtype bfloat16] [--merge] [--push ORGANISATION/NAME [--private]]
    [--ollama NAME [--template hh]] [--quantize int8]
"""

import argparse
import sys
from pathlib import Path

import preference_datasets  # noqa: F401  its data sets register themselves
from preference_training.configuration.validation import DTYPES, TEMPLATES
from preference_training.core.errors import UserError


def arguments() -> argparse.Namespace:
    """The command line, understood."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a run directory, whose LATEST is meant, or a checkpoint (step-N)")
    parser.add_argument("--to", type=Path, required=True, help="the directory that is made; it may not exist, or be empty")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; else as they are")
    parser.add_argument("--merge", action="store_true", help="make an adapter and its base model one whole model")
    parser.add_argument("--quantize", metavar="FORMAT", help="weights of linear layers in fewer bits: int8 (torchao)")
    parser.add_argument("--ollama", metavar="NAME", help="write a Modelfile for `ollama create NAME` beside the weights")
    parser.add_argument("--template", choices=TEMPLATES, help="how prompts were written, where the run does not say it")
    parser.add_argument("--push", metavar="ORGANISATION/NAME", help="upload the directory to the hub")
    parser.add_argument("--private", action="store_true", help="with --push: only you, or your organisation, may see it")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    return parser.parse_args()


def main() -> None:
    """Export a model. A mistake of the user's becomes one message and exit status 2."""
    options = vars(arguments())
    from preference_training.core.libraries import quiet_libraries
    from preference_training.export.exporting import Wishes, export

    quiet_libraries()
    try:
        said = export(options.pop("source"), Wishes(**options))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(*said, sep="\n")


if __name__ == "__main__":
    main()
