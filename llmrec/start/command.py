"""The commands `llmrec init`, `llmrec auto` and `llmrec tune`."""

from __future__ import annotations

from llmrec.cli.console import rich_console, say, store_facts
from llmrec.progress import log_line
from llmrec.start.options import AutoOptions, InitOptions, TuneOptions


def init(options: InitOptions) -> None:
    """Write a recipe for a table of interactions.

    Prints which column was used for what, and why.

    Example:
        llmrec init orders.csv --items products.csv
    """
    from llmrec.start import init as start
    from llmrec.start.columns import requested_roles

    made = start.write_recipe(
        options.table,
        items=options.items,
        query=options.query,
        out=options.out,
        name=options.name,
        requested=requested_roles(options),
        mend=options.mend,
        force=options.force,
    )
    store_facts(recipe=made.recipe, found=made.found, then=made.then)
    say(made.summary)


def auto(options: AutoOptions) -> None:
    """Build a recommender from a table within a time budget.

    Tunes models, combines them into an ensemble and evaluates them. The best one is ready for llmrec serve.

    Example:
        llmrec auto orders.csv --items products.csv --budget 30m
    """
    from llmrec.report.results import parse_results
    from llmrec.report.verdicts import metrics_table
    from llmrec.start import auto as autos

    made = autos.build_recommender(options, say=log_line)
    store_facts(**autos.auto_record(made, options))
    rich_console().print(metrics_table(parse_results(made.run.results)))
    say(f"\n{autos.format_summary(made)}")


def tune(options: TuneOptions) -> None:
    """Tune hyperparameters of a recipe on validation users.

    Stops after a time budget and writes the best settings as a recipe.

    Example:
        llmrec tune recipes/quickstart.yaml --over train.learning_rate=1e-4..1e-3 --budget 1h
    """
    from llmrec.start.tune import format_summary, search_hyperparameters

    best = search_hyperparameters(options, say=log_line)
    store_facts(**vars(best))
    say(format_summary(best))
