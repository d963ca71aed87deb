"""Each setting declares its stages: a change gives these, and no others, a new fingerprint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, cast, get_args, get_origin

import pytest
from pydantic import BaseModel

from llmrec.data.split import SplitDataset
from llmrec.fingerprint import Affects, Stage, affected_stages, code_digest, fingerprint, stage_settings
from llmrec.pipeline.engines import Engines
from llmrec.pipeline.evaluation import Evaluation
from llmrec.pipeline.resume import StageTimer
from llmrec.pipeline.row_specs import specs_for_arm
from llmrec.pipeline.study import build_study, load_split
from llmrec.pipeline.training import training_key
from llmrec.prompts.template import load_templates
from llmrec.recipe.schema import BaselineSection, Recipe, TrainSection
from llmrec.registry import BASELINES, METRICS
from llmrec.results import Arm
from tests.review_files import ITEMS, records, write

BASE: dict[str, Any] = {
    "name": "fingerprints",
    "model": {"name": "m"},
    "encoder": "chance",
    "data": {"source": "amazon-reviews", "path": "reviews.json", "noun": "tools"},
    "index": {"scheme": "semantic", "semantic": {"encoder": "chance", "levels": 1, "codes": 4}},
    "tasks": {
        "rating": {},
        "sequential": {"strategies": ["likelihood", "likelihood-prior"]},
        "direct": {"strategies": ["label", "permutation", "window", "pairwise", "setwise", "two-step"]},
        "explanation": {},
        "alignment": {"held_out": 0.5},
        "ctr": {},
        "review": {},
        "stars": {},
    },
    "eval": {"backend": "hf", "users": 5, "bootstrap": 50, "debias": "measured", "candidates": {"count": 3}},
    "augment": {},
}


def merged(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: merged(one[key], two[key]) for key in one.keys() & two.keys() if isinstance(two[key], dict)}
    return {**one, **two, **both}


# What a setting needs to be valid or to have an effect. The longest prefix of its key applies.
SFT = {"train": {"start": "runs/sft", "judge": {}}}
SEARCH = {
    "tasks": {"direct": None, "sequential": {"strategies": ["search"]}},
    "eval": {"candidates": {"kind": "catalogue"}},
}
CONTEXT: Mapping[str, dict[str, Any]] = {
    "model.shape": {"model": {"name": "new", "shape": {}}, "train": {"method": "full"}},
    "model.shape.head_width": {
        "model": {"name": "new", "shape": {"kind": "encoder-decoder"}},
        "train": {"method": "full"},
    },
    "index.first": {"index": {"scheme": "random"}},
    "index.digits": {"index": {"scheme": "random"}},
    "index.order": {"index": {"scheme": "sequential"}},
    "index.path": {"index": {"scheme": "external", "path": "codes.json"}},
    "index.ids": {"tasks": {"alignment": None}},
    "tasks.rating.head": {
        "tasks": {"rating": {"strategies": ["expected", "head"], "head": {}}},
        "train": {"only": ["rating"]},
    },
    "tasks.direct.loss": {"tasks": {"direct": {"templates": ["which-title"], "strategies": ["likelihood"]}}},
    "tasks.alignment.templates": {"tasks": {"alignment": {"eval_templates": []}}},
    "tasks.ctr.balance": {"tasks": {"alignment": None}, "data": {"split": {"kind": "last_share", "test": 0.6}}},
    "train.soft": {"train": {"method": "prompt"}},
    "train.mixture_limit": {"train": {"mixture": "proportional"}},
    "train.distill": {"train": {"exits": True}},
    "train.teacher": {"train": {"teacher": {"run": "runs/teacher"}}},
    "train.preference.label_smoothing": {"train": {"start": "runs/sft", "preference": {"loss": "dpo", "negatives": 1}}},
    "train.reward": merged(SFT, {"train": {"reward": {}}}),
    "train.reward.baseline": merged(SFT, {"train": {"reward": {"kind": "percentile", "baseline": "popularity"}}}),
    "train.reward.kind": SFT,
    "eval.server": {
        "eval": {"backend": "openai", "arms": ["zero-shot"], "server": {"model": "m", "price_in": 1.0}},
    },
    "eval.candidates.retriever": {"eval": {"candidates": {"kind": "retrieved", "retriever": "popularity"}}},
    "eval.fusion": {"eval": {"fusion": {"model_users": 3}}},
    **dict.fromkeys(("eval.beams", "eval.exact"), SEARCH),
    "index.semantic.repair": {"index": {"semantic": {"codes": 12}}},
    "train.softmax": {},
    "train.preference": {"train": {"start": "runs/sft", "preference": {"negatives": 1}}},
    "train.preference.rejected": {
        "tasks": {"direct": None},
        "train": {"start": "runs/sft", "preference": {"negatives": 1}},
    },
    "eval.split": {"tasks": {"alignment": None}},
}
# Other values that cannot be derived from the type of a setting.
OTHER: Mapping[str, Any] = {
    "prompts": ["more"],
    "encoder": "lsa",
    "model.shape.width": 256,
    "model.shape.heads": 8,
    "model.shape.dropout": 0.5,
    "index.scheme": "random",
    "index.collaborative.depth": 7,
    "index.category.fields": ["brand"],
    "index.path": "other.json",
    "tasks.ctr.per_user": 4,
    "tasks.ctr.strategies": ["parsed-yes-no"],
    "train.lora.targets": ["q_proj"],
    "train.only": ["rating"],
    "train.without": ["rating"],
    "train.softmax": "items",
    "train.preference.negatives": 2,
    "train.preference.rejected": "popularity",
    "train.reward.baseline": "item-knn",
    "train.reward.clip": 0.5,
    "train.report_to": ["wandb"],
    "train.micro_tokens": 64,
    "eval.backend": "fake",
    "eval.scorer": "fake",
    "eval.server.url": "http://127.0.0.1:9/v1",
    "eval.server.key_env": "KEY",
    "eval.server.extra": {"top_k": 1},
    "eval.candidates.retriever": "item-knn",
    "eval.fusion.model_users": 0,
    "eval.planned": [["a", "b"]],
    "eval.slices": ["name"],
    "eval.batch_tokens": 64,
    "augment.users": "user-topics",
    "augment.factors": ["mood"],
    "augment.topics": ["mood"],
    "augment.synthetic": "cold-item",
}
# These have only one value on the data of this test.
SINGLE = {
    "index.semantic.encoder",
    "index.semantic.fields",
    "tasks.alignment.baselines",
    "tasks.direct.profile.template",
    *(f"tasks.{family}.strategies" for family in ("explanation", "alignment", "review")),
}
TEMPLATES = {
    "rating": "list-with-fields",
    "sequential": "continue-list",
    "direct": "after-latest",
    "explanation": "name-item-both",
    "alignment": "title-to-code",
    "ctr": "judge-fit",
    "review": "user-headline",
    "stars": "text-stars",
}
# Stages that depend on another stage.
BEHIND: Mapping[Stage, frozenset[Stage]] = {
    "index": frozenset({"tokens", "train", "evaluate"}),
}


def listed(section: type[BaseModel], at: str = "", stages: Any = ()) -> Iterator[tuple[str, Any, frozenset[Stage]]]:
    """Yield the dotted key of every setting, its annotation, and the stages that it is declared to affect."""
    for name, field in section.model_fields.items():
        key, affected = f"{at}{name}", frozenset(affected_stages(section, name, stages))
        kinds = [each for each in (field.annotation, *get_args(field.annotation)) if isinstance(each, type)]
        nested = [each for each in kinds if issubclass(each, BaseModel) and each is not BaselineSection]
        if nested:
            yield from listed(nested[0], f"{key}.", affected)
        else:
            yield key, field.annotation, affected


SETTINGS = {key: (kind, stages) for key, kind, stages in listed(Recipe)}
ENTER_BY_CONTENT = ("data.", "reviews.")


def nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return cast("dict[str, Any]", value)


def read(recipe: Any, key: str) -> Any:
    for name in key.split("."):
        recipe = getattr(recipe, name) if recipe is not None else None
    return recipe


def other(key: str, kind: Any, value: Any) -> Any:
    """Return another value of a setting."""
    if key in OTHER:
        return OTHER[key]
    if isinstance(value, tuple) and len(value) > 1:
        return [each.name if isinstance(each, BaselineSection) else each for each in value[:-1]]
    if key.endswith("templates"):
        return [TEMPLATES[key.split(".")[1]]]
    if key.endswith(".arms"):
        return ["zero-shot"]
    if key.endswith(".weight"):
        return 0.0
    kinds = [kind, *(each for part in get_args(kind) for each in (part, *get_args(part)))]
    for each in kinds:
        if get_origin(each) is Literal:
            return next(choice for choice in get_args(each) if choice != value)
    if bool in kinds:
        return not value
    if int in kinds:
        return (value or 0) + 1
    if float in kinds:
        return (value or 0.0) / 2 + 0.1
    if str in kinds:
        return "another"
    raise AssertionError(f"{key}: name another value of {kind} in OTHER")


def left_out(key: str) -> set[str]:
    """Return the families that a setting does not concern, which are left out for speed."""
    section, family, name, *_ = *key.split("."), "", ""
    if section != "tasks":
        return set(BASE["tasks"]) - {"rating", "sequential", "direct"}
    # A recipe with one family must train and evaluate it.
    return set(BASE["tasks"]) - {family, *(("rating", "stars") if name in ("arms", "weight") else ())}


SPLITS: dict[tuple[str, int], SplitDataset] = {}


def observed(recipe: Recipe, folder: str) -> dict[str, Any]:
    """Return the fingerprints of all stages; those of rows by id."""
    loaded = (recipe.data.model_dump_json(), recipe.seed)
    if loaded not in SPLITS:
        SPLITS[loaded] = load_split(recipe.data, recipe.seed)
    study = build_study(recipe, SPLITS[loaded])
    evaluation = Evaluation(study, None, Path(folder), StageTimer(quiet=True), quiet=True)
    arms = ("baseline", *recipe.eval.arms)
    specs = [spec for arm in arms for spec in specs_for_arm(study, cast("Arm", arm))]
    tokenizer: Any = SimpleNamespace(digest="t", max_length=recipe.model.max_length)
    engines = Engines(recipe.model, recipe.eval, tokenizer, recipe.seed, StageTimer(quiet=True), None)
    chosen = [engines.engine_for(name, folder) for name in ("text", "likelihood")]
    return {
        "index": [
            replace(study.index, users={}, writes_ids=False).digest if study.index else None,
            stage_settings(recipe.index, "index") if recipe.index else None,
        ],
        "tokens": stage_settings(recipe, "tokens"),
        "train": training_key(study, folder),
        "rows": frozenset(spec.id for spec in specs),
        "evaluate": {spec.id: evaluation.key(spec, "e", None) for spec in specs if not spec.joins},
        "engine": [
            *chosen,
            *(engines.identity(name, "w") for name in ("hf", "vllm", *(["openai"] if recipe.eval.server else []))),
        ],
        "augment": stage_settings(recipe, "augment"),
    }


def changed(one: dict[str, Any], two: dict[str, Any]) -> set[str]:
    different = {stage for stage in one if stage != "evaluate" and one[stage] != two[stage]}
    rows = one["evaluate"].keys() & two["evaluate"].keys()
    return different | ({"evaluate"} if any(one["evaluate"][row] != two["evaluate"][row] for row in rows) else set())


TRIED = [key for key in SETTINGS if not key.startswith(ENTER_BY_CONTENT) and key not in SINGLE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with reviews, two tables of codes, and a base model without weights."""
    folder = tmp_path_factory.mktemp("fingerprints")
    (folder / "more").mkdir()
    write(folder / "reviews.json", records())
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    for name, first in (("codes", 0), ("other", 50)):
        codes = {f"B{item:02d}": [f"<a_{first + item}>"] for item in range(ITEMS)}
        (folder / f"{name}.json").write_text(json.dumps(codes), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", autouse=True)
def _templates() -> Iterator[None]:
    """Read templates only once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmrec.pipeline.study.load_templates", cache(load_templates))
        yield


@pytest.fixture(scope="module")
def known() -> dict[str, dict[str, Any]]:
    """Return the fingerprints before a change, by recipe."""
    return {}


@pytest.mark.parametrize("key", TRIED)
def test_setting_changes_its_declared_stages_only(
    key: str, folder: Path, known: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    kind, stages = SETTINGS[key]
    context = max((prefix for prefix in CONTEXT if key.startswith(prefix)), key=len, default="")
    first = merged(merged(BASE, {"tasks": dict.fromkeys(left_out(key))}), CONTEXT.get(context, {}))
    before = Recipe.model_validate(first)
    after = Recipe.model_validate(merged(first, nested(key, other(key, kind, read(before, key)))))
    assert read(before, key) != read(after, key)
    recipe = before.model_dump_json()
    if recipe not in known:
        known[recipe] = observed(before, str(folder))
    affected = changed(known[recipe], observed(after, str(folder)))
    behind = {each for stage in stages for each in BEHIND.get(stage, ())}
    assert stages - {"data"} <= affected <= stages | behind


def test_optional_setting_enters_only_if_changed() -> None:
    keys = {"optim", "use_liger_kernel", "torch_compile"}
    assert not keys & set(stage_settings(Recipe.model_validate(BASE).train, "train", inherited=["train"]))
    changed = TrainSection(optim="adafactor", use_liger_kernel=True, torch_compile=True)
    assert keys <= set(stage_settings(changed, "train", inherited=["train"]))
    assert not keys & set(stage_settings(changed, "evaluate", inherited=["train"]))


def test_data_enters_by_content() -> None:
    recipe = Recipe.model_validate(BASE)
    for stage in get_args(Stage):
        if stage != "data":
            assert not {"data", "reviews"} & stage_settings(recipe, stage).keys(), stage


def test_settings_inherit_stages_of_their_section() -> None:

    class Inner(BaseModel):
        size: int = 1
        shown: Annotated[bool, Affects()] = True

    class Outer(BaseModel):
        inner: Annotated[Inner, Affects("train")] = Inner()

    assert stage_settings(Outer(), "train") == {"inner": {"size": 1}} and stage_settings(Outer(), "evaluate") == {}


def test_code_digest_follows_imports() -> None:
    digests = {name: code_digest(entry.address.partition(":")[0]) for name, entry in BASELINES.items()}
    assert digests["ease"] != digests["sasrec"] and digests["markov"] == digests["markov-1"]
    assert code_digest("llmrec.metrics.ranking") == code_digest("llmrec.metrics.ranking", "llmrec.errors")
    assert code_digest("no.such", "llmrec.none") == code_digest()


def test_registry_entry_changes_its_fingerprints(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code digest does not cover the registry."""
    monkeypatch.chdir(folder)
    recipe = Recipe.model_validate(BASE)
    before = observed(recipe, str(folder))
    monkeypatch.setitem(cast("dict[str, Any]", METRICS), "RMSE", replace(METRICS["RMSE"], root=False))
    assert changed(before, observed(recipe, str(folder))) == {"evaluate"}
    entry = BASELINES["ease"]
    keys = {fingerprint("fit", made_by=[({"ease": each}, "ease")]) for each in (entry, replace(entry, needs="torch"))}
    assert len(keys) == 2
