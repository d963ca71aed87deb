"""Rating prediction by a head that was trained with the model; see `llmrec.backends.rating_head`."""

from __future__ import annotations

from collections.abc import Sequence

from llmrec.errors import BackendError
from llmrec.rank.asking import Asker, prompt_hash
from llmrec.types import Answer, Cost, HeadBackend, Rating, Request


class HeadRater:
    """Predicts what the rating head reads off the last token of the prompt, in one forward a request."""

    name = "head"

    def __init__(self, asker: Asker) -> None:
        """Set up.

        Raises:
            BackendError: If the backend reads no rating head.
        """
        backend = asker.backend
        if "rate" not in backend.capabilities or not isinstance(backend, HeadBackend):
            raise BackendError(
                f"tasks.rating.strategies: backend {backend.name!r} reads no rating head; set eval.backend=hf, or drop "
                "'head'"
            )
        self.asker = asker
        self.engine = ""
        self._backend: HeadBackend = backend

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Rate every request's item; see `Predictor.answer`."""
        answers: list[Answer] = []
        for part, prompts in self.asker.batches(requests):
            for request, prompt, read in zip(part, prompts, self._backend.rate(prompts), strict=True):
                self.engine = read.engine
                answers.append(
                    Rating(
                        request_id=request.id,
                        value=read.value,
                        prompt_hash=prompt_hash(prompt),
                        cost=Cost(prompt_tokens=read.prompt_tokens, forwards=1),
                    )
                )
        return answers
