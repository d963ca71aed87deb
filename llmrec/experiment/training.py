"""The training stage: mixture -> planned steps -> adapter -> merged folder."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec import __version__, processes
from llmrec.backends.encode import Encoder, TokenRow
from llmrec.durable import replacing, write_checked, write_text
from llmrec.errors import LlmrecError, RecipeError, require
from llmrec.experiment import bundle, indexing
from llmrec.experiment.resume import Budget, key_of, read_stage
from llmrec.experiment.row_specs import listing
from llmrec.experiment.study import Study, fused_finder
from llmrec.experiment.tuning.judging import Judge, judged
from llmrec.models.load import device, load_config, release_memory, weights_stamp
from llmrec.models.memory import TRAINING, told_of_full_memory
from llmrec.models.rating_head import RatingHead, copy_head
from llmrec.models.traits import is_paired
from llmrec.models.whole_words import copy_words, refuse_words
from llmrec.recipe.schema import Recipe
from llmrec.records import Training as TrainingRecord
from llmrec.registry import TASKS, stamps, written
from llmrec.tasks.family import family_of
from llmrec.tasks.mixture import interleave
from llmrec.tasks.pool import NEGATIVES
from llmrec.tasks.rating import RatingTask, learned_only
from llmrec.tasks.rows import Listwise
from llmrec.train.batches import Classes, plan
from llmrec.train.listwise import Listing
from llmrec.train.rows import Sources, followed, streams
from llmrec.train.shares import weighted
from llmrec.train.steps import Steps
from llmrec.train.trackers import forget

if TYPE_CHECKING:
    from llmrec.train.sft import Training

log = logging.getLogger(__name__)

# Task settings that no training row depends on.
_EVALUATION_ONLY = {
    *("arms", "strategies", "baselines", "users", "eval_templates", "max_tokens"),
    *("balance", "per_user", "calibrate"),
}
# Training settings that change nothing of the adapter.
_UNLEARNED = {"report_to", "save_every", "keep_checkpoints", "start"}
# Rows dropped in a row before training gives up: every one was longer than a training row may be.
_PATIENCE = 2000


@dataclass(frozen=True)
class Plan:
    """Planned steps, how many rows of each task they hold, and validation rows by task.

    ``dropped`` counts rows whose only target lay beyond ``train.max_row_tokens``; ``loss_shares`` is what part of the
    loss each task has.
    """

    steps: Steps
    rows: Mapping[str, int]
    dropped: Mapping[str, int]
    valid: Mapping[str, list[TokenRow]]
    loss_shares: Mapping[str, float] = field(default_factory=dict)


def plan_training(study: Study, encoder: Encoder, *, paired: bool = False) -> Plan:
    """Draw rows by weight until the recipe's steps are filled; for an encoder-decoder (``paired``) one a target."""
    section = study.recipe.train
    if study.recipe.model.whole_words and not paired:
        refuse_words(study.recipe.model.name)
    shares = study.shares
    dropped = dict.fromkeys(shares, 0)
    classes, listwise = classes_of(study, encoder, paired=paired), listwise_of(study, paired=paired)
    families: list[str] = []

    def rows() -> Iterator[TokenRow]:
        since = 0
        tasks, users = study.training_tasks, study.data.users()
        sources = Sources(tasks, study.training_examples, users, section, study.training_seed, paired)
        found, weights = streams(sources, shares, encoder)
        for _, (family, drawn) in interleave(found, weights, study.training_seed, size=lambda drawn: _size(drawn[1])):
            row = classes.row(drawn) if classes is not None and drawn is not None else drawn
            if row is None:
                if section.examples is not None:
                    raise RecipeError(
                        f"train.examples: one of the {section.examples} rows of tasks.{family} is longer than "
                        f"train.max_row_tokens={section.max_row_tokens}; raise it, or show less history",
                        kind="too-large",
                        column="train.max_row_tokens",
                    )
                dropped[family] += 1
                since += 1
                if since > _PATIENCE:
                    raise RecipeError(
                        f"no training row fits train.max_row_tokens={section.max_row_tokens}: {_PATIENCE} rows of "
                        f"tasks.{family} in a row were longer; raise it, or show less history",
                        kind="too-large",
                        column="train.max_row_tokens",
                    )
                continue
            since = 0
            families.append(family)
            yield row

    width = section.max_row_tokens if section.packing == "tree" else None
    steps = plan(
        rows(),
        steps=section.steps,
        batch_tokens=section.batch_tokens,
        seed=study.training_seed,
        width=width,
        band=section.band,
        lists=listwise.size if listwise is not None else None,
    )
    for family, lost in dropped.items():
        if lost:
            log.warning("tasks.%s: %d rows were longer than train.max_row_tokens and were dropped", family, lost)
    counts = dict.fromkeys(shares, 0)
    for numbers in steps.numbers():
        for n in numbers:
            counts[families[n]] += 1
    valid = {family: _valid_rows(study, family, encoder, paired=paired) for family in _followed(study)}
    if classes is not None:
        valid = {f: [made for each in own if (made := classes.row(each))] for f, own in valid.items()}
    balanced = weighted(steps, families)
    return Plan(balanced.steps, counts, dropped, valid, balanced.shares)


def _followed(study: Study) -> list[str]:
    """Return the families whose validation loss is followed: those left out of training too, to see what carries over.

    A rating head has a loss of its own, so that beside it no other family has one.
    """
    rating = study.recipe.tasks.rating
    if rating is not None and rating.head is not None:
        return list(study.shares)
    return [family for family in study.tasks if study.section(family).weight > 0]


def classes_of(study: Study, encoder: Encoder, *, paired: bool = False) -> Classes | None:
    """Return what puts classes in place of target tokens, where the recipe trains a rating head.

    Raises:
        RecipeError: If the model is an encoder-decoder.
    """
    rating = study.recipe.tasks.rating
    if rating is None or rating.head is None:
        return None
    if paired:
        raise RecipeError(
            f"tasks.rating.head: {study.recipe.model.name} is an encoder-decoder, and a head reads the states of a "
            "decoder alone; drop the section and 'head' from tasks.rating.strategies, or choose another model",
            kind="unsupported",
            column="tasks.rating.head",
        )
    task = study.tasks["rating"]
    assert isinstance(task, RatingTask)
    if other := [template.id for template in task.training_templates if learned_only(template)]:
        raise RecipeError(
            f"tasks.rating.templates: {other[0]} is answered by yes or no, and tasks.rating.head learns ratings alone; "
            "leave it out, or drop the head",
            kind="contradiction",
            column="tasks.rating.templates",
        )
    return Classes(encoder, task.scale)


def listwise_of(study: Study, *, paired: bool = False) -> Listwise | None:
    """Return how training rows are learned as lists of candidates, where the recipe says so.

    Raises:
        RecipeError: If other families are trained beside them, or the model is an encoder-decoder.
    """
    found = {
        family: task.listwise
        for family in study.shares
        if isinstance(task := study.training_tasks[family], Listing) and task.listwise is not None
    }
    if not found:
        return None
    ((family, listwise),) = found.items()
    key, others = f"tasks.{family}.loss", [name for name in study.shares if name != family]
    if others or paired:
        what = (
            f"{study.recipe.model.name} is an encoder-decoder, whose rows are not packed; choose another model"
            if paired
            else f"a loss over candidates is of another kind than that of {others[0]}; leave one of both out of "
            "training (train.only), or set it to answer"
        )
        raise RecipeError(f"{key}: {what}", kind="contradiction", column=key)
    return listwise


def _size(row: TokenRow | None) -> int:
    return 0 if row is None else len(row.ids)


def _valid_rows(study: Study, family: str, encoder: Encoder, *, paired: bool) -> list[TokenRow]:
    section, limit = study.recipe.train, study.recipe.model.max_length
    examples = study.tasks[family].examples("valid", section.valid_rows // max(len(study.tasks), 1))
    return followed(examples, encoder, limit, paired=paired)


def _unread(family: str) -> set[str]:
    """Return the settings of a family that no training row depends on."""
    return _EVALUATION_ONLY | family_of(family).evaluation_keys


def training_key(study: Study, folder: str) -> str:
    """Return a key over everything that can change the adapter."""
    recipe = study.recipe
    return key_of(
        llmrec=__version__,
        model=recipe.model.model_dump(exclude={"device"}),
        weights=weights_stamp(folder),
        data=study.data.fingerprint,
        reviews=study.reviews.fingerprint if study.reviews else None,
        index=study.index.digest if study.index else None,
        noun=[data.dataset.noun for data in (study.data, study.reviews) if data is not None],
        tasks=recipe.tasks.model_dump(exclude={family: _unread(family) for family in study.tasks}),
        templates={f: [study.templates[f][n].sha for n in sorted(study.templates[f])] for f in study.tasks},
        candidates=recipe.eval.candidates.model_dump() if any(family_of(f).lists for f in study.tasks) else None,
        # What training starts from stands in its weights, wherever they lie.
        train=recipe.train.model_dump(exclude=_UNLEARNED if recipe.train.judge else {*_UNLEARNED, "judge"}),
        seed=recipe.seed,
        **stamps((TASKS, written(family)) for family in study.tasks),
        **_nearness(study),
        **_drawing(study),
        **_judging(study),
    )


def _nearness(study: Study) -> dict[str, str]:
    """Return what says which items read alike, where that decides what a row shows of a history."""
    rules = {study.section(family).past for family in study.tasks}
    return {"encoder": study.recipe.encoder} if "relevant" in rules else {}


def _judging(study: Study) -> dict[str, object]:
    """Return what says how a model is judged while it is trained, where that decides which adapter is kept."""
    recipe = study.recipe
    if recipe.train.judge is None:
        return {}
    asked = {
        family: [study.section(family).strategies[:1], [study.tasks[family].eval_templates[0]]]
        for family in judged(study)
    }
    section = recipe.eval
    return {
        "judge": {
            "asked": asked,
            "candidates": section.candidates.model_dump(mode="json"),
            "reserved": section.fusion.reserved,
            "options": [section.beams, section.exact, section.prior_weight, section.depth],
        }
    }


def _drawing(study: Study) -> dict[str, object]:
    """Return what says how negatives are drawn, where rows show any."""
    if not any(family_of(family).lists for family in study.tasks):
        return {}
    return {"negatives": NEGATIVES} | listing(study.recipe.eval) | _finding(study.recipe)


def _finding(recipe: Recipe) -> dict[str, object]:
    """Return what decides which candidates a fusion retrieves, where one does."""
    finder = fused_finder(recipe)
    if finder is None:
        return {}
    baselines = [section.model_dump(mode="json") for section in finder.baselines]
    return {"finder": {"baselines": baselines, "reserved": finder.reserved, "seed": finder.seed}}


def trained(study: Study, base: str, folder: Path) -> dict[str, Any] | None:
    """Return the record of a finished training from the same inputs, if this folder still holds what it made."""
    done = read_stage(folder / "train.json", training_key(study, base), _record_of)
    if done is None:
        return None
    merged = folder / "merged"
    if (merged / "config.json").is_file() and weights_stamp(str(merged)) == done["merged_sha256"]:
        return done
    log.warning("training: %s is not what training left there; it is made again", merged)
    return None


def _record_of(stored: Mapping[str, Any]) -> tuple[TrainingRecord, str]:
    """Return a stored training, and the stamp of the weights that it left."""
    return TrainingRecord.model_validate(stored), str(stored["merged_sha256"])


def train_stage(
    study: Study, encoder: Encoder, base: str, folder: Path, budget: Budget, *, quiet: bool = False
) -> dict[str, Any]:
    """Train and merge, or reuse what an earlier run left; returns the ``training`` part of results.json."""
    done = trained(study, base, folder) if not processes.rank() else None
    if done is not None:
        log.info("training: reusing %s", folder / "adapter")
        if processes.size() == 1:
            return done
    from llmrec.train.world import here, refuse_different

    world, key = here(), training_key(study, base)
    refuse_different(world, key, "training data, model or recipe")
    if world.agree(done is not None):
        return done or _stored(folder, key)
    if world.first:
        # A record must never vouch for weights of another run that was killed half-way.
        (folder / "train.json").unlink(missing_ok=True)
    with budget.stage("plan"):
        paired = is_paired(load_config(base, study.recipe.model))
        planned = plan_training(study, encoder, paired=paired)
        refuse_different(world, planned.steps.digest(), "training rows")
    with budget.stage("train"):
        judge = Judge.of(study, encoder) if world.first else None
        training = _train(study, encoder, base, folder, planned, key, judge=judge, quiet=quiet)
    budget.add("train", training.seconds_before)
    if not world.first:
        world.wait()
        return _stored(folder, key)
    with budget.stage("merge"):
        _merge(study, encoder, base, folder)
    told = asdict(training)
    kept = told.pop("kept_step")
    if judge is not None:
        with budget.stage("judge"):
            value = max(line["valid_ndcg"] for line in training.log if line["valid_ndcg"] is not None)
            users = len({case.request.user_id for case in judge.cases})
            told["judged"] = {"family": judge.family, "users": users, "kept_step": kept, "value": value}
            told["judged"]["controls"] = judge.controls()
    record = {
        "key": key,
        "rows": dict(planned.rows),
        "shares": dict(study.shares),
        "loss_shares": dict(planned.loss_shares),
        "dropped": dict(planned.dropped),
        **told,
        "merged_sha256": weights_stamp(str(folder / "merged")),
    }
    write_checked(folder / "train.json", record)
    world.wait()
    return record


def _stored(folder: Path, key: str) -> dict[str, Any]:
    """Return the record that the first of several processes has just written."""
    found = read_stage(folder / "train.json", key, _record_of)
    if found is None:
        raise LlmrecError(
            f"{folder / 'train.json'} was written by the first process, and this one does not see it; put the run "
            "folder on storage that all machines share",
            kind="missing-file",
            at=folder,
        )
    return found


@told_of_full_memory("training", TRAINING, "train.batch_tokens")
def _train(
    study: Study,
    encoder: Encoder,
    base: str,
    folder: Path,
    planned: Plan,
    key: str,
    *,
    judge: Judge | None,
    quiet: bool,
) -> Training:
    from llmrec.train import lora, sft
    from llmrec.train.world import here

    section = study.recipe.train
    if here().first:
        _clear_foreign(folder, key)
    names = study.index.vocabulary if study.index is not None else ()
    tokens = encoder.tokenizer.convert_tokens_to_ids(list(names))
    # Adapters and heads start from random weights.
    require("torch", "train").manual_seed(study.training_seed)
    model = lora.load_trainable(base, study.recipe.model, section, tokens=tokens)
    if study.recipe.model.whole_words:
        from llmrec.train.whole_words import put_on

        put_on(model, encoder, size=study.recipe.model.max_length + 1, seed=study.training_seed)
    head = _head(study, encoder, model, planned)
    training = sft.train(
        model,
        encoder,
        planned.steps,
        planned.valid,
        section,
        folder=folder,
        seed=study.training_seed,
        quiet=quiet,
        head=head,
        device=device(study.recipe.model),
        judge=None if judge is None else judge.model,
        listwise=listwise_of(study),
    )
    del model, head
    release_memory()
    return training


def _head(study: Study, encoder: Encoder, model: Any, planned: Plan) -> RatingHead | None:
    """Put a rating head on the model where the recipe trains one; it starts from what the planned rows say."""
    classes = classes_of(study, encoder)
    section = study.recipe.tasks.rating
    if classes is None or section is None or section.head is None:
        return None
    from llmrec.train.rating_head import attach

    counts = classes.counts(row for step in planned.steps for row in step.rows)
    return attach(model, classes.scale, alpha=section.head.alpha, counts=counts, frozen=section.head.frozen)


def _merge(study: Study, encoder: Encoder, base: str, folder: Path) -> None:
    from llmrec.train import lora

    with replacing(folder / "merged") as draft:
        if study.recipe.train.method == "full":
            lora.save_full(folder / "adapter", study.recipe.model, draft)
        else:
            lora.merge(base, study.recipe.model, folder / "adapter", draft)
        copy_head(folder / "adapter", draft)
        copy_words(folder / "adapter", draft)
        encoder.tokenizer.save_pretrained(draft)
        bundle.write(study, draft)
        if study.index is not None:
            study.index.save(draft / indexing.FOLDER)


def _clear_foreign(folder: Path, key: str) -> None:
    """Drop checkpoints that another recipe left in this folder; keep those of a killed run of this one."""
    from llmrec.train.checkpoint import checkpoints

    mark = folder / "checkpoints" / "key"
    found = checkpoints(folder / "checkpoints")
    if mark.is_file() and mark.read_text(encoding="utf-8") == key:
        return
    for checkpoint in found:
        shutil.rmtree(checkpoint)
    forget(folder)
    write_text(mark, key)
