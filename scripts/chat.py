"""Talk to a model: a run's, or any other; alone, or side by side with what it was before training.

python scripts/chat.py RUN                                            # the newest checkpoint, in the format of its training
python scripts/chat.py RUN --against reference                        # beside the model that its training started from
python scripts/chat.py RUN --prompts questions.txt --to answers.jsonl # answers to all prompts of a file
python scripts/chat.py openai:MODEL --url http://localhost:8000/v1    # a model behind a server; also ollama:MODEL
"""

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path

import preference_datasets  # noqa: F401  its data sets register themselves
from preference_training.core.errors import UserError
from preference_training.generation.settings import LoadOptions

SETTINGS = ("temperature", "top_p", "top_k", "max_new_tokens", "seed")


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model",
        nargs="+",
        help="a run (of several the newest), checkpoint, export, model directory, .gguf file, hub id, or server",
    )
    parser.add_argument("--against", metavar="MODEL", help="a second model: reference, or any that can be talked to")
    parser.add_argument("--system", metavar="TEXT", help="the system prompt (default: that of the run)")
    parser.add_argument(
        "--prompts", metavar="FILE", help="answer the prompts of a file: lines of a .txt, or rows as for training"
    )
    parser.add_argument(
        "--to", type=Path, metavar="FILE", help="with --prompts: file for the answers (default: standard output)"
    )
    parser.add_argument("--url", help="the address of the server of openai: or ollama:")
    group = parser.add_argument_group("how tokens are chosen (default: as generation_config.json says; else greedy)")
    for name in SETTINGS:
        group.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), metavar="NUMBER")
    LoadOptions.add_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Talk. A user's mistake is reported as one message, with exit status 2."""
    options = arguments()
    try:
        talk(options)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def talk(options: argparse.Namespace) -> None:
    """Open the models, and have them answer a file or a person."""
    from preference_training.core.machine import quiet_libraries
    from preference_training.generation.answers import read_prompts, write_answers
    from preference_training.generation.chat import newest_of, open_responders
    from preference_training.generation.chat_format import with_system
    from preference_training.generation.settings import GenerationSettings
    from preference_training.generation.terminal import Chat, greeting

    given = {name: value for name in SETTINGS if (value := getattr(options, name)) is not None}
    known = GenerationSettings().changed(given)
    changes = {name: getattr(known, name) for name in given}
    prompts = read_prompts(options.prompts) if options.prompts else None
    if options.to and prompts is None:
        raise UserError("--to: where the answers to --prompts go. Add --prompts FILE.")
    quiet_libraries()
    loading = LoadOptions.of(options)
    name = newest_of(options.model)
    print(f"loading {name} ...", file=sys.stderr, flush=True)
    # Where answers go, nothing else does.
    with redirect_stdout(sys.stderr):
        responders = open_responders(name, options.against, options.url, loading)
    system = options.system if options.system is not None else getattr(responders[-1], "system_prompt", None)
    if prompts is None:
        print(greeting(responders, changes, system), flush=True)
        Chat(responders, changes, system).run()
    else:
        write_answers(responders, [with_system(prompt, system) for prompt in prompts], changes, options.to, sys.stderr)


if __name__ == "__main__":
    main()
