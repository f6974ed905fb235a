"""What a command line of scripts/merge.py asks for. It is checked before the libraries of models are imported."""

from argparse import Namespace
from functools import partial

from preference_training.core.errors import UserError
from preference_training.core.files import check_destination
from preference_training.core.machine import quiet_libraries
from preference_training.merging.places import check_place
from preference_training.merging.recipe import NUMBERS, Recipe, read_recipe

# Options of one of the two kinds of merges.
OF_SOUPS = {"top": "--top", "greedy": "--greedy", "metric": "--metric"}
OF_RECIPES = ("method", "base", "weights", "held_out", *NUMBERS)


def merge_as_asked(options: Namespace) -> list[str]:
    """Merge; returns the lines to print. Raises UserError."""
    models = [text for text in options.models if "=" not in text]
    overrides = [text for text in options.models if "=" in text]
    if options.soup is not None:
        given = [f"--{name.replace('_', '-')}" for name in OF_RECIPES if getattr(options, name) is not None]
        if models or given:
            raise UserError(
                f"--soup: found {(models + given)[0]} beside it. A soup is the plain mean of a sweep's best runs, measured on "
                "what they hold out: drop it, or name the models without --soup."
            )
        check_destination(options.to)
        quiet_libraries()
        from preference_training.merging.soup import Soup, make_soup

        top = 3 if options.top is None else options.top
        trust = options.trust_remote_code
        return make_soup(Soup(options.soup, top, options.greedy, options.metric, overrides, trust), options.to)
    for name, flag in OF_SOUPS.items():
        if getattr(options, name):
            raise UserError(f"{flag}: chooses among the runs of a sweep. Add --soup SWEEP_DIR, or drop it.")
    if not models:
        raise UserError("merge: no model to merge. Name two or more: runs, checkpoints, adapters, directories, hub ids.")
    if overrides and options.held_out is None:
        raise UserError(f"{overrides[0]}: overrides the configuration of the run of --held-out, and none is given. Drop it.")
    numbers = {name: getattr(options, name) for name in ("weights", *NUMBERS)}
    recipe = read_recipe(options.method or "linear", len(models), options.base is not None, **numbers)
    check_destination(options.to)
    for name in (*models, *([options.base] if options.base else []), *([str(options.held_out)] if options.held_out else [])):
        check_place(name)
    return _merged(options, recipe, models, overrides)


def _merged(options: Namespace, recipe: Recipe, models: list[str], overrides: list[str]) -> list[str]:
    quiet_libraries()
    from preference_training.evaluation.runs import load_run_config
    from preference_training.merging.held_out import HeldOutRows
    from preference_training.merging.ingredients import Ingredient
    from preference_training.merging.merge import Merge, merge

    read = [Ingredient.read(name, options.trust_remote_code, options.cache_dir) for name in models]
    base = Ingredient.read(options.base, options.trust_remote_code, options.cache_dir) if options.base else None
    task = Merge(recipe, read, base)
    if options.held_out is None:
        return merge(task, options.to)
    load_run_config(options.held_out, overrides)
    return merge(task, options.to, partial(HeldOutRows, options.held_out, overrides, options.trust_remote_code))
