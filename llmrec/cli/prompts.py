"""The command `llmrec prompts`: templates of a recipe, rendered examples, and differences between templates."""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated

from jinja2 import Environment, nodes

from llmrec.answer.options import OptionHelp
from llmrec.backends.encode import Encoder
from llmrec.cli.console import say, show_prompts, store_facts
from llmrec.cli.options import RecipeOptions
from llmrec.errors import LlmrecError, RecipeError, did_you_mean
from llmrec.models.load import BUNDLE_FILE, resolve_model_folder
from llmrec.pipeline.row_specs import RowSpec, specs_for_arm
from llmrec.pipeline.study import Study, build_study, build_task, encoder_of
from llmrec.prompts.template import Template
from llmrec.prompts.words import ENGLISH
from llmrec.recipe.load import YAML_SUFFIXES, load_recipe
from llmrec.recipe.schema import Recipe
from llmrec.strategies.counting import count_prompts
from llmrec.tasks.task import Want
from llmrec.tasks.templates import TemplateSelection, select_task_templates
from llmrec.types import Example

WIDTH = 80
SHOWN_PROMPTS = 3
"""Number of prompts shown per task."""
_PARSER = Environment(autoescape=True)  # only parses; the template was validated when it was loaded


@dataclass(frozen=True, kw_only=True)
class PromptsOptions(RecipeOptions):
    """Options of `llmrec prompts`."""

    template: Annotated[
        tuple[str, ...],
        OptionHelp(
            names=("--template", "-t"),
            metavar="NAME|FILE",
            help="Show only this template, even if the recipe does not use it. Repeatable.",
        ),
    ] = ()
    sets: Annotated[
        tuple[str, ...],
        OptionHelp(
            names=("--set",), metavar="NAME", help="Show only the templates in this set, such as m6. Repeatable."
        ),
    ] = ()
    every: Annotated[
        bool,
        OptionHelp(names=("--all",), help="Describe every template and print three prompts per task."),
    ] = False
    evaluation: Annotated[
        bool,
        OptionHelp(
            names=("--eval",), help="Show evaluation prompts (with few-shot examples) instead of training prompts."
        ),
    ] = False
    user: Annotated[
        str | None, OptionHelp(metavar="ID", help="With --eval: the evaluated user (default: the first one).")
    ] = None
    diff: Annotated[
        tuple[str, str] | None,
        OptionHelp(metavar="A B", help="Compare two templates, or template A with its version in run folder B."),
    ] = None
    chat: Annotated[
        Path | None,
        OptionHelp(
            metavar="FILE",
            help="Write the training examples as chat messages (JSONL) for TRL, axolotl or LLaMA-Factory.",
        ),
    ] = None


def prompts(options: PromptsOptions) -> None:
    """Show the prompt templates and rendered prompts of a recipe.

    Lists the templates of the recipe and prints one training prompt per task, with the learned text in «these marks».
    --template also renders templates that the recipe does not train on. --eval prints the prompt of an evaluated
    request for each model of the results table.

    Example:
        llmrec prompts recipes/quickstart.yaml --all
    """
    recipe = load_recipe(options.recipe, options.overrides)
    recipe, template_names = add_template_files(recipe, options.template, Path(options.recipe).parent)
    study = build_study(recipe)
    if options.evaluation and (options.chat or options.every or options.diff):
        raise RecipeError(
            "--eval cannot be combined with --chat, --all or --diff; use --template or --set to select its templates",
            kind="contradiction",
            column="--eval",
        )
    if options.user is not None and not options.evaluation:
        raise RecipeError("--user selects an evaluation prompt; add --eval", kind="contradiction", column="--user")
    if options.chat is not None:
        if options.template or options.sets or options.every or options.diff:
            raise RecipeError(
                "--chat cannot be combined with --template, --set, --all or --diff; select templates with "
                "tasks.<family>.templates",
                kind="contradiction",
                column="--chat",
            )
        _write_chat_examples(study, options.chat)
        return
    chosen = select_templates(study, template_names, options.sets)
    alone = bool(options.template or options.sets)
    if options.evaluation:
        encoder = encoder_of(study, resolve_model_folder(recipe.model, seed=recipe.seed))
        show_prompts(evaluation_prompts(study, encoder, chosen, options.user))
        return
    if options.diff is None:
        store_facts(templates=chosen)
        detailed = options.every or alone
        for line in describe_templates(study, chosen) if detailed else template_name_lines(study):
            say(line)
        if not detailed:
            say("--all describes each template; --template NAME renders one\n")
    encoder = encoder_of(study, resolve_model_folder(recipe.model, seed=recipe.seed))
    if options.diff is not None:
        differences = list(compare_templates(study, encoder, *options.diff))
        store_facts(differences=differences)
        say("\n".join(differences))
    elif alone:
        show_prompts({template.id: [render_training_example(study, encoder, template)] for template in chosen})
    else:
        show_prompts(training_prompts_by_task(study, encoder, SHOWN_PROMPTS if options.every else 1))


def _write_chat_examples(study: Study, file: Path) -> None:
    from llmrec.pipeline.conversations import write_conversations

    done = write_conversations(study, file)
    store_facts(written=done)
    say(f"{file}: {done.rows:,} training examples in {done.steps:,} steps, in training order")
    if done.partly:
        say(
            f"{done.partly:,} examples continue lists: llmrec trains on {done.share:.0%} of their tokens, other "
            "trainers on all tokens"
        )
    if done.cut:
        say(f"{done.cut:,} examples are truncated at train.max_row_tokens")
    if done.dropped:
        say(f"{done.dropped:,} examples were excluded, because their answer is longer than train.max_row_tokens")
    if done.different:
        say(f"{done.different:,} examples have different tokens if the chat template of the model includes the answer")


def add_template_files(recipe: Recipe, names: Sequence[str], folder: Path) -> tuple[Recipe, list[str]]:
    """Add template files to a recipe, and return it with the names of all templates.

    Args:
        recipe: The recipe.
        names: Names of templates, or paths of their files in the working folder or in ``folder``.
        folder: The folder of the recipe.

    Raises:
        RecipeError: If a file is missing.
    """
    known, result = [Path(entry).resolve() for entry in recipe.prompts], list[str]()
    for name in names:
        if not name.lower().endswith(YAML_SUFFIXES):
            result.append(name)
            continue
        file = next((entry for entry in (Path(name).expanduser(), folder / name) if entry.is_file()), None)
        if file is None:
            raise RecipeError(
                f"template {name!r}: no such file in the working directory or the folder of the recipe; check the path",
                kind="missing-file",
                at=name,
            )
        file = file.resolve()
        if not any(entry == file or entry in file.parents for entry in known):
            known.append(file)
        result.append(file.stem)
    return recipe.model_copy(update={"prompts": tuple(map(str, known))}), result


def select_templates(study: Study, names: Sequence[str] = (), sets: Sequence[str] = ()) -> list[Template]:
    """Return the templates with these names or in these sets, sorted by task; all if none is given.

    Raises:
        RecipeError: If a name or a set is unknown, or a name belongs to templates of two families.
    """
    every = [template for known in study.templates.values() for template in known.values()]
    if not names and not sets:
        return every
    ids = {find_template(study, name).id for name in names}
    known_sets = sorted({name for template in every for name in template.sets})
    for name in sets:
        if name not in known_sets:
            raise RecipeError(
                f"unknown template set {name!r}{did_you_mean(name, known_sets)}; the sets of this recipe are "
                f"{', '.join(known_sets) or 'none'}",
                kind="unknown-name",
            )
    return [template for template in every if template.id in ids or not template.sets.keys().isdisjoint(sets)]


def find_template(study: Study, name: str) -> Template:
    """Return a template by ``family/name``, or by a name that is unique among the tasks of the recipe.

    Raises:
        RecipeError: If there is none, or several.
    """
    every = {template.id: template for known in study.templates.values() for template in known.values()}
    result = [template for template in every.values() if name in (template.id, template.name)]
    if len(result) > 1:
        raise RecipeError(
            f"template {name!r}: several tasks have a template of this name; choose one of "
            f"{', '.join(template.id for template in result)}",
            kind="ambiguous",
            at=name,
        )
    if not result:
        family = name.rpartition("/")[0]
        if family and family not in study.templates:
            raise RecipeError(
                f"template {name!r}: this recipe has no task {family!r}{did_you_mean(family, study.templates)}; its "
                f"tasks are {', '.join(study.templates)}",
                kind="unknown-name",
            )
        close = did_you_mean(name, [*every, *(template.name for template in every.values())])
        raise RecipeError(
            f"unknown template {name!r}{close}; `llmrec prompts RECIPE` lists the templates of its tasks",
            kind="unknown-name",
            at=name,
        )
    return result[0]


# --------------------------------------------------------------------------- list of templates


def describe_templates(study: Study, templates: Sequence[Template]) -> Iterator[str]:
    """Yield descriptions of templates, grouped by task, in lines of at most `WIDTH` columns."""
    for family in dict.fromkeys(template.family for template in templates):
        chosen = template_selection(study, family)
        yield f"{family} templates"
        for template in templates:
            if template.family == family:
                yield from _describe_template(template, chosen)
        yield ""


def template_name_lines(study: Study) -> Iterator[str]:
    """Yield the templates of a recipe by task, first the templates that it uses."""
    for family, known in study.templates.items():
        chosen = template_selection(study, family)
        used = {template.id: _template_roles(template, chosen) for template in known.values()}
        width = max((len(name) for name, roles in used.items() if roles), default=0)
        yield f"{family} templates"
        yield from (f"  {name:{width}}  {', '.join(roles)}" for name, roles in used.items() if roles)
        if others := [template.name for template in known.values() if not used[template.id]]:
            yield from _wrap_text("  not used: ", ", ".join(others), hang=4)
        yield ""


def _template_roles(template: Template, chosen: TemplateSelection) -> list[str]:
    roles = ["trained on"] if template in chosen.train else []
    return [*roles, "evaluated with"] if template.name in chosen.evaluate else roles


def template_selection(study: Study, family: str) -> TemplateSelection:
    """Return the templates with which a recipe trains and evaluates a task."""
    templates, reviews = study.templates[family], bool(study.task_data(family).dataset.reviews)
    return select_task_templates(
        study.tasks[family].family, study.section(family), templates, study.codes(family), reviews=reviews
    )


def _describe_template(template: Template, chosen: TemplateSelection) -> Iterator[str]:
    facts = [
        f"version {template.version}",
        template.use,
        template.shape,
        f"in {template.language}" if template.language != ENGLISH else "",
        *(f"set {name} {number}".rstrip() for name, number in template.sets.items()),
        f"needs {template.needs}" if template.needs else "",
        *_template_roles(template, chosen),
    ]
    yield from _wrap_text(f"  {template.id}  ", ", ".join(filter(None, facts)), hang=6)
    yield from _wrap_text(
        "      shows   ", ", ".join(template_variables(template, "system", "user", "lead")) or "nothing"
    )
    yield from _wrap_text("      writes  ", ", ".join(template_variables(template, "target")) or "always the same")
    if template.leak:
        yield from _wrap_text("      leak    ", template.leak)
    if lacking := chosen.lacks(template):
        yield from _wrap_text("      cannot be used here: it ", lacking, hang=14)


def template_variables(template: Template, *parts: str) -> list[str]:
    """Return the variables that a template prints or tests, in order, such as ``history.title``."""
    result: dict[str, None] = {}
    for part in parts:
        for path in _variable_paths(_PARSER.parse(getattr(template, part)), {}):
            result.setdefault(path)
    return [path for path in result if not any(other.startswith(f"{path}.") for other in result)]


def _variable_paths(node: nodes.Node, bound: Mapping[str, str]) -> Iterator[str]:
    """Yield the variables in order; ``bound`` maps a loop variable to its list."""
    if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name):
        owner = node.node.name
        if owner != "loop":
            yield f"{bound.get(owner, owner)}.{node.attr}"
    elif isinstance(node, nodes.Name):
        if node.name not in bound:
            yield node.name
    elif isinstance(node, nodes.For) and isinstance(node.iter, nodes.Name) and isinstance(node.target, nodes.Name):
        yield node.iter.name
        for child in (*node.body, *node.else_):
            yield from _variable_paths(child, {**bound, node.target.name: node.iter.name})
    else:
        for child in node.iter_child_nodes():
            yield from _variable_paths(child, bound)


def _wrap_text(first: str, text: str, *, hang: int | None = None) -> list[str]:
    indent = " " * (len(first) if hang is None else hang)
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False)


# --------------------------------------------------------------------------- training examples


def iterate_examples(study: Study, template: Template) -> Iterator[Example]:
    """Yield training examples of a template endlessly, even if the recipe does not train on it.

    Raises:
        RecipeError: If the template is incompatible with the recipe.
    """
    # evaluation is unchanged, because some templates are only for training
    same = study.tasks[template.family].eval_templates
    section = study.section(template.family).model_copy(update={"templates": (template.name,), "eval_templates": same})
    # The example is only displayed, so templates not used in training are allowed.
    shown = replace(template, use="named") if template.use == "unseen" else template
    known = {**study.templates[template.family], template.name: shown}
    yield from build_task(study, template.family, section, known, study.training_seed).examples("train")


def training_prompts_by_task(study: Study, encoder: Encoder, count: int = SHOWN_PROMPTS) -> dict[str, list[str]]:
    """Return rendered training prompts with answers by task, starting with one of each template."""
    shown: dict[str, list[str]] = {}
    for family in study.tasks:
        first: dict[str, str] = {}
        more: list[str] = []
        for example in islice(study.training_examples(family), 64):
            text = f"[{example.template}]\n{format_marked_example(example, encoder)}"
            if example.template in first:
                more.append(text)
            else:
                first[example.template] = text
        shown[family] = [*first.values(), *more][:count]
    return shown


def evaluation_prompts(
    study: Study, encoder: Encoder, templates: Sequence[Template], user: str | None = None
) -> dict[str, list[str]]:
    """Return an evaluation prompt of each model, without duplicates.

    Of a strategy that asks several questions per request, it is a question of the form and size that it asks.

    Args:
        study: The study.
        encoder: Renders the prompts.
        templates: The templates whose rows are shown.
        user: The evaluated user; None: the first one of each task.

    Raises:
        RecipeError: If the recipe evaluates none of the templates with a language model, or not this user.
    """
    ids, result = {template.id for template in templates}, dict[str, list[str]]()
    for arm in study.recipe.eval.arms:
        for spec in specs_for_arm(study, arm):
            if spec.template is not None and spec.template.id in ids and not spec.joins:
                result.setdefault(_render_evaluation_prompt(study, encoder, spec, spec.template, user), []).append(
                    spec.id
                )
    if not result:
        raise RecipeError(
            "no evaluation prompt to show: the recipe evaluates none of these templates; add them to "
            "tasks.<family>.eval_templates, and set eval.arms",
            kind="empty",
        )
    return {rows[0]: [f"[{', '.join(rows)}]\n{text}"] for text, rows in result.items()}


def _render_evaluation_prompt(
    study: Study, encoder: Encoder, spec: RowSpec, template: Template, user: str | None
) -> str:
    task, section = study.tasks[spec.family], study.recipe.eval
    requests = [case.request for case in study.cases(spec.family)]
    request = next((entry for entry in requests if user in (None, entry.user_id)), None)
    if request is None:
        raise RecipeError(
            f"--user: {user!r} is not among the {len(requests)} evaluated requests of {spec.family}; use a user_id of "
            "the test users, or increase eval.users",
            kind="unknown-name",
            at=user,
            column="--user",
        )
    if spec.predictor == "two-step":
        return encoder.text(task.profile_prompt(request))
    candidates = request.candidates or ()
    plan = count_prompts(spec.predictor, len(candidates), section) if candidates else None
    if plan is None:
        want: Want = "ranking" if spec.predictor == "list" else "one"
        return encoder.text(task.prompt(request, template=template.name, shots=spec.shots, want=want))
    part = replace(request, candidates=candidates[: plan.size])
    return encoder.text(task.prompt(part, template=template.name, shots=spec.shots, want=plan.want))


def format_marked_example(example: Example, encoder: Encoder) -> str:
    """Return an example as the model reads it, with training targets in «these marks»."""
    answer = "".join(f"«{s.text}»" if s.kind == "target" else s.text for s in example.answer)
    return encoder.turns_text(example.messages) + answer


def render_training_example(study: Study, encoder: Encoder, template: Template) -> str:
    """Return a rendered training example of a template, or the reason why there is none."""
    chosen = template_selection(study, template.family)
    note = "" if template in chosen.train else ", not trained on here"
    head = f"[{template.id}{', unseen in training' if template.use == 'unseen' else note}]"
    if lacking := chosen.lacks(template):
        return "\n".join(_wrap_text(f"{head} ", f"cannot be used here: it {lacking}", hang=4))
    try:
        return f"{head}\n{format_marked_example(next(iterate_examples(study, template)), encoder)}"
    except RecipeError as error:
        return "\n".join(_wrap_text(f"{head} ", f"cannot be rendered here: {error}", hang=4))


_FACTS = ("version", "use", "shape")
# A run folder stores the text of a template, but not its description.
_NOTES = ("set", "number", "also", "leak", "needs")
_PARTS = ("system", "user", "lead", "target", "tail")
# Number of examples per template to search for a common interaction: a few passes over the users of MovieLens-100K.
_MAX_SEARCHED_EXAMPLES = 4000


def compare_templates(study: Study, encoder: Encoder, first: str, second: str) -> Iterator[str]:
    """Yield the differences between two templates of a task, in lines of at most `WIDTH` columns.

    Args:
        study: The study with the templates, and the data for the prompts.
        encoder: Renders the prompts.
        first: A template's name.
        second: Another template's name, or the folder of a run that trained with an earlier version of the first.

    Raises:
        RecipeError: If a name is unknown, the two are of different families, or the folder records no such template.
    """
    one, folder = find_template(study, first), Path(second).expanduser()
    stored = folder.is_dir()
    other = read_stored_template(folder, one) if stored else find_template(study, second)
    if one.family != other.family:
        raise RecipeError(
            f"{one.id} and {other.id} belong to different tasks; compare templates of one task", kind="contradiction"
        )
    # The diff goes from the older to the newer template.
    left, right = (other, one) if stored else (one, other)
    yield f"- {left.id}{f', as trained in {second}' if stored else ''}"
    yield f"+ {right.id}{', as it is now' if stored else ''}"
    yield ""
    yield from diff_template_parts(left, right, notes=not stored)
    yield from _diff_prompts(study, encoder, left, right)


def read_stored_template(folder: Path, template: Template) -> Template:
    """Return a template as stored in a run folder or an exported folder.

    Raises:
        RecipeError: If the folder has no record of it.
    """
    files = [file for file in (folder / "merged" / BUNDLE_FILE, folder / BUNDLE_FILE) if file.is_file()]
    if not files:
        raise RecipeError.at(
            folder,
            "missing-file",
            f" has no {BUNDLE_FILE}, which records the templates used in training; give a run folder with "
            "finished training, or an exported folder",
        )
    try:
        entries = {
            entry["name"]: entry for entry in json.loads(files[0].read_text("utf-8"))["templates"][template.family]
        }
        if template.name not in entries:
            raise RecipeError.at(
                files[0],
                "missing-key",
                f" records no template {template.id}{did_you_mean(template.name, entries)}; its templates "
                f"are {', '.join(entries)}",
            )
        return Template.of_stored(entries[template.name])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError.at(
            files[0],
            "damaged",
            f" records no templates of {template.family} that can be read ({type(error).__name__}: "
            f"{error}); give the folder of a run that trained this task",
        ) from error


# --------------------------------------------------------------------------- template sources


def diff_template_parts(left: Template, right: Template, *, notes: bool = True) -> Iterator[str]:
    """Yield a unified diff of each part that differs, and the names of equal parts."""
    same = []
    for key in (*_FACTS, *(_NOTES if notes else ()), *_PARTS):
        one, other = (str(getattr(template, key)) for template in (left, right))
        if one == other:
            same += [key] if one else []
        elif key in _PARTS:
            yield key
            yield from _unified_diff(one.splitlines(), other.splitlines())
        else:
            yield f"{key}: {one or 'none'} -> {other or 'none'}"
    if same:
        yield from textwrap.wrap(f"the same in both: {', '.join(same)}", WIDTH, subsequent_indent="  ")
    yield ""


def _unified_diff(left: Sequence[str], right: Sequence[str], context: int = 3) -> Iterator[str]:
    """Yield a unified diff without headers; long lines are wrapped and indented."""
    for line in islice(difflib.unified_diff(left, right, n=context, lineterm=""), 2, None):
        if line.startswith("@@"):
            continue
        mark, text = line[0], line[1:]
        pieces = textwrap.wrap(text, WIDTH - 4, drop_whitespace=False, break_on_hyphens=False) or [""]
        yield f"  {mark} {pieces[0]}".rstrip()
        yield from (f"  {mark}   {piece}".rstrip() for piece in pieces[1:])


# --------------------------------------------------------------------------- prompts


def _diff_prompts(study: Study, encoder: Encoder, left: Template, right: Template) -> Iterator[str]:
    chosen = template_selection(study, left.family)
    lacking = next((f"{entry.id} {chosen.lacks(entry)}" for entry in (left, right) if chosen.lacks(entry)), "")
    try:
        pair = None if lacking else _find_common_examples(study, left, right)
    except LlmrecError as error:
        lacking, pair = str(error), None
    if pair is None:
        why = lacking or f"no training target is common to the first {_MAX_SEARCHED_EXAMPLES} examples of both"
        yield from textwrap.wrap(f"The prompts are not compared: {why}", WIDTH, subsequent_indent="  ")
        return
    one, other = pair
    user, item = one.pairs[-1] if one.pairs else (one.user_id, "")
    about = "".join(f", {name} {value}" for name, value in (("user", user), ("item", item)) if value)
    yield f"The prompt of a training example{about}"
    before, after = (format_marked_example(example, encoder).split("\n") for example in (one, other))
    if before == after:
        yield "  the same in both"
    yield from _unified_diff(before, after, context=max(len(before), len(after)))


def _find_common_examples(study: Study, left: Template, right: Template) -> tuple[Example, Example] | None:
    """Return an example of each template with the same interaction as last target; None if there is none.

    Templates of one shape draw the same events in the same order; a list and a chat template may not.
    """
    first: dict[tuple[str, ...], Example] = {}
    second: dict[tuple[str, ...], Example] = {}
    for one, other in islice(
        zip(iterate_examples(study, left), iterate_examples(study, right), strict=False), _MAX_SEARCHED_EXAMPLES
    ):
        first.setdefault(_target_event(one), one)
        second.setdefault(_target_event(other), other)
        for key in (_target_event(one), _target_event(other)):
            if key in first and key in second:
                return first[key], second[key]
    return None


def _target_event(example: Example) -> tuple[str, ...]:
    """Return the interaction of an example's last target; for alignment, the id of the example."""
    return example.pairs[-1] if example.pairs else (example.id,)
