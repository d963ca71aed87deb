"""What `llmrec prompts` shows: a recipe's templates, what each one shows and writes, and training rows of each."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

from jinja2 import Environment, nodes

from llmrec.backends.encode import Encoder
from llmrec.build.dryrun import marked
from llmrec.build.study import Study, build_task
from llmrec.errors import RecipeError, did_you_mean
from llmrec.prompts import Template
from llmrec.tasks.choice import Chosen, choose
from llmrec.types import Example

WIDTH = 80
_READER = Environment(autoescape=True)  # parses alone; what is parsed was checked against the grammar


def named(study: Study, names: Sequence[str] = (), sets: Sequence[str] = ()) -> list[Template]:
    """Return the templates of these names and sets, in the order of the families; all where none is named.

    Raises:
        RecipeError: If a name or a set is unknown, or two families have a template of the name.
    """
    every = [template for known in study.templates.values() for template in known.values()]
    if not names and not sets:
        return every
    wanted = {find(study, name).id for name in names}
    known_sets = sorted({name for template in every for name in template.sets})
    for name in sets:
        if name not in known_sets:
            raise RecipeError(
                f"unknown template set {name!r}{did_you_mean(name, known_sets)}; this recipe's families have "
                f"{', '.join(known_sets) or 'none'}"
            )
    return [template for template in every if template.id in wanted or not template.sets.keys().isdisjoint(sets)]


def find(study: Study, name: str) -> Template:
    """Return a template of the recipe's families by ``family/name``, or by its name where only one has it.

    Raises:
        RecipeError: If there is none, or several.
    """
    every = {template.id: template for known in study.templates.values() for template in known.values()}
    found = [template for template in every.values() if name in (template.id, template.name)]
    if len(found) > 1:
        raise RecipeError(f"template {name!r}: say which of {', '.join(template.id for template in found)}")
    if not found:
        family = name.rpartition("/")[0]
        if family and family not in study.templates:
            raise RecipeError(
                f"template {name!r}: this recipe has no family {family!r}{did_you_mean(family, study.templates)}; its "
                f"families are {', '.join(study.templates)}"
            )
        close = did_you_mean(name, [*every, *(template.name for template in every.values())])
        raise RecipeError(f"unknown template {name!r}{close}; `llmrec prompts RECIPE` lists those of its families")
    return found[0]


# --------------------------------------------------------------------------- the list


def lines(study: Study, templates: Sequence[Template]) -> Iterator[str]:
    """Yield what there is to know of templates, family by family, in lines of at most `WIDTH` columns."""
    for family in dict.fromkeys(template.family for template in templates):
        chosen = chosen_of(study, family)
        yield f"{family} templates"
        for template in templates:
            if template.family == family:
                yield from _about(template, chosen)
        yield ""


def chosen_of(study: Study, family: str) -> Chosen:
    """Return the templates that a recipe trains a family on and evaluates it with."""
    templates, reviews = study.templates[family], bool(study.task_data(family).dataset.reviews)
    return choose(study.tasks[family].family, study.section(family), templates, study.codes(family), reviews=reviews)


def _about(template: Template, chosen: Chosen) -> Iterator[str]:
    roles = ["trained on"] if template in chosen.train else []
    roles += ["evaluated with"] if template.name in chosen.evaluate else []
    facts = [
        f"version {template.version}",
        template.use,
        template.shape,
        *(f"set {name} {number}".rstrip() for name, number in template.sets.items()),
        f"needs {template.needs}" if template.needs else "",
        *roles,
    ]
    yield from _wrapped(f"  {template.id}  ", ", ".join(filter(None, facts)), hang=6)
    yield from _wrapped("      shows   ", ", ".join(fields(template, "system", "user", "lead")) or "nothing")
    yield from _wrapped("      writes  ", ", ".join(fields(template, "target")) or "always the same")
    if template.leak:
        yield from _wrapped("      leak    ", template.leak)
    if lacking := chosen.lacks(template):
        yield from _wrapped("      cannot be used here: it ", lacking, hang=14)


def fields(template: Template, *parts: str) -> list[str]:
    """Return the variables that parts of a template print or ask for, in order, such as ``history.title``."""
    found: dict[str, None] = {}
    for part in parts:
        for path in _paths(_READER.parse(getattr(template, part)), {}):
            found.setdefault(path)
    return [path for path in found if not any(other.startswith(f"{path}.") for other in found)]


def _paths(node: nodes.Node, bound: Mapping[str, str]) -> Iterator[str]:
    """Yield paths in the order of the text; ``bound`` names the list that a loop's own variable stands for."""
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
            yield from _paths(child, {**bound, node.target.name: node.iter.name})
    else:
        for child in node.iter_child_nodes():
            yield from _paths(child, bound)


def _wrapped(first: str, text: str, *, hang: int | None = None) -> list[str]:
    indent = " " * (len(first) if hang is None else hang)
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False)


# --------------------------------------------------------------------------- the rows


def rows(study: Study, template: Template) -> Iterator[Example]:
    """Yield training rows of one template, without end, whether or not the recipe trains on it.

    Raises:
        RecipeError: If the template does not fit the recipe.
    """
    # Evaluation stays as it is: some templates are learned and never asked with.
    asked = study.tasks[template.family].eval_templates
    section = study.section(template.family).model_copy(update={"templates": (template.name,), "eval_templates": asked})
    # The row is only shown: nothing learns from an unseen template.
    shown = replace(template, use="named") if template.use == "unseen" else template
    known = {**study.templates[template.family], template.name: shown}
    yield from build_task(study, template.family, section, known, study.training_seed).examples("train")


def rendered(study: Study, encoder: Encoder, templates: Sequence[Template], count: int) -> Iterator[str]:
    """Yield training rows of each template as the model reads them, or why there are none."""
    for template in templates:
        chosen = chosen_of(study, template.family)
        note = "" if template in chosen.train else ", not trained on here"
        head = f"[{template.id}{', unseen in training' if template.use == 'unseen' else note}]"
        if lacking := chosen.lacks(template):
            yield "\n".join(_wrapped(f"{head} ", f"cannot be used here: it {lacking}", hang=4))
            continue
        try:
            for example in islice(rows(study, template), count):
                yield f"{head}\n{marked(example, encoder)}"
        except RecipeError as error:
            yield "\n".join(_wrapped(f"{head} ", f"cannot be rendered here: {error}", hang=4))
