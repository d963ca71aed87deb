"""What an evaluation asks of a model, counted on a sample of its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmrec.backends.encode import Encoder
from llmrec.pipeline.row_specs import asks
from llmrec.pipeline.study import Study
from llmrec.strategies.counting import questions_of
from llmrec.types import Request

_SAMPLE = 24
# Tokens that engines keep together when they reuse what they have read.
_BLOCK = 16
# A strategy that is not among them counts one token.
_ONE_TOKEN = 1
_ANSWER_TOKENS = {
    "likelihood": 0,
    "likelihood-prior": 0,
    "search": 0,
    "head": 0,
    "expected": 1,
    "parsed": 3,
    "yes-no": 2,
    "parsed-yes-no": 3,
    "list": 60,
    "text": 30,
}


@dataclass(frozen=True)
class Work:
    """Tokens of one or many requests.

    Attributes:
        asked: In all prompts, as a server counts and bills them.
        read: Of these, and of continuations that are scored, those that no earlier prompt began with.
        scored: Positions whose logits are computed without anything being written.
        written: In all answers.
    """

    asked: float = 0.0
    read: float = 0.0
    scored: float = 0.0
    written: float = 0.0

    def __add__(self, other: Work) -> Work:
        """Return the sum."""
        return Work(
            self.asked + other.asked, self.read + other.read, self.scored + other.scored, self.written + other.written
        )

    def times(self, count: float) -> Work:
        """Return it ``count`` times."""
        return Work(self.asked * count, self.read * count, self.scored * count, self.written * count)

    @property
    def tokens(self) -> int:
        """Of prompts, continuations and answers."""
        return round(self.asked + self.written)


class Seen:
    """Which beginnings of prompts were read before, a block at a time."""

    def __init__(self) -> None:
        self._known: set[int] = set()

    def new(self, ids: Sequence[int]) -> int:
        """Return how many tokens of a prompt are not behind a known beginning, at least one, and remember it."""
        key, fresh = 0, 0
        for start in range(0, len(ids) - _BLOCK + 1, _BLOCK):
            key = hash((key, *ids[start : start + _BLOCK]))
            fresh += key not in self._known
            self._known.add(key)
        return max(fresh * _BLOCK + len(ids) % _BLOCK, 1)


def eval_work(study: Study, encoder: Encoder) -> dict[str, Work]:
    """Estimate what each setting asks from a sample of its prompts."""
    totals: dict[str, Work] = {}
    for arm in study.recipe.eval.arms:
        shots = study.recipe.eval.shots.k if arm == "few-shot" else 0
        seen, total = Seen(), Work()
        for family in (family for family in study.tasks if asks(study.recipe, family, arm)):
            cases = study.cases(family)
            sample = cases[:_SAMPLE]
            for template in study.eval_templates(family):
                strategies = study.section(family).strategies
                for strategy in study.tasks[family].asked_by(template, strategies, tuned=arm == "tuned"):
                    used = sum(
                        (_of(study, family, encoder, c.request, template.name, shots, strategy, seen) for c in sample),
                        Work(),
                    )
                    total += used.times(len(cases) / max(len(sample), 1))
        totals[arm] = total
    return totals


def _of(
    study: Study, family: str, encoder: Encoder, request: Request, template: str, shots: int, strategy: str, seen: Seen
) -> Work:
    """Count one request."""
    task, section = study.tasks[family], study.recipe.eval
    asked = questions_of(strategy, len(request.candidates or ()), section) if request.candidates else None
    if asked is not None:
        shown = (request.candidates or ())[: asked.size]
        parts = [replace(request, candidates=each) for each in (shown, shown[::-1])]
        first, turned = (encoder.prompt(task.prompt(p, template=template, shots=shots, want=asked.want)) for p in parts)
        again = max(len(first) - _shared(first, turned), 1)
        read = seen.new(first) + (asked.prompts - 1) * again
        return Work(asked.prompts * len(first), read, asked.prompts)
    ids = encoder.prompt(task.prompt(request, template=template, shots=shots))
    if strategy == "two-step":
        # The second prompt holds what the first one wrote, at most as long as it may be.
        second = section.permutations * (len(ids) + task.profile_tokens)
        first_step = encoder.prompt(task.profile_prompt(request))
        return Work(len(first_step) + second, seen.new(first_step) + second, section.permutations, task.profile_tokens)
    continued = 0
    if strategy in ("likelihood", "likelihood-prior"):
        continued = sum(len(encoder.piece(text)) + 1 for text in task.continuations(request, template=template))
    if strategy == "search":
        continued = section.beams * len(encoder.piece(task.continuations(request, template=template)[0]))
    written = _ANSWER_TOKENS.get(strategy, _ONE_TOKEN)
    return Work(len(ids) + continued, seen.new(ids) + continued, continued, written)


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the beginning that two prompts have in common, in whole blocks."""
    count = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return count // _BLOCK * _BLOCK
