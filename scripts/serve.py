"""Serve a model on this machine in OpenAI's protocol: for small models, and for trying one out in other programs.

python scripts/serve.py RUN                            # http://127.0.0.1:8000/v1
python scripts/serve.py RUN --against reference        # and, as another model, what it was before training

For many requests at a time, export the model and serve it with vLLM: scripts/export.py.
"""

import argparse
import sys

import preference_datasets  # noqa: F401  its data sets register themselves
from preference_training.core.errors import UserError
from preference_training.generation.settings import LoadOptions


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = "a run (of several the newest), checkpoint, export, model directory, .gguf file or hub id"
    parser.add_argument("model", nargs="+", help=models)
    parser.add_argument("--against", metavar="MODEL", help="serve a second model: reference, or any of these")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--name", help="the model's name for clients (default: that of its directory)")
    LoadOptions.add_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Serve until Ctrl-C. A user's mistake is reported as one message, with exit status 2."""
    options = arguments()
    from preference_training.core.machine import quiet_libraries
    from preference_training.generation.chat import newest_of, open_responders
    from preference_training.generation.serving import ModelServer, example, served_names

    quiet_libraries()
    loading = LoadOptions.of(options)
    try:
        responders = open_responders(newest_of(options.model), options.against, None, loading)
        with ModelServer(served_names(responders, options.name), options.host, options.port) as server:
            print(example(server), flush=True)
            server.serve_forever()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main()
