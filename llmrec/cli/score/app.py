"""The command `llmrec score`."""

from __future__ import annotations

from llmrec.cli.common import App
from llmrec.cli.options import takes
from llmrec.cli.score.options import ScoreOptions
from llmrec.cli.show.console import say, tell

app = App()


@app.command()
@takes(ScoreOptions)
def score(options: ScoreOptions) -> None:
    """Measure ranked lists of any system.

    Every ranking metric against what is relevant, with a 95 % interval. Lists are those of `llmrec rank`, a table with
    a row a ranked item, or a TREC run. Two files are compared, by user.
    """
    from llmrec.cli.score.run import cutoffs, lines, score
    from llmrec.errors import RecipeError

    if len(options.ranked) not in (1, 2):
        raise RecipeError(
            f"{len(options.ranked)} files of lists: give one, or two to compare", kind="missing-key", column="RANKED"
        )
    found = score(
        options.ranked[0],
        options.truth,
        against=options.ranked[1] if len(options.ranked) > 1 else None,
        k=cutoffs(options.k),
        graded=options.graded,
        planned=options.planned,
        resamples=options.resamples,
        seed=options.seed,
        user=options.user,
        item=options.item,
    )
    tell(**found.as_json())
    for line in lines(found):
        say(line)
