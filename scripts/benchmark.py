"""Benchmarks that people quote: pair accuracy as RewardBench, and win rates as AlpacaEval and Arena-Hard.

python scripts/benchmark.py pairs FILE --model RUN [--reward-model MODEL] [--by COLUMN]
python scripts/benchmark.py win-rate --baseline FILE --outputs FILE --judge openai:MODEL [--graded]
python scripts/benchmark.py win-rate --baseline FILE --model RUN --judge FILE.py:NAME

FILE has rows with chosen and rejected responses (pairs), or with an instruction and an output each (win-rate).
"""

import argparse
import sys

import preference_datasets  # noqa: F401  its data sets register themselves
import train  # noqa: F401  what the configuration refers to registers itself
from preference_training.core.errors import UserError
from preference_training.generation.settings import LoadOptions


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    pairs = commands.add_parser("pairs", help="how often the preferred response of a pair scores higher")
    pairs.add_argument("file", metavar="FILE", help="pairs, in any format that training reads")
    pairs.add_argument("--reference", metavar="MODEL", help="what --model was before training (default: known of runs)")
    pairs.add_argument(
        "--reward-model", action="append", metavar="MODEL", help="a run of loss=reward, or a sequence classifier"
    )
    pairs.add_argument("--by", metavar="COLUMN", help="the column of categories (default: subset, category, source or dataset)")
    rates = commands.add_parser("win-rate", help="how often a judge prefers outputs to a baseline's")
    rates.add_argument("--baseline", required=True, metavar="FILE", help="instructions, each with the baseline's output")
    rates.add_argument("--outputs", nargs="+", metavar="[NAME=]FILE", help="outputs of one or several models")
    rates.add_argument("--judge", required=True, help="as evaluation.judge, or rules:RULE, such as 'rules:words<=50'")
    rates.add_argument("--judge-url", help="server of openai: or ollama:, such as http://localhost:8000/v1")
    rates.add_argument("--graded", action="store_true", help="ask a language model for five verdicts, as Arena-Hard does")
    rates.add_argument("--url", help="the address of the server of --model openai: or ollama:")
    for name in ("temperature", "top_p", "top_k", "max_new_tokens", "seed"):
        rates.add_argument(f"--{name.replace('_', '-')}", metavar="NUMBER", help="of the outputs of --model")
    rates.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of evaluation, as on train.py's command line")
    for each in (pairs, rates):
        each.add_argument("--model", help="a run, checkpoint, export, model directory or hub id; for win-rate also a server")
        each.add_argument("--to", metavar="FILE", help="the results as JSON (default: in the run directory, else here)")
        each.add_argument("--cache-dir", help="the cache directory for models of the hub")
        LoadOptions.add_arguments(each)
    return parser.parse_args()


def main() -> None:
    """Run a benchmark. A user's mistake is reported as one message, with exit status 2."""
    options = arguments()
    from preference_training.core.machine import quiet_libraries
    from preference_training.evaluation.benchmarks.arguments import check_arguments

    try:
        check_arguments(options)
        judged_by = judging(options) if options.command == "win-rate" else ()
        quiet_libraries()
        # Heavy, and so imported after what takes no time is checked.
        from preference_training.evaluation.benchmarks.command import benchmark_win_rate, pair_accuracy

        lines = benchmark_win_rate(options, *judged_by) if judged_by else pair_accuracy(options)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(*lines, sep="\n")


def judging(options: argparse.Namespace) -> tuple:
    """The project's configuration with the judge, and the judge itself if it is of rules, which only loops have otherwise."""
    from dataclasses import replace

    from preference_training.configuration.validation import configured
    from preference_training.evaluation.judges import ScoreJudge
    from preference_training.rounds.judges.base import JudgedInput
    from preference_training.rounds.judges.rules import RulesJudge, read_rule

    kind, _, rule = options.judge.partition(":")
    given = {"judge": None if kind == "rules" else options.judge, "judge_url": options.judge_url}
    overrides = [f"evaluation.{name}={value}" for name, value in given.items() if value is not None]
    config = configured(*overrides, *options.overrides, "eval_only=true")
    config = replace(config, evaluation=replace(config.evaluation, judge=options.judge, against=options.baseline))
    if kind != "rules":
        return (config,)
    rules = RulesJudge(options.judge, [read_rule(rule, "--judge")])
    return config, ScoreJudge(
        rules.identity, lambda prompt, response: rules.judge([JudgedInput(prompt, response, {})])[0].value
    )


if __name__ == "__main__":
    main()
