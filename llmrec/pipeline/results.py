"""Assembles results.json from finished rows, and has their predictions written beside it."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from llmrec import __version__
from llmrec.baselines.retrieve import ceiling
from llmrec.data.split import SplitDataset
from llmrec.data.stats import baskets, wide_cutoffs
from llmrec.durable import checked, loads, sha256_of, write_checked
from llmrec.machine import command_line, machine, versions
from llmrec.pipeline.comparing import compare_rows
from llmrec.pipeline.evaluation import ResultRow
from llmrec.pipeline.predictions import write_items, write_predictions
from llmrec.pipeline.resume import Budget
from llmrec.pipeline.row_details import breakdowns
from llmrec.pipeline.row_specs import asks
from llmrec.pipeline.shown.example import example_user
from llmrec.pipeline.shown.exhibits import exhibits
from llmrec.pipeline.shown.newcomers import newcomers
from llmrec.pipeline.shown.samples import text_samples
from llmrec.pipeline.study import Study
from llmrec.pipeline.told import sentence, users
from llmrec.recipe.load import recipe_hash
from llmrec.records import Candidates, DataInfo, SetAside, Stage, Training
from llmrec.results import Choice, Results, Unevaluated
from llmrec.tasks.family import families, ranking_families


@dataclass(frozen=True)
class Written:
    """What was written: the content of ``results.json`` and its sha256, and the lines of ``predictions.parquet``."""

    results: dict[str, Any]
    sha256: str
    predictions: pl.DataFrame


def write_results(
    study: Study,
    rows: Sequence[ResultRow],
    training: Mapping[str, Any] | None,
    model: Mapping[str, Any],
    budget: Budget,
    folder: Path,
    missing: Sequence[Unevaluated] = (),
    choice: Choice | None = None,
) -> Written:
    """Write ``results.json``, ``predictions.parquet`` and ``items.parquet`` to the run folder, each atomically.

    ``missing`` are the rows that no engine could answer.
    ``budget`` holds what each stage cost when it last ran: a stage that this invocation reused keeps its figure.
    """
    recipe = study.recipe
    spent = {**_spent_before(folder / "results.json", recipe_hash(recipe)), **budget.stages}
    headlines = {
        name: family.headline_at(recipe.eval.cutoffs) for name, family in families().items() if name in study.tasks
    }
    compared, detectable = compare_rows(study, rows, choice)
    files = (folder / "predictions.parquet", folder / "items.parquet")
    predictions = write_predictions(study, rows, files[0])
    write_items(study, files[1])
    record = {key: value for key, value in training.items() if key != "key"} if training else None
    results = Results(
        llmrec=__version__,
        created=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        command=command_line(),
        recipe=recipe.model_dump(mode="json"),
        recipe_hash=recipe_hash(recipe),
        seed=recipe.seed,
        versions=versions(),
        machine=machine(),
        model=dict(model),
        data={"main": describe(study.data), "reviews": describe(study.reviews) if study.reviews else None},
        tables={family: study.table_name(family) for family in study.tasks},
        candidates=_candidates(study),
        training=Training.model_validate(record) if record else None,
        rows=tuple(
            row.figures.model_copy(update=dict(more))
            for row, more in zip(rows, breakdowns(study, rows, headlines), strict=True)
        ),
        # Absent where there is none, as in results of earlier versions.
        **({"unevaluated": tuple(missing)} if missing else {}),
        headline=headlines,
        comparisons=tuple(compared),
        **({"choice": choice} if choice else {}),
        detectable=detectable,
        budget=tuple(Stage(stage=stage, seconds=seconds) for stage, seconds in spent.items()),
        seconds=sum(spent.values()),
        examples=tuple(example for row in rows for example in row.examples),
        texts=tuple(text_samples(study, rows)),
        gallery=tuple(exhibits(study, rows)),
        newcomers=tuple(newcomers(study, rows)),
        **({"example": shown} if (shown := example_user(study, rows, headlines)) else {}),
        set_aside=tuple(
            SetAside(data=table.dataset.name, said=f"{sentence(table, found)}.", users=tuple(users(found)))
            for table in study.tables
            if (found := study.told(table))
        ),
        notes=(*unevaluated(missing), *notes(study)),
        files={file.name: sha256_of(file) for file in files},
    ).as_json()
    return Written(results, write_checked(folder / "results.json", results), predictions)


def too_wide(study: Study) -> str:
    """Say which cut-offs of a recipe's own are not below the size of its drawn candidate sets; empty where none is."""
    section, drawn = study.recipe.eval, study.candidates
    if drawn is None or section.candidates.kind == "retrieved" or "cutoffs" not in section.model_fields_set:
        return ""
    return wide_cutoffs(section.cutoffs, drawn.count)


def of_another(file: Path, key: str, hashed: str) -> str:
    """Say that results of another page would be written over; empty where there are none.

    Args:
        file: Where results go.
        key: Under which they have the hash of their page.
        hashed: The page's hash now.
    """
    try:
        earlier = loads(file.read_bytes()).get(key)
    except (OSError, ValueError, AttributeError):
        return ""
    if earlier in (None, hashed):
        return ""
    return f"{file} holds results of other settings, and will be written over; give this run another name to keep both"


def _spent_before(path: Path, hashed: str) -> dict[str, float]:
    """Read the stage costs of an earlier run of the same recipe, if there is one."""
    try:
        earlier = checked(path.read_bytes())
        return {e["stage"]: float(e["seconds"]) for e in earlier["budget"]} if earlier["recipe_hash"] == hashed else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def describe(data: SplitDataset) -> DataInfo:
    """Return a dataset's counts and hashes."""
    rows = data.dataset.interactions
    users, items = rows["user_id"].n_unique(), len(data.dataset.items)
    return DataInfo(
        name=data.dataset.name,
        users=users,
        items=items,
        interactions=len(rows),
        density=len(rows) / (users * items),
        train=len(data.train),
        valid=len(data.valid),
        test=len(data.test),
        fingerprint=data.dataset.fingerprint,
        split_fingerprint=data.fingerprint,
        split=data.kind,
        noun=data.dataset.noun,
        made=data.dataset.made,
        derived=data.dataset.provenance.get("derived", ""),
    )


def unevaluated(missing: Sequence[Unevaluated]) -> Iterator[str]:
    """Say how many rows were not evaluated, for each reason."""
    for reason, count in Counter(row.reason for row in missing).items():
        what = "1 row was" if count == 1 else f"{count} rows were"
        yield f"{what} not evaluated, and running the same command again evaluates them: {reason}."


def notes(study: Study) -> list[str]:
    """Say what a reader of the tables must know."""
    found = []
    for data in filter(None, (study.data, study.reviews)):
        if data.dataset.made:
            found.append(
                f"{data.dataset.name}: this table is made by the llmrec project; its texts are no real reviews."
            )
        if made := data.dataset.provenance.get("derived"):
            found.append(f"{data.dataset.name}: derived: {made}.")
    if (shape := study.recipe.model.shape) is not None:
        found.append(
            f"The language model is a new {shape.kind} of width {shape.width}, trained from scratch: nothing was "
            "pretrained, and all it knows is from the training rows of this run."
        )
    for family in study.tasks:
        found += [
            f"The question of {template.id} shows what could give its answer away: {template.leak}."
            for template in study.eval_templates(family)
            if template.leak
        ]
    if study.candidates and study.recipe.eval.candidates.kind == "retrieved":
        name = study.recipe.eval.candidates.retriever
        found += [
            f"Ranking figures of {family} are over the {study.candidates.count} items that {name} retrieves; "
            f"{share:.1%} of the items that are asked for are among them, which no HR can exceed."
            for family, share in _ceilings(study).items()
        ]
    elif study.candidates:
        found.append(
            f"Ranking figures are over {study.candidates.count} stored candidates a request, not over the whole "
            "catalogue; they cannot be compared with full-ranking figures."
        )
        if wide := too_wide(study):
            found.append(f"{wide}.")
    if study.recipe.eval.candidates.kind == "catalogue" and study.recipe.tasks.sequential is not None:
        found.append(
            "Ranking figures are over the whole catalogue less the history. A model's answer holds as many items as it "
            "kept beams, a baseline's a hundred; what an answer leaves out is a miss. That lowers MRR, and no figure "
            "that is cut at the beams or earlier."
        )
    found += [f"{cut}." for table in study.tables if (cut := baskets(table))]
    if study.aligned is not None:
        found.append(
            f"Alignment figures are over {study.aligned.count} candidates a question, all of them items whose code and "
            f"text were never trained together; chance is HR@1 {1 / study.aligned.count:.3f}. Each item counts as a "
            "user of its own."
        )
    rating = study.recipe.tasks.rating
    if rating is not None and rating.head is not None:
        found.append(
            "The tuned model was trained through its rating head and is asked by it alone; the base model has no head "
            "and is asked by the other strategies."
        )
    judged = study.recipe.tasks.ctr
    if judged is not None and judged.balance == "user":
        found.append(
            "Yes/no questions are balanced inside each user, as many with a yes as with a no: what is known of a user "
            "alone, such as the share of likes, reaches AUC and GAUC 0.5 and no more."
        )
    if "tuned" in study.recipe.eval.arms:
        found += _training_notes(study)
    if len(study.recipe.eval.arms) > 1 or "tuned" in study.recipe.eval.arms:
        found.append("One training seed: intervals cover the choice of users, not the choice of seed.")
    return found


def _training_notes(study: Study) -> list[str]:
    """Say what the tuned model was not trained on, and what it was trained on before."""
    found = []
    weighted = [family for family in study.tasks if asks(study.recipe, family, "tuned")]
    untaught = [family for family in weighted if family not in study.shares]
    if untaught:
        found.append(
            f"Left out of training, and asked of the tuned model nonetheless: {', '.join(untaught)}. What it answers "
            f"there comes from the base model and from training on {', '.join(study.shares)}."
        )
    if study.recipe.train.start is not None:
        found.append(
            f"Training continued from the tuned model of another run, {Path(study.recipe.train.start).name}; "
            "settings that are not tuned ask the base model, which knows nothing of that run."
        )
    if study.recipe.train.teacher is not None:
        found.append(
            f"The tuned model learned from the model of another run too, {Path(study.recipe.train.teacher.run).name}."
        )
    return found


def _ceilings(study: Study) -> dict[str, float]:
    """Return the share of evaluated targets among their retrieved candidates, by family; none where sets are drawn."""
    if study.candidates is None or study.recipe.eval.candidates.kind != "retrieved":
        return {}
    asked = {family: study.cases(family) for family in ranking_families() if family in study.tasks}
    return {
        family: ceiling(study.candidates, {case.request.id: str(case.truth) for case in cases})
        for family, cases in asked.items()
    }


def _candidates(study: Study) -> dict[str, Candidates | None]:
    drawn = {"main": study.candidates, "alignment": study.aligned}
    # Families may be asked about different users; what none of them can exceed is the highest of their ceilings.
    most = max(_ceilings(study).values(), default=None)
    return {
        name: Candidates(digest=sets.digest, count=sets.count, kind=sets.kind, ceiling=most if name == "main" else None)
        for name, sets in drawn.items()
        if sets is not None
    }
