"""Evaluation in shards of the test cases; merged results equal those of a single process.

A shard does not train, fit baselines or compute metrics. `merge_run` merges the answer caches and then runs
`llmrec eval`, which finds every answer in the cache: intervals and comparisons are computed over all cases.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from llmrec.backends.cache import AnswerStore
from llmrec.errors import RecipeError
from llmrec.pipeline.resume import RUN_FILES, lock_folder
from llmrec.pipeline.run import ANSWERS, Run, Session, StoredTraining, open_session, run
from llmrec.pipeline.shards import SHARD_FILE, finish_shard, reusable_shard, shard_folder, verify_shards
from llmrec.pipeline.study import resolve_run_folder
from llmrec.recipe.load import STORED_RECIPE_FILE, load_stored_recipe
from llmrec.recipe.schema import Recipe
from llmrec.records import Shard
from llmrec.terminal import set_command_folder

log = logging.getLogger(__name__)

# Files that only the running shard needs.
_TEMPORARY_FILES = ("base", "base.json", "candidates", "index", "data")


def evaluate_shard(
    recipe: Recipe,
    out: Path | None,
    shard: Shard,
    *,
    quiet: bool = False,
    report: Callable[[float], None] = lambda _: None,
) -> Path:
    """Evaluate the language models of a recipe on one shard of the cases, in a folder next to the run folder.

    Args:
        recipe: The complete recipe.
        out: The run folder, with the fine-tuned model if the recipe evaluates one; ``runs/<name>`` by default.
        shard: The shard: complete batches of the cases of each row.
        quiet: Show no progress bars.
        report: Called with the finished fraction.

    Returns:
        The shard's folder.

    Raises:
        LlmrecError: If the recipe has no language model, its fine-tuned model is missing, or an engine fails.
    """
    home = resolve_run_folder(recipe, out)
    check_language_model(recipe)
    folder = shard_folder(home, shard)
    with lock_folder(folder, (*RUN_FILES, SHARD_FILE)):
        set_command_folder(folder)
        session = open_session(recipe, folder, quiet=quiet)
        training = session.tuned(home)
        key = _evaluation_key(session, training, home)
        if reusable_shard(folder, key):
            log.warning("shard %s is already complete", shard)
        else:
            if training is not None:
                log.warning("shards do not train; they use the fine-tuned model of %s", home)
            with session.asking(training, home) as (weights, engines):
                session.evaluation().ask(weights, engines, shard, report)
            with closing(AnswerStore(folder / ANSWERS)) as store:
                fields = {"answers": len(store), "seconds": dict(session.budget.stages)}
            finish_shard(folder, "eval", shard, key, [STORED_RECIPE_FILE, ANSWERS], fields)
        for name in _TEMPORARY_FILES:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return folder


def check_language_model(recipe: Recipe) -> None:
    """Reject a recipe without a language model, because baselines are not evaluated in shards."""
    if not recipe.eval.arms:
        raise RecipeError(
            "this recipe has no language model (eval.arms is empty), so there is nothing to distribute; run the "
            "recipe in one process",
            kind="unsupported",
            column="eval.arms",
        )


def merge_run(home: Path, folders: Sequence[Path] = (), *, quiet: bool = False) -> Run:
    """Merge the answers of all shards into a run folder, and compute the results.

    Args:
        home: The run folder, as given to the shards.
        folders: The shards' folders; by default those next to the run folder.
        quiet: Show no progress bars.

    Raises:
        LlmrecError: If shards are missing, damaged, duplicate or of other inputs; see also `llmrec.pipeline.run.run`.
    """
    result = verify_shards(home, folders)

    def join(session: Session) -> None:
        key = _evaluation_key(session, session.tuned(home), home)
        for entry in result:
            entry.refuse_other(key)
        with closing(AnswerStore(home / ANSWERS)) as store:
            for entry in result:
                store.join(entry.folder / ANSWERS)
                for stage, spent in entry.facts["seconds"].items():
                    # The cost of answers is stored with them; the cost of starting engines is not.
                    if stage.startswith("start "):
                        session.budget.add(stage, spent)

    return run(load_stored_recipe(result[0].folder), home, quiet=quiet, may_train=False, before=join)


def _evaluation_key(session: Session, training: StoredTraining | None, home: Path) -> str:
    with session.asking(training, home, remembers=False) as (weights, engines):
        return session.evaluation().shards_key(weights, engines)
