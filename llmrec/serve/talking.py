"""Conversations over HTTP: rules choose the tools, and the engine's models rank.

A turn waits for the engine in a thread of its own; these are few, and not those in which the engine is asked. As many
turns as questions may wait are taken, and more are refused as those are.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

from llmrec.answer.known import Catalogue
from llmrec.answer.models import RANK
from llmrec.answer.recommender import Answered
from llmrec.chat.calls import Call
from llmrec.chat.conversation import Conversation
from llmrec.chat.facts import Facts
from llmrec.chat.managers import RuleManager
from llmrec.chat.reading import Reader
from llmrec.chat.tools import ModelLists, Tools, Verb
from llmrec.data.requests import RankRequest
from llmrec.errors import DataError
from llmrec.serve.batching import Full, TooLate
from llmrec.serve.forms import since
from llmrec.serve.schema import CatalogueItem
from llmrec.serve.schema_chat import ChatAnswer, ChatBody
from llmrec.serve.service import Service
from llmrec.serve.worker import POPULAR, SIMILAR, EngineLost, Question

_THREADS = 8
# Seconds beyond the patience of a question, which ends by itself as long as its event loop runs.
_GRACE = 5.0


class Talking:
    """Holds conversations over a service.

    Args:
        service: Whose catalogue and models they are about.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="chat")
        self._turns: set[Future[ChatAnswer]] = set()
        self._closed = False
        self._known: tuple[Catalogue, int, Facts, Reader] | None = None

    def close(self) -> None:
        """Take no more turns; those that have not begun are given up."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def answer(self, body: ChatBody, called: Callable[[Call], None] = lambda call: None) -> ChatAnswer:
        """Answer one line.

        Args:
            body: The line, and the state so far.
            called: Told of every call, in another thread.

        Raises:
            DataError: If there is no such model, or no item to talk about.
            Full: If as many turns are open as questions may wait.
            LlmrecError: If the engine cannot answer.
        """
        begun, loop = time.monotonic(), asyncio.get_running_loop()
        self._service.check_model(body.model)

        def turn() -> ChatAnswer:
            talk = self._conversation(body, loop)
            reply = talk.answer(body.state, body.text, called)
            # Items may have come or gone since the conversation read them.
            known = {**self._service.catalogue.items, **talk.tools.facts.items}
            shown = [known[name] for name in reply.items if name in known]
            return ChatAnswer(
                text=reply.text,
                items=[
                    CatalogueItem(item_id=each.item_id, title=each.title, fields=dict(each.fields)) for each in shown
                ],
                calls=list(reply.calls),
                profile=list(talk.tools.profile(reply.state)),
                state=reply.state,
                milliseconds=since(begun),
            )

        if self._closed:
            raise EngineLost("the service is stopping; ask again in a moment", kind="failed")
        # A turn is over not when its client leaves, but when its thread is free again.
        self._turns = {each for each in self._turns if not each.done()}
        if len(self._turns) >= self._service.settings.room:
            self._service.batcher.load.refused += 1
            raise Full.for_now(1.0)
        running = self._threads.submit(turn)
        self._turns.add(running)
        return await asyncio.wrap_future(running)

    async def streamed(self, body: ChatBody) -> AsyncIterator[tuple[str, Any]]:
        """Answer one line in events: ``call`` for each call once it is done, then ``done`` with the whole answer."""
        pieces: asyncio.Queue[Call | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def called(call: Call) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, call)

        asking = asyncio.ensure_future(self.answer(body, called))
        asking.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (call := await pieces.get()) is not None:
                yield "call", call.model_dump(mode="json")
            yield "done", (await asking).model_dump(mode="json")
        finally:
            asking.cancel()

    def _conversation(self, body: ChatBody, loop: asyncio.AbstractEventLoop) -> Conversation:
        service, facts, reader = self._service, *self._facts()

        def ask(verb: Verb, request: RankRequest, depth: int) -> Answered:
            if verb != "similar":
                asked = Question(model=body.model, verb=POPULAR if verb == "popular" else RANK, depth=depth)
                return self._asked(asked, request, loop)
            try:
                return self._asked(Question(model="interactions", verb=SIMILAR, depth=depth), request, loop)
            except DataError as error:
                if error.kind != "unsupported":
                    raise
                # A model without its interactions compares texts, as in a terminal.
                return self._asked(Question(model="text", verb=SIMILAR, depth=depth), request, loop)

        lists = ModelLists(service.catalogue, ask, service.settings.rules)
        return Conversation(Tools(facts, lists), RuleManager(k=body.k), reader)

    def _asked(self, question: Question, request: RankRequest, loop: asyncio.AbstractEventLoop) -> Answered:
        """Wait in a turn's thread for the engine.

        Raises:
            DataError: If the question cannot be answered; others can.
            LlmrecError: If the engine does not answer.
        """
        waiting = asyncio.run_coroutine_threadsafe(self._service.batcher.ask(question, request), loop)
        try:
            reply = waiting.result(self._service.settings.patience + _GRACE)
        except (TimeoutError, CancelledError) as error:
            waiting.cancel()
            raise TooLate("the service did not answer in time; ask again", kind="exhausted") from error
        if reply.fault is not None:
            raise reply.fault
        assert isinstance(reply.answer, Answered)
        return reply.answer

    def _facts(self) -> tuple[Facts, Reader]:
        """Return facts of the catalogue as it is now.

        Raises:
            DataError: If it is empty.
        """
        catalogue = self._service.catalogue
        if not catalogue.items:
            raise DataError("there is no item to talk about; put some with PUT /v1/items", kind="empty")
        known, changes = self._known, catalogue.changes
        if known is None or known[0] is not catalogue or known[1] != changes:
            facts = Facts(catalogue.items)
            known = self._known = catalogue, changes, facts, Reader(facts)
        return known[2], known[3]
