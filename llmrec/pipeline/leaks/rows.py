"""Looks for held-out data in what is rendered: training rows, few-shot examples and questions.

Two kinds of checks. The one reads rows and prompts and looks for held-out pairs, titles and texts. The other draws
what is held out anew, makes the same rows and examples from that, and requires the same bytes: what is held out must
not even say what is *not* shown.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count as numbers
from itertools import islice, zip_longest

from llmrec.data.described import NAMED
from llmrec.data.split import SplitDataset
from llmrec.index.table import ItemIndex
from llmrec.pipeline.leaks.checks import Check, redrawn, verdict
from llmrec.pipeline.study import Study, build_task
from llmrec.prompts.template import Template, clean
from llmrec.registry import is_positional
from llmrec.tasks.direct_answers import asks_for
from llmrec.tasks.family import Family, family_of
from llmrec.tasks.pool import training_examples
from llmrec.tasks.task import Task, Want
from llmrec.train.branches import Branching
from llmrec.train.reward.questions import question
from llmrec.types import Case, Example, Message, Prompt, Request, Segment

# A text this short ("good", "love it") is written by many people about many things.
_TELLING = 24
# Of longer texts the beginning is looked for: prompts cut them.
_TEXT = 120
# How a template names the one item that it asks about.
_TITLES, _CODES = re.compile(r"\bitem\.title\b"), re.compile(r"\bitem(?:\.code|_id)\b")
# Rows of a family and requests that are made again from other held-out data.
_ROWS, _REQUESTS = 5000, 200


class _Secrets:
    """What must not be shown about a user: titles and texts of what is held out, less what training tells anyway.

    With an index, for templates that write codes, it is codes and not titles.
    """

    def __init__(self, data: SplitDataset, index: ItemIndex | None = None) -> None:
        items = data.dataset.items
        written = data.dataset.titles if index is None else {item: clean(index.encode(item)) for item in items}
        self._written, self._coded = written, index is not None

        def parts(user: str, item: str, text: str | None) -> list[str]:
            review = data.dataset.reviews.get((user, item))
            told = [text or "", *([review.text, review.headline, review.sentence] if review else [])]
            return [clean(part, len(part)) for part in told]

        known: dict[str, set[str]] = defaultdict(set)
        wrote: dict[str, list[str]] = defaultdict(list)
        for frame in (data.train, data.known):
            for user, item, text in frame.select("user_id", "item_id", "text").iter_rows():
                known[user].add(written[item])
                wrote[user] += parts(user, item, text)
        self.titles: dict[str, dict[str, str]] = defaultdict(dict)
        self.texts: dict[str, dict[str, str]] = defaultdict(dict)
        for frame in (data.valid, data.test):
            for user, item, text in frame.select("user_id", "item_id", "text").iter_rows():
                title = written[item]
                if title not in known[user]:
                    self.titles[user][title] = item
                for whole in parts(user, item, text):
                    said = whole[:_TEXT]
                    # Some write the same sentences about everything: what training tells is no secret.
                    if len(said) >= _TELLING and not any(said in earlier for earlier in wrote[user]):
                        self.texts[user][said] = item

    def shown(self, user: str, segments: Iterable[Segment], drawn: Mapping[str, int] | None = None) -> Iterator[str]:
        """Yield each held-out item of a user that data segments show, by its whole title or by its text.

        Args:
            user: Whose items.
            segments: What is shown.
            drawn: Titles that stand there as drawn negatives, and how often they may.
        """
        titles, written, left = self.titles.get(user, {}), self.texts.get(user, {}), Counter(drawn)
        for segment in segments:
            if segment.kind == "text":
                continue
            said = clean(segment.text)
            if said in titles and left[said] <= 0:
                yield f"user {user}, title of held-out item {titles[said]}"
            left[said] -= 1
            yield from (
                f"user {user}, text about held-out item {item}" for text, item in written.items() if text in said
            )

    def negatives(self, example: Example, template: Template) -> Mapping[str, int]:
        """Return the titles of a row's drawn negatives, and how often they may stand in its question.

        Each may as often as the candidate that is named least, or as a template about one item names it: a held-out
        item that is in the history too, or in a hint, stands there once more. A question that lists no candidates and
        asks about no item shows none: what is rejected stands in other answers.
        """
        texts = self.drawn(example)
        if not texts or not (family_of(example.task).lists or asks_for(template) == "yes"):
            return {}
        if asks_for(template) == "yes":
            mention = _CODES if self._coded else _TITLES
            often = len(mention.findall(template.system)) + len(mention.findall(template.user))
        else:
            named = Counter(clean(segment.text) for segment in _segments(example.messages) if segment.kind != "text")
            listed = texts + Counter(self._written[item] for _, item in example.pairs[-1:])
            # One that is cut, or written otherwise to forge nothing, is not found, and says nothing of the others.
            often = min((named[text] // times for text, times in listed.items() if named[text]), default=0)
        return {text: times * often for text, times in texts.items()}

    def drawn(self, example: Example) -> Counter[str]:
        """Return the titles of a row's drawn negatives, and how often each was drawn."""
        return Counter(self._written[item] for item in example.negatives)


def _segments(messages: Iterable[Message], answer: Iterable[Segment] = ()) -> Iterator[Segment]:
    for message in messages:
        yield from message.segments
    yield from answer


def training_rows(study: Study, family: str, count: int) -> Check:
    """Held-out pairs in the training rows of a family: those that a row declares, and those that its text shows.

    A held-out item may be a negative, since it is drawn without knowing that it is held out: see `rows_drawn_again`.
    It may stand nowhere else.
    """
    data = study.task_data(family)
    both = [study.data, *([study.reviews] if study.reviews else [])]
    held = frozenset().union(*(each.held_out for each in both))
    index = study.codes(family)
    titles, codes = _Secrets(data), _Secrets(data, index) if index is not None else None
    coded_ids = study.recipe.index is not None and study.recipe.index.ids != "text"
    places = []
    for example in _drawn(study, study.training_tasks[family], count):
        template = study.templates[family][example.template.rpartition("/")[2]]
        places += [f"row {example.id}: pair {pair}" for pair in example.pairs if pair in held]
        shows_ids = "item_id" in template.names("system", "user", "lead", "target")
        if codes is not None and (template.writes_codes or (coded_ids and shows_ids)):
            places += [f"row {example.id}: {what}" for what in _told(example, codes, template)]
        if codes is None or template.writes_titles or not template.writes_codes:
            places += [f"row {example.id}: {what}" for what in _told(example, titles, template)]
    return verdict(f"training rows of {family}", f"{count:,} rows", places)


def _drawn(study: Study, task: Task, count: int) -> Iterator[Example]:
    """Yield the first rows of a task's stream, and as many of those that share a history where rows are packed."""
    section = study.recipe.train
    if section.reward is not None:
        template = task.eval_templates[0]
        yield from (question(task, case, template) for case in islice(task.training_cases(), count))
        return
    yield from islice(training_examples(task, section.examples, study.training_seed), count)
    if section.packing == "tree" and section.examples is None and isinstance(task, Branching) and task.branches:
        yield from islice(_branching(task, sorted(study.data.users())), count)


def _branching(task: Branching, users: Sequence[str]) -> Iterator[Example]:
    for number in numbers():
        found = [row for user in users if (row := task.branch(number, user)) is not None]
        if not found:
            return
        yield from found


def _told(example: Example, secrets: _Secrets, template: Template) -> Iterator[str]:
    question = tuple(_segments(example.messages))
    yield from secrets.shown(example.user_id, question, secrets.negatives(example, template))
    yield from secrets.shown(example.user_id, example.answer)
    # Texts that are rejected were written by others, who may have written the same.
    if family_of(example.task).answers_with_items:
        rejected = [Segment("target", text) for text in example.rejected]
        yield from secrets.shown(example.user_id, rejected, secrets.drawn(example))


def questions(study: Study, family: str) -> Check:
    """Whether a question shows its own answer: in the history, a profile, or anywhere in the rendered prompt."""
    cases, places = study.cases(family), []
    titles = frozenset(study.task_data(family).dataset.titles.values() if family_of(family).answers_with_items else ())
    for case in cases:
        request, truth = case.request, str(case.truth)
        if family_of(family).ranks_for_users and any(event.item_id == truth for event in request.history):
            places.append(f"request {request.id}: the history holds the target")
        places += [f"request {request.id}: {what}" for what in _answers_itself(study, family, case, titles)]
        if request.item is not None and any(event.item_id == request.item for event in request.history):
            places.append(f"request {request.id}: the history holds the item that is asked about")
    names = ", ".join(template.name for template in study.eval_templates(family))
    return verdict(f"questions of {family}", f"{len(cases):,} requests ({names})", places)


def _answers_itself(study: Study, family: str, case: Case, titles: frozenset[str]) -> Iterator[str]:
    """Yield the templates whose prompt shows the answer; ``titles``: the catalogue's, where it is an item."""
    data, request = study.task_data(family), case.request
    own = family_of(family)
    ranked = own.answers_with_items
    secret = data.dataset.titles[str(case.truth)] if ranked else clean(str(case.truth))[:_TEXT]
    # A review may well hold the words of its headline: reading them there is the task.
    if own.quotes or (not ranked and len(secret) < _TELLING):
        return
    # What the user wrote about an earlier item too ("as described, came quickly") is no secret: the history tells it.
    if not ranked and any(secret in clean(event.text or "") for event in request.history):
        return
    others = {data.dataset.titles[event.item_id] for event in request.history}
    for template in study.eval_templates(family):
        asked = request
        if own.lists and asks_for(template) == "yes":
            if (other := _other_than(case, data)) is None:
                continue
            asked = replace(request, candidates=(other,))
        prompt = study.tasks[family].prompt(asked, template=template.name)
        # Among the candidates the answer stands as it must.
        listed = asked.candidates is not None and str(case.truth) in asked.candidates and own.lists
        codes, shows_titles = _secret_forms(own, template)
        index = study.codes(family)
        if codes and not listed and index is not None:
            code = clean(index.encode(str(case.truth)))
            if any(
                s.kind != "text" and clean(s.text) == code for s in _segments(prompt.messages, prompt.answer_prefix)
            ):
                yield f"the prompt of {template.id} shows the answer"
        if not shows_titles:
            continue
        for segment in _segments(prompt.messages, prompt.answer_prefix):
            if segment.kind == "text":
                continue
            said = clean(segment.text)
            if said in others or (listed and said == secret):
                continue  # a namesake in the history
            # A title may be part of another ("Alien", "Aliens"); in any other text it is named.
            if said == secret or (said not in titles and len(secret) >= NAMED and secret in said):
                yield f"the prompt of {template.id} shows the answer"
                break


def _other_than(case: Case, data: SplitDataset) -> str | None:
    """Return a candidate that is not called what the answer is: asked about it, a prompt must not name the answer."""
    titles, truth = data.dataset.titles, str(case.truth)
    return next((item for item in case.request.candidates or () if titles[item] != titles[truth]), None)


def _secret_forms(family: Family, template: Template) -> tuple[bool, bool]:
    """Say whether the answer's code and whether its title must not stand in a prompt of a template."""
    if family.candidates == "items":
        # The question shows the one form, and the other one is the answer.
        return template.answers_with_code, not template.answers_with_code
    return template.writes_codes, template.writes_titles or not template.writes_codes


def shots(study: Study, family: str) -> Check:
    """Held-out pairs in the few-shot examples of the evaluated requests."""
    recipe, task, data = study.recipe, study.tasks[family], study.task_data(family)
    places: list[str] = []
    secrets, cases = _Secrets(data), study.cases(family)
    for case in cases:
        for window in task.draw_shots(case.request, recipe.eval.shots.k).windows:
            places += [
                f"request {case.request.id}: example of user {window.user_id} shows held-out item {event.item_id}"
                for event in window.events
                if (window.user_id, event.item_id) in data.held_out
            ]
            told = [Segment("item", event.text) for event in window.events if event.text]
            places += [f"request {case.request.id}: {what}" for what in secrets.shown(window.user_id, told)]
    return verdict(f"few-shot examples of {family}", f"{len(cases):,} requests", places)


# --------------------------------------------------------------------------- made again from other held-out data


def rows_drawn_again(study: Study, family: str, count: int) -> Check:
    """Training rows that move with held-out interactions: in words, in order, or in what is drawn as a negative."""
    made, count = study.training_tasks[family], min(count, _ROWS)
    toward = _toward(study, family, map(_shown, _drawn(study, made, count)))
    other = _again(study, family, toward, study.training_seed)
    pairs = zip_longest(_drawn(study, made, count), _drawn(study, other, count))
    places = [f"row {(one or two).id}" for one, two in pairs if one != two]
    return verdict(f"training rows of {family} that depend on held-out interactions", f"{count:,} rows", places)


def validation_rows_drawn_again(study: Study, family: str) -> Check:
    """Rows that validation losses are computed on, and that move with test interactions, which no choice may see."""
    limit = study.recipe.train.valid_rows // max(len(study.tasks), 1)
    rows = list(study.tasks[family].examples("valid", limit))
    toward = _toward(study, family, map(_shown, rows))
    other = _again(study, family, toward, study.recipe.seed, splits=("test",)).examples("valid", limit)
    places = [f"row {(one or two).id}" for one, two in zip_longest(rows, other) if one != two]
    return verdict(f"validation rows of {family} that depend on test interactions", f"{len(rows):,} rows", places)


def shots_drawn_again(study: Study, family: str) -> Check:
    """Few-shot examples that move with held-out interactions; requests keep their ids, histories and candidates."""
    task, shots = study.tasks[family], study.recipe.eval.shots.k
    asked = [way for case in study.cases(family)[:_REQUESTS] for way in _ways(study, family, case.request)]
    made = [_prompt(task, way, shots) for way in asked]
    told = [
        (window.user_id, _segments(prompt.messages), ())
        for (request, *_), prompt in zip(asked, made, strict=True)
        for window in task.draw_shots(request, shots).windows
    ]
    other = _again(study, family, _toward(study, family, told), study.recipe.seed)
    places = [
        f"request {way[0].id}: the prompt of {way[1].id}"
        for way, prompt in zip(asked, made, strict=True)
        if _prompt(other, way, shots) != prompt
    ]
    name = f"few-shot examples of {family} that depend on held-out interactions"
    return verdict(name, f"{len(asked):,} prompts", places)


def positions_drawn_again(study: Study, family: str) -> Check | None:
    """Questions that measure what a position adds, and move with held-out interactions; None: none are asked."""
    section = study.recipe.eval
    if section.debias != "measured" or not any(map(is_positional, study.section(family).strategies)):
        return None
    made = study.tasks[family].questions(section.debias_questions)
    toward: dict[str, list[str]] = defaultdict(list)
    for request in made:
        toward[request.user_id] += request.candidates or ()
    again = _again(study, family, toward, study.recipe.seed).questions(section.debias_questions)
    places = [f"question {one.id}" for one, two in zip(made, again, strict=True) if one != two]
    name = f"position questions of {family} that depend on held-out interactions"
    return verdict(name, f"{len(made):,} questions", places)


_Way = tuple[Request, Template, Want]


def _ways(study: Study, family: str, request: Request) -> Iterator[_Way]:
    """Yield how evaluation asks a request: with every template, about all candidates and about one."""
    for template in study.eval_templates(family):
        one, asks = replace(request, candidates=(request.candidates or ())[:1]), asks_for(template)
        if not family_of(family).lists:
            yield request, template, "one"
        elif asks == "yes":
            yield one, template, "yes"
        else:
            yield request, template, "one"
            if asks == "label" and "pointwise-yes" in study.section(family).strategies:
                yield one, template, "yes"


def _prompt(task: Task, way: _Way, shots: int) -> Prompt:
    request, template, want = way
    if want == "one":
        return task.prompt(request, template=template.name, shots=shots)
    return task.prompt(request, template=template.name, shots=shots, want=want)


def _shown(row: Example) -> tuple[str, Iterable[Segment], Iterable[str]]:
    return row.user_id, _segments(row.messages, row.answer), row.negatives


def _again(
    study: Study, family: str, toward: Mapping[str, Sequence[str]], seed: int, splits: Sequence[str] = ("valid", "test")
) -> Task:
    """Return a family's task over data whose held-out interactions are others; candidates and codes stay."""
    own = study.task_data(family).dataset.items

    def other(data: SplitDataset) -> SplitDataset:
        for split in splits:
            # Another table has users and items of its own.
            data = redrawn(data, split, toward=toward if data.dataset.items is own else None)
        return data

    reviews = None if study.reviews is None else other(study.reviews)
    changed = replace(study, data=other(study.data), reviews=reviews)
    return build_task(changed, family, study.section(family), study.templates[family], seed)


def _toward(
    study: Study, family: str, told: Iterable[tuple[str, Iterable[Segment], Iterable[str]]]
) -> Mapping[str, Sequence[str]]:
    """Return by user the items that are named to it and that it has not had in training.

    These are what held-out items are drawn among: a row whose negatives are no held-out items moves if one of them
    becomes one. Drawn from the whole catalogue, another held-out item would seldom be one that a row could show.

    Args:
        study: The run's.
        family: Whose rows or prompts.
        told: Users with what is shown of them, and items that are known to be shown.
    """
    data, index = study.task_data(family), study.codes(family)
    items: dict[str, set[str]] = defaultdict(set)
    for item, title in data.dataset.titles.items():
        for text in (title, clean(item), *([clean(index.encode(item))] if index is not None else [])):
            items[text].add(item)
    trained: dict[str, set[str]] = defaultdict(set)
    for user, item in data.train.select("user_id", "item_id").iter_rows():
        trained[user].add(item)
    found: dict[str, set[str]] = defaultdict(set)
    for user, segments, known in told:
        named = (items.get(clean(segment.text), set()) for segment in segments if segment.kind != "text")
        found[user] |= set(known).union(*named) - trained[user]
    return {user: sorted(names) for user, names in found.items() if names}
