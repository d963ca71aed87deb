"""`llmrec prompts`: the list of templates, rows of any template, and the diff of two."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmrec.backends.encode import Encoder
from llmrec.cli import prompts
from llmrec.cli.main import app
from llmrec.cli.prompts import (
    WIDTH,
    describe_templates,
    evaluation_prompts,
    find_template,
    iterate_examples,
    render_training_example,
    select_templates,
    template_variables,
)
from llmrec.errors import RecipeError
from llmrec.models.load import BUNDLE_FILE
from llmrec.pipeline import bundle
from llmrec.pipeline.study import Study, build_study
from llmrec.prompts.template import load_templates
from llmrec.recipe.load import load_recipe
from tests.facts import Facts, raises

SETTINGS = (
    "data={source: made-reviews, noun: products}",
    "reviews=null",
    "eval.candidates.count=5",
    "tasks.rating.templates=[rate-next]",
    "tasks.rating.eval_templates=[rate-next, judge-one]",
)


@pytest.fixture(scope="module")
def study() -> Study:
    return build_study(load_recipe("recipes/movielens-100k/four-tasks.yaml", SETTINGS))


def block(study: Study, name: str) -> str:
    """The entry of one template in the list, with single spaces."""
    return " ".join(" ".join(describe_templates(study, [find_template(study, name)])).split())


def test_lists_have_every_template_and_fit_a_terminal(study: Study) -> None:
    listed = list(describe_templates(study, select_templates(study)))
    for known in study.templates.values():
        for template in known.values():
            assert sum(line.startswith(f"  {template.id} ") for line in listed) == 1
    assert max(map(len, listed)) <= WIDTH
    short = list(prompts.template_name_lines(study))
    words = " ".join(short).replace(",", " ").split()
    for known in study.templates.values():
        for template in known.values():
            assert template.name in words or template.id in words
    assert ["rating/judge-one", "evaluated", "with"] in [line.split() for line in short]
    assert max(map(len, short)) <= WIDTH and len(short) < 40


def test_entries_of_the_list(study: Study) -> None:
    assert block(study, "rate-next").startswith(
        "rating templates rating/rate-next version 1, seen, chat, trained on, evaluated with shows noun, scale_low"
    )
    assert "version 1, unseen, chat, evaluated with shows" in block(study, "judge-one")
    assert "version 1, seen, list shows" in block(study, "list-ratings")
    assert "named, chat, set m6 shows" in block(study, "m6-rate")
    output = block(study, "m6-rate")
    for field in ("user_stats.count", "history.title", "history.rating", "item_stats.mean", "item.title"):
        assert field in output
    assert output.endswith("writes rating")
    assert "leak where there is a rating" in block(study, "with-rating")
    assert "cannot be used here: it shows item codes, but there is no index" in block(study, "next-code")
    missing = block(study, "name-title-headline")
    assert "needs reviews" in missing and "cannot be used here: it shows parts of reviews" in missing
    assert "cannot be used" not in block(study, "m6-rate")
    by_taste = load_templates("ctr")["by-taste"]
    assert template_variables(by_taste, "user") == [
        "noun",
        "liked.title",
        "disliked.title",
        "item.title",
        "fields.value",
    ]
    assert template_variables(by_taste, "target") == ["answer"]
    assert template_variables(by_taste, "system") == []


def test_filter_by_names_and_sets(study: Study) -> None:
    assert [t.id for t in select_templates(study, ["rating/m6-rate", "plain"])] == [
        "rating/m6-rate",
        "explanation/plain",
    ]
    chosen = select_templates(study, ["rate-next"], ["m6"])
    assert {t.set for t in chosen} == {"", "m6"} and chosen[0].id == "rating/rate-next"
    assert {t.family for t in chosen} == {"rating", "sequential", "direct", "explanation"}


@pytest.mark.parametrize(
    ("names", "sets", "parts"),
    [
        (["rate-nxt"], [], ("rate-nxt", "did you mean 'rate-next'")),
        (["one-history"], [], ("choose one of", "rating/one-history", "sequential/one-history")),
        (["ctr/by-taste"], [], ("no task 'ctr'", "rating, ")),
        ([], ["m-6"], ("unknown template set 'm-6'", "did you mean 'm6'")),
    ],
)
def test_rejects_unknown_names(study: Study, names: list[str], sets: list[str], parts: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError) as caught:
        select_templates(study, names, sets)
    assert all(part in str(caught.value) for part in parts)


def test_rows_of_templates(study: Study, encoder: Encoder) -> None:
    templates = [
        find_template(study, name) for name in ("m6-rate", "judge-one", "next-code", "m6-choose", "whether-name-title")
    ]
    named_one, unseen, coded, labelled, learned = (
        render_training_example(study, encoder, template) for template in templates
    )
    assert named_one.startswith("[rating/m6-rate, not trained on here]\n") and "«" in named_one
    assert unseen.startswith("[rating/judge-one, unseen in training]\n") and "«" in unseen
    assert coded.startswith("[sequential/next-code, not trained on here] cannot be used here: it shows item\n")
    assert "«" not in coded
    assert labelled.startswith("[direct/m6-choose, not trained on here]\n") and "On offer:" in labelled
    # Only training uses this template.
    assert learned.startswith("[rating/whether-name-title, not trained on here]\n") and "«" in learned
    trained = islice(study.training_tasks["rating"].examples("train"), 20)
    assert list(islice(iterate_examples(study, find_template(study, "rate-next")), 20)) == list(trained)


def test_template_that_does_not_fit_has_a_reason(encoder: Encoder) -> None:
    summary = build_study(
        load_recipe("recipes/movielens-100k/four-tasks.yaml", [*SETTINGS[:-1], "tasks.rating.past=summary"])
    )
    text = render_training_example(summary, encoder, find_template(summary, "score-one"))
    assert "cannot be rendered here: tasks: past=summary" in " ".join(text.split())


def test_diff_of_parts_and_of_a_prompt(study: Study, encoder: Encoder) -> None:
    output = list(prompts.compare_templates(study, encoder, "rate-next", "m6-rate"))
    assert output[:2] == ["- rating/rate-next", "+ rating/m6-rate"]
    assert "use: seen -> named" in output and "set: none -> m6" in output
    assert "the same in both: version, shape, target" in output
    assert any(line.startswith("  - Predict how a user rates") for line in output)
    prompt = output[[line.startswith("The prompt of a training example") for line in output].index(True) :]
    assert any(line.startswith("  - What rating does") for line in prompt)
    assert any(line.startswith("  + To be rated: ") for line in prompt)
    assert sum("«" in line for line in prompt) == 1
    assert max(map(len, output)) <= WIDTH + 4


def test_diff_of_sources_without_prompts(study: Study, encoder: Encoder) -> None:
    output = " ".join(" ".join(prompts.compare_templates(study, encoder, "next-title", "next-code")).split())
    assert "The prompts are not compared: sequential/next-code shows item codes" in output
    assert "target - {{ item.title }} + {{ item.code }}" in output
    with raises(RecipeError, Facts("contradiction", says=("rating/rate-next", "sequential/next-title"))):
        list(prompts.compare_templates(study, encoder, "rate-next", "next-title"))


def test_diff_with_the_template_of_a_run(study: Study, encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    with raises(RecipeError, Facts("missing-file", tmp_path, says=BUNDLE_FILE)):
        list(prompts.compare_templates(study, encoder, "rate-next", str(tmp_path)))
    known = study.templates["rating"]
    older = {**known, "rate-next": replace(known["rate-next"], user="Rate {{ item.title }}.", version=7)}
    bundle.write(replace(study, templates={**study.templates, "rating": older}), tmp_path / "merged")
    output = list(prompts.compare_templates(study, encoder, "rate-next", str(tmp_path)))
    assert output[:2] == [f"- rating/rate-next, as trained in {tmp_path}", "+ rating/rate-next, as it is now"]
    assert "version: 7 -> 1" in output and "  - Rate {{ item.title }}." in output
    assert any(line.startswith("  - Rate ") and "{" not in line for line in output)
    # Keys that the run folder does not store are not reported as differences.
    assert not any(line.startswith(("set:", "leak:")) for line in output)
    file = tmp_path / "merged" / BUNDLE_FILE
    stored = json.loads(file.read_text("utf-8"))
    stored["templates"]["rating"] = [t for t in stored["templates"]["rating"] if t["name"] != "rate-next"]
    file.write_text(json.dumps(stored), "utf-8")
    with raises(RecipeError, Facts("missing-key", file, says=("rating/rate-next", "its templates are list-ratings"))):
        list(prompts.compare_templates(study, encoder, "rate-next", str(tmp_path)))
    file.write_text("[]", "utf-8")
    with raises(RecipeError, Facts("damaged", file, says="rating")):
        list(prompts.compare_templates(study, encoder, "rate-next", str(tmp_path)))


def test_evaluation_prompts_of_a_case(encoder: Encoder) -> None:
    strategies = "tasks.direct.strategies=[label, list, pointwise-yes]"
    study = build_study(load_recipe("recipes/movielens-100k/four-tasks.yaml", [*SETTINGS, strategies]))
    shown = evaluation_prompts(study, encoder, select_templates(study, ["rate-next", "continue-list", "after-history"]))
    case, task = study.cases("sequential")[0], study.tasks["sequential"]
    for arm, shots in (("zero-shot", 0), ("few-shot", 1)):
        (text,) = shown[f"sequential/{arm}/likelihood/continue-list"]
        request = encoder.text(task.prompt(case.request, template="continue-list", shots=shots))
        assert text.partition("\n")[2] == request
    assert "tuned" in shown["sequential/zero-shot/likelihood/continue-list"][0].partition("\n")[0]
    one, complete, yes = (
        shown[f"direct/zero-shot/{name}/after-history"][0] for name in ("label", "list", "pointwise-yes")
    )
    assert "Answer with its label." in one and "Order all labels" in complete
    assert "Answer Yes or No." in yes and "\nA. " in yes and "\nB. " not in yes
    assert {row.partition("/")[0] for row in shown} == {"sequential", "direct", "rating"}
    with pytest.raises(RecipeError, match="no evaluation prompt to show"):
        evaluation_prompts(study, encoder, select_templates(study, ["m6-rate"]))
    other = study.cases("sequential")[1]
    assert other.request.user_id != case.request.user_id
    row = "sequential/few-shot/likelihood/continue-list"
    (text,) = evaluation_prompts(study, encoder, select_templates(study, ["continue-list"]), other.request.user_id)[row]
    assert text.partition("\n")[2] == encoder.text(task.prompt(other.request, template="continue-list", shots=1))
    with pytest.raises(RecipeError, match="not among"):
        evaluation_prompts(study, encoder, select_templates(study, ["continue-list"]), "nobody")


def command(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["prompts", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_command_lists_renders_and_compares(llama_folder: Path) -> None:
    recipe = ["recipes/movielens-100k/four-tasks.yaml", *SETTINGS, f"model.name={llama_folder}", "model.dtype=float32"]
    complete = command(*recipe)
    assert "direct templates\n" in complete and complete.count("\n[") == 4 and "\x1b" not in complete
    alone = command(*recipe, "--template", "rate-next", "--set", "m6")
    assert alone.count("[rating/m6-rate, not trained on here]\n") == alone.count("[rating/rate-next]\n") == 1
    assert "rating/list-ratings" not in alone
    request = command(*recipe, "--eval", "-t", "rating/rate-next")
    assert request.startswith("[rating/zero-shot/expected/rate-next, ") and "«" not in request
    compared = command(*recipe, "--diff", "rate-next", "m6-rate")
    assert compared.startswith("- rating/rate-next\n+ rating/m6-rate\n")
