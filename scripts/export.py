"""Export the model of a run or a checkpoint as a directory to serve from, with a model card.

python scripts/export.py RUN_OR_CHECKPOINT --to DIRECTORY [--dtype bfloat16] [--merge] [--push ORGANIZATION/NAME [--private]]
    [--gguf [q8_0]] [--ollama NAME [--template hh]] [--quantize int4]
"""

import argparse
import sys
from pathlib import Path

import preference_datasets  # noqa: F401  its data sets register themselves
from preference_training.configuration.schema import TEMPLATES
from preference_training.configuration.sections import DTYPES
from preference_training.core.errors import UserError


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a run directory (its LATEST checkpoint), or a checkpoint (step-N)")
    parser.add_argument("--to", type=Path, required=True, help="the directory to create; it must not exist, or be empty")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: unchanged)")
    parser.add_argument("--merge", action="store_true", help="merge the adapter into its base model")
    parser.add_argument("--quantize", metavar="FORMAT", help="quantize the weights of linear layers: int8, int4")
    parser.add_argument(
        "--gguf",
        nargs="?",
        const="auto",
        metavar="TYPE",
        help="also write a GGUF file, for llama.cpp, Ollama, LM Studio: f16, bf16, f32, q8_0, q5_1, q5_0, q4_1, q4_0 "
        "(default: bf16 for weights in bfloat16, f16 for others)",
    )
    parser.add_argument("--ollama", metavar="NAME", help="also write a Modelfile for `ollama create NAME`")
    parser.add_argument("--template", choices=TEMPLATES, help="format of the prompts, if the run does not record it")
    parser.add_argument("--push", metavar="ORGANIZATION/NAME", help="upload the directory to the hub")
    parser.add_argument("--private", action="store_true", help="with --push: create a private repository")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    return parser.parse_args()


def main() -> None:
    """Export a model. A user's mistake is reported as one message, with exit status 2."""
    options = vars(arguments())
    from preference_training.core.machine import quiet_libraries, said_while_slow
    from preference_training.export.checkpoint import export
    from preference_training.export.options import ExportOptions

    quiet_libraries()
    try:
        with said_while_slow("still exporting: loading, writing, and comparing with the run's model", file=sys.stderr):
            lines = export(options.pop("source"), ExportOptions(**options))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
