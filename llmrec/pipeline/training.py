"""The training stage: mixes tasks, plans steps, trains the adapter and merges it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec import processes
from llmrec.backends.encode import Encoder, TokenRow
from llmrec.baselines.parameters import input_hashes
from llmrec.durable import replace_atomically, write_checked_json, write_text
from llmrec.errors import LlmrecError, RecipeError, require
from llmrec.fingerprint import code_digest, component_modules, fingerprint
from llmrec.models.load import device, load_config, model_folder_hash, release_memory, weights_sha256
from llmrec.models.memory import TRAINING_ADVICE, check_memory, convert_memory_errors
from llmrec.models.rating_head import RatingHead, copy_rating_head
from llmrec.models.soft_prompt import TIED_METHODS, SoftPrompt, copy_soft_prompt_files
from llmrec.models.text_encoder import text_embedder
from llmrec.models.traits import is_encoder_decoder
from llmrec.models.whole_words import copy_whole_words, raise_missing_encoder
from llmrec.pipeline import bundle, indexing
from llmrec.pipeline.objectives import (
    CheckpointEvaluator,
    answer_labels,
    check_dropped_examples,
    listwise_settings,
    plan_reward_training,
    rating_head_classes,
    reward_family,
    reward_objective,
    trained_ranking_families,
)
from llmrec.pipeline.rejecting import BEAM, release_backend
from llmrec.pipeline.resume import StageTimer, read_stage
from llmrec.pipeline.row_specs import strategy_settings
from llmrec.pipeline.study import Study, ensemble_retriever
from llmrec.recipe.schema import SOFT_PROMPT_METHODS, Recipe
from llmrec.records import Training as TrainingRecord
from llmrec.registry import BASELINES, TASKS, Table, plugin_digests, task_name_in_recipes
from llmrec.tasks.family import family_of
from llmrec.tasks.mixture import interleave
from llmrec.train.batches import plan_steps
from llmrec.train.rows import ExampleSources, row_streams, tokenise_validation_rows
from llmrec.train.steps import TrainingPlan, balance_task_losses
from llmrec.train.trackers import remove_tracker_runs

if TYPE_CHECKING:
    import torch

    from llmrec.train.sft import TrainingResult

log = logging.getLogger(__name__)


def plan_training(study: Study, encoder: Encoder, *, paired: bool = False) -> TrainingPlan:
    """Draw training examples by task weight to fill the steps of the recipe."""
    section = study.recipe.train
    if study.recipe.model.whole_words and not paired:
        raise_missing_encoder(study.recipe.model.name)
    if section.softmax == "items" and (paired or study.index is None or not study.index.vocabulary):
        raise RecipeError(
            "train.softmax: 'items' needs a decoder and an index with item tokens, such as index: {scheme: token}; set "
            "train.softmax=vocabulary",
            kind="contradiction",
            column="train.softmax",
        )
    if section.reward is not None:
        family = reward_family(study, paired=paired)
        return plan_reward_training(study, encoder, {family: _validation_rows(study, family, encoder, paired=paired)})
    shares = study.shares
    dropped = dict.fromkeys(shares, 0)
    listwise, labels = listwise_settings(study, paired=paired), answer_labels(study, encoder, paired=paired)
    classes = rating_head_classes(study, encoder, paired=paired) or labels
    families: list[str] = []

    def rows() -> Iterator[TokenRow]:
        since = 0
        for family, drawn in iterate_training_rows(study, encoder, paired=paired):
            row = classes.row(drawn) if classes is not None and drawn is not None else drawn
            if row is None:
                if section.examples is not None:
                    raise RecipeError(
                        f"train.examples: one of the {section.examples} examples of tasks.{family} is longer than "
                        f"train.max_row_tokens={section.max_row_tokens}; raise train.max_row_tokens, or show less "
                        "history",
                        kind="too-large",
                        column="train.max_row_tokens",
                    )
                dropped[family] += 1
                since += 1
                check_dropped_examples(since, f"training examples of tasks.{family}", section.max_row_tokens)
                continue
            since = 0
            families.append(family)
            yield row

    width = section.max_row_tokens if section.packing == "tree" else None
    steps = plan_steps(
        rows(),
        steps=section.steps,
        batch_tokens=section.batch_tokens,
        seed=study.training_seed,
        width=width,
        lists=listwise.size if listwise is not None else None,
    )
    for family, lost in dropped.items():
        if lost:
            log.warning("tasks.%s: %d training examples longer than train.max_row_tokens were dropped", family, lost)
    counts = dict.fromkeys(shares, 0)
    for numbers in steps.numbers():
        for n in numbers:
            counts[families[n]] += 1
    soft = None
    if labels is not None:
        # This must precede validation examples, whose labels must not initialise soft prompts.
        labels.closed = True
        prompts, ids = study.recipe.train.soft.prompts, tuple(labels.ids)
        soft = SoftPrompt(prompts, ids, tied=labels.tied, seed=study.training_seed)
    valid = {
        family: _validation_rows(study, family, encoder, paired=paired) for family in _families_with_validation(study)
    }
    if classes is not None:
        valid = {f: [labelled for item in items if (labelled := classes.row(item))] for f, items in valid.items()}
    balanced, loss_shares = balance_task_losses(steps, families)
    return TrainingPlan(balanced, counts, dropped, valid, loss_shares, soft=soft)


def iterate_training_rows(
    study: Study, encoder: Encoder, *, paired: bool = False, texts: bool = False
) -> Iterator[tuple[str, TokenRow | None]]:
    """Yield tasks and training examples endlessly, in the order in which steps use them.

    With ``texts``, rows are `llmrec.train.rows.TextRow`.
    """
    tasks, users, seed = study.training_tasks, study.data.users(), study.training_seed
    sources = ExampleSources(tasks, study.training_examples, users, study.recipe.train, seed, paired)
    result, weights = row_streams(sources, study.shares, encoder, texts=texts)
    for _, drawn in interleave(result, weights, seed, size=lambda drawn: 0 if drawn[1] is None else len(drawn[1].ids)):
        yield drawn


def _families_with_validation(study: Study) -> list[str]:
    """Return the tasks with a validation loss, including untrained ones that measure transfer.

    A rating head or tied soft prompts have their own loss; then no other family has a validation loss.
    """
    rating = study.recipe.tasks.rating
    if study.recipe.train.method in TIED_METHODS or (rating is not None and rating.head is not None):
        return list(study.shares)
    return [family for family in study.tasks if study.section(family).weight > 0]


def _validation_rows(study: Study, family: str, encoder: Encoder, *, paired: bool) -> list[TokenRow]:
    section, limit = study.recipe.train, study.recipe.model.max_length
    examples = study.tasks[family].examples("valid", section.valid_rows // len(study.tasks))
    return tokenise_validation_rows(examples, encoder, limit, paired=paired)


def training_key(study: Study, folder: str) -> str:
    """Return the fingerprint of the adapter.

    It does not include code, so that an edit does not discard a long training; see `_training_code_digest`.
    """
    recipe = study.recipe
    lists = any(family_of(family).lists for family in study.tasks)
    return fingerprint(
        "train",
        recipe,
        unused=() if lists else ("eval.candidates",),
        weights=model_folder_hash(folder),
        data=study.data.fingerprint,
        reviews=study.reviews.fingerprint if study.reviews else None,
        index=study.index.digest if study.index else None,
        noun=[data.dataset.noun for data in study.tables],
        templates={f: [study.templates[f][n].sha for n in sorted(study.templates[f])] for f in study.tasks},
        plugins=plugin_digests(
            [*((TASKS, task_name_in_recipes(family)) for family in study.tasks), *_scoring_baselines(recipe)]
        ),
        encoder=_encoder_stamp(study),
        finder=_retriever_settings(recipe) if lists or recipe.train.preference is not None else None,
        beam=_beam_search_settings(study),
        judge=_checkpoint_selection_settings(study),
        teacher=_teacher_stamp(recipe),
    )


def _training_code_digest(study: Study) -> str:
    """Return a hash of the code of the tasks, the training examples and the training loop."""
    families = component_modules((TASKS, task_name_in_recipes(family)) for family in study.tasks)
    return code_digest("llmrec.train.lora", "llmrec.train.rows", "llmrec.train.sft", *sorted(families))


def _teacher_stamp(recipe: Recipe) -> str | None:
    """Return the hash of the teacher's weights, if the recipe has a teacher."""
    if recipe.train.teacher is None:
        return None
    merged = Path(recipe.train.teacher.run).expanduser() / "merged"
    return model_folder_hash(str(merged)) if merged.is_dir() else ""


def _scoring_baselines(recipe: Recipe) -> list[tuple[Table, str]]:
    """Return the baselines that give rewards or hard negatives, if any."""
    reward, preference = recipe.train.reward, recipe.train.preference
    named = [reward.baseline if reward is not None else None, preference.rejected if preference is not None else None]
    return [(BASELINES, name) for name in named if name is not None]


def _encoder_stamp(study: Study) -> str | None:
    """Return an identifier of the text encoder that selects relevant history items; None if none is used."""
    rules = {study.section(family).past for family in study.tasks}
    return text_embedder(study.recipe.encoder).stamp if "relevant" in rules else None


def _checkpoint_selection_settings(study: Study) -> dict[str, object] | None:
    """Return the evaluation settings that affect the selection of the checkpoint."""
    recipe = study.recipe
    if recipe.train.judge is None:
        return None
    evaluated = {
        family: [study.section(family).strategies[:1], [study.tasks[family].eval_templates[0]]]
        for family in trained_ranking_families(study)
    }
    return {
        "asked": evaluated,
        "candidates": recipe.eval.candidates.model_dump(mode="json"),
        "reserved": recipe.eval.fusion.reserved,
        "options": {
            family: strategy_settings(study.section(family).strategies[0], recipe.eval) for family in evaluated
        },
    }


def _beam_search_settings(study: Study) -> list[object] | None:
    """Return the settings of the beam search that finds hard negatives, if there is one."""
    preference = study.recipe.train.preference
    if preference is None or preference.rejected != BEAM:
        return None
    return [{family: study.tasks[family].eval_templates[0] for family in study.shares}, study.recipe.eval.exact]


def _retriever_settings(recipe: Recipe) -> dict[str, object] | None:
    """Return the inputs of the ensemble that retrieves candidates, if there is one."""
    finder = ensemble_retriever(recipe)
    if finder is None:
        return None
    baselines = [
        [baseline.model_dump(mode="json"), input_hashes(baseline.name, baseline.parameters)]
        for baseline in finder.baselines
    ]
    return {"baselines": baselines, "reserved": finder.reserved, "seed": finder.seed}


def reusable_training(study: Study, base: str, folder: Path) -> dict[str, Any] | None:
    """Return the record of a finished training with unchanged inputs and an intact merged model."""
    done = read_stage(folder / "train.json", training_key(study, base), _parse_training_record)
    if done is None:
        return None
    merged = folder / "merged"
    if (merged / "config.json").is_file() and model_folder_hash(str(merged)) == done["merged_sha256"]:
        if done.get("code") != _training_code_digest(study):
            log.warning("training: llmrec has changed since %s was trained; remove %s to train again", merged, folder)
        return done
    if done["merged_sha256"] is not None:
        log.warning("training: %s was changed after training and is written again", merged)
    return None


def _unmerged_training(folder: Path, key: str) -> dict[str, Any] | None:
    """Return the record of a finished training whose adapter is not merged yet."""
    done = read_stage(folder / "train.json", key, _parse_training_record)
    adapter = folder / "adapter"
    if done is None or not adapter.is_dir() or weights_sha256(adapter) != done["adapter_sha256"]:
        return None
    log.warning("training: %s is complete; merging only", adapter)
    return done


def _parse_training_record(stored: Mapping[str, Any]) -> tuple[TrainingRecord, str]:
    """Return a stored training record and the hash of its weights."""
    return TrainingRecord.model_validate(stored), str(stored["merged_sha256"])


def train_stage(
    study: Study,
    encoder: Encoder,
    base: str,
    folder: Path,
    budget: StageTimer,
    *,
    teacher: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train and merge, or reuse a finished training; returns the section ``training`` of results.json."""
    done = reusable_training(study, base, folder) if not processes.rank() else None
    if done is not None:
        log.info("training: reusing %s", folder / "adapter")
        if processes.process_count() == 1:
            return done
    from llmrec.train.world import check_same_inputs, current_world

    world, key = current_world(), training_key(study, base)
    check_same_inputs(world, key, "training data, model or recipe")
    if world.agree(done is not None):
        return done or _read_shared_record(folder, key)
    if study.recipe.train.method in SOFT_PROMPT_METHODS:
        from llmrec.train.heads import soft_prompt_encoder

        encoder = soft_prompt_encoder(encoder, study.recipe.train)
    record = _unmerged_training(folder, key) if world.first else None
    if world.agree(record is not None):
        budget.add("train", record["seconds"] if record is not None else 0.0)
    else:
        record = _train_adapter(study, encoder, base, folder, budget, key, teacher=teacher, quiet=quiet)
    if record is not None:
        with budget.stage("merge"):
            _merge(study, encoder, base, folder)
        record["merged_sha256"] = model_folder_hash(str(folder / "merged"))
        write_checked_json(folder / "train.json", record)
    world.wait()
    return record or _read_shared_record(folder, key)


def _train_adapter(
    study: Study,
    encoder: Encoder,
    base: str,
    folder: Path,
    budget: StageTimer,
    key: str,
    *,
    teacher: str | None,
    quiet: bool,
) -> dict[str, Any] | None:
    """Train, and store the record before merging, so that an interrupted merge loses no training.

    Returns:
        The record; None in processes other than the first.
    """
    from llmrec.train.world import check_same_inputs, current_world

    world = current_world()
    if world.first:
        # The record must not describe weights of an interrupted run with other inputs.
        (folder / "train.json").unlink(missing_ok=True)
    with budget.stage("plan"):
        config = load_config(base, study.recipe.model)
        if world.first:
            check_memory(base, config, study.recipe.model, study.recipe.train)
        paired = is_encoder_decoder(config)
        planned = plan_training(study, encoder, paired=paired)
        release_backend()
        check_same_inputs(world, planned.steps.digest(), "training rows")
    with budget.stage("train"), convert_memory_errors("training", TRAINING_ADVICE, "train.batch_tokens"):
        judge = CheckpointEvaluator.of(study, encoder) if world.first else None
        if world.first:
            remove_foreign_checkpoints(folder, key)
        training = _train(study, encoder, base, folder, planned, teacher=teacher, judge=judge, quiet=quiet)
        release_memory()
    budget.add("train", training.seconds_before)
    if not world.first:
        return None
    facts = asdict(training)
    kept = facts.pop("kept_step")
    if judge is not None:
        with budget.stage("judge"):
            value = max(line["valid_ndcg"] for line in training.log if line["valid_ndcg"] is not None)
            users = len({case.request.user_id for case in judge.cases})
            facts["judged"] = {"family": judge.family, "users": users, "kept_step": kept, "value": value}
            facts["judged"]["controls"] = judge.controls()
    record = {
        "key": key,
        "code": _training_code_digest(study),
        "rows": dict(planned.rows),
        "shares": dict(study.shares),
        "loss_shares": dict(planned.loss_shares),
        "dropped": dict(planned.dropped),
        **facts,
        "merged_sha256": None,
    }
    write_checked_json(folder / "train.json", record)
    return record


def _read_shared_record(folder: Path, key: str) -> dict[str, Any]:
    """Return the training record written by the first process."""
    result = read_stage(folder / "train.json", key, _parse_training_record)
    if result is None:
        raise LlmrecError(
            f"{folder / 'train.json'} was written by the first process, but another process does not see it; put the "
            "run folder on storage that all machines share",
            kind="missing-file",
            at=folder,
        )
    return result


def _train(
    study: Study,
    encoder: Encoder,
    base: str,
    folder: Path,
    planned: TrainingPlan,
    *,
    teacher: str | None,
    judge: CheckpointEvaluator | None,
    quiet: bool,
) -> TrainingResult:
    from llmrec.train import lora, sft
    from llmrec.train.heads import head_vocabulary_size, load_distillation_loss, load_soft_prompt_model

    section = study.recipe.train
    names = study.index.vocabulary if study.index is not None else ()
    tokens = encoder.tokenizer.convert_tokens_to_ids(list(names))
    # seeds the random initial weights of adapters and heads
    require("torch", "train").manual_seed(study.training_seed)
    if planned.soft is not None:
        model = load_soft_prompt_model(base, study.recipe.model, section, encoder, planned.soft)
    else:
        model = lora.load_trainable(base, study.recipe.model, section, tokens=tokens)
    if study.recipe.model.whole_words:
        from llmrec.train.heads import add_whole_words

        add_whole_words(model, encoder, size=study.recipe.model.max_length + 1, seed=study.training_seed)
    head = _attach_rating_head(study, encoder, model, planned)
    taught = None
    if teacher is not None and section.teacher is not None:
        taught = load_distillation_loss(teacher, study.recipe.model, section.teacher, head_vocabulary_size(model))
    return sft.train(
        model,
        encoder,
        planned.steps,
        planned.valid,
        section,
        folder=folder,
        seed=study.training_seed,
        quiet=quiet,
        head=head,
        soft=planned.soft,
        listwise=listwise_settings(study),
        objective=reward_objective(study, encoder, planned) if section.reward is not None else None,
        taught=taught,
        items=tokens,
        device=device(study.recipe.model),
        judge=None if judge is None else judge.model,
    )


def _attach_rating_head(
    study: Study, encoder: Encoder, model: torch.nn.Module, planned: TrainingPlan
) -> RatingHead | None:
    """Attach the recipe's rating head to the model, initialised from the ratings of the planned examples."""
    classes = rating_head_classes(study, encoder)
    section = study.recipe.tasks.rating
    if classes is None or section is None or section.head is None:
        return None
    from llmrec.train.heads import attach_rating_head

    counts = classes.counts(row for step in planned.steps for row in step.rows)
    return attach_rating_head(model, classes.scale, alpha=section.head.alpha, counts=counts, frozen=section.head.frozen)


def _merge(study: Study, encoder: Encoder, base: str, folder: Path) -> None:
    from llmrec.train import lora

    with replace_atomically(folder / "merged") as draft:
        if study.recipe.train.method == "full":
            lora.save_full_model(folder / "adapter", study.recipe.model, draft)
        else:
            lora.merge_adapter(base, study.recipe.model, folder / "adapter", draft)
        copy_rating_head(folder / "adapter", draft)
        copy_whole_words(folder / "adapter", draft)
        copy_soft_prompt_files(folder / "adapter", draft)
        encoder.tokenizer.save_pretrained(draft)
        bundle.write(study, draft)
        if study.index is not None:
            study.index.save(draft / indexing.FOLDER)


def remove_foreign_checkpoints(folder: Path, key: str) -> None:
    """Remove the checkpoints of other recipes from a run folder."""
    from llmrec.train.checkpoint import checkpoint_folders

    mark = folder / "checkpoints" / "key"
    result = checkpoint_folders(folder / "checkpoints")
    if mark.is_file() and mark.read_text(encoding="utf-8") == key:
        return
    for checkpoint in result:
        shutil.rmtree(checkpoint)
    remove_tracker_runs(folder)
    write_text(mark, key)
