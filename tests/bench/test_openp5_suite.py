"""The suite of OpenP5's setting holds what that setting says (Xu et al., SIGIR 2024), whatever its recipe changes."""

from __future__ import annotations

from llmrec.recipe.comparisons import Suite
from llmrec.recipe.load import load_recipe, load_suite
from llmrec.recipe.schema import Recipe


def both() -> tuple[Suite, dict[str, Recipe]]:
    suite = load_suite("eval/suites/openp5.yaml")
    return suite, {row.label: load_recipe(row.recipe, row.overrides) for row in suite.rows if row.recipe}


def test_it_ranks_all_items_with_those_of_the_history_over_five_orders_of_ties() -> None:
    suite, _ = both()
    assert (suite.split, suite.seen, suite.cutoffs, suite.users) == ("test", ("included",), (5, 10), None)
    assert suite.split_seeds == (0, 1, 2, 3, 4)
    assert suite.data.filter.item_core == 5 and suite.data.split.kind == "leave_one_out"
    counting = next(row for row in suite.rows if row.label == "markov, last 5")
    assert counting.parameters == {"order": 5, "decay": 0.7} and not counting.tune
    # A search that finds ten items or more decides every figure here.
    assert all(row.depth >= max(suite.cutoffs) for row in suite.rows if row.recipe)


def test_both_rows_differ_in_how_items_are_numbered_alone() -> None:
    _, recipes = both()
    sequential, random = recipes["sequential numbers"], recipes["random numbers"]
    assert sequential.index is not None and random.index is not None
    assert (sequential.index.scheme, random.index.scheme) == ("sequential", "random")
    assert sequential.index.first == random.index.first == 1001
    for recipe in recipes.values():
        section = recipe.tasks.sequential
        assert section is not None
        # No position of a training row sees more than evaluation shows.
        assert section.history == 20 and section.window == 21
    same = sequential.model_copy(update={"index": None})
    assert same == random.model_copy(update={"index": None})
