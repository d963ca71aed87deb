"""Runs a conversation in the terminal, or replays a transcript."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from llmrec.answer.checks import with_resolved_engine
from llmrec.answer.known import Catalogue
from llmrec.answer.opening import Models, open_models
from llmrec.chat import transcripts
from llmrec.chat.calls import format_call
from llmrec.chat.conversation import Conversation
from llmrec.chat.dual_encoder import DEFAULT_ENCODER, build_dialogue_turns, load_embedders, train_dual_encoder
from llmrec.chat.facts import Facts
from llmrec.chat.fit import FitJudge
from llmrec.chat.leading import fine_tune_manager
from llmrec.chat.managers import Manager
from llmrec.chat.opening import BASELINE_MANAGERS, open_grader, open_manager_factory
from llmrec.chat.options import RULES_MANAGER, ChatOptions
from llmrec.chat.reading import Reader
from llmrec.chat.simulator import random_target_conversations, transcript_turns
from llmrec.chat.state import State
from llmrec.chat.tools import ModelListRecommender, Tools, make_answer_function
from llmrec.chat.tuning import check_manager_recipe
from llmrec.cli.console import say, store_facts
from llmrec.errors import DataError
from llmrec.guard import TEXT_LIMIT, clean
from llmrec.models.text_encoder import text_embedder
from llmrec.recipe.load import load_recipe

_WELCOME = "Say what you are looking for; an empty line ends."


def run_chat(options: ChatOptions) -> int:
    """Run a conversation on standard input, or replay a transcript; return the exit status.

    Raises:
        LlmrecError: If the model cannot be opened, a transcript cannot be read, or another file would be overwritten.
    """
    _check_options(options)
    page = None if options.tune is None else load_recipe(options.tune)
    if page is not None:
        check_manager_recipe(page)
    past = None if options.replay is None else transcripts.read(options.replay)
    turns: list[transcripts.Turn] = []
    models = open_models(with_resolved_engine(options.recommender()), options.models)
    try:
        with (
            open_manager_factory(options.manager, k=options.k, dtype=options.dtype) as new_manager,
            open_grader(options.ranker, dtype=options.dtype) as judge,
        ):
            conversation = build_conversation(models, new_manager(options.seed), options.encoder, judge)
            if page is not None:
                turns += fine_tune_manager(conversation, page, past, options)
                return 0
            if past is not None:
                return _replay_transcript(conversation, past)
            if options.simulate is not None:
                turns += transcript_turns(random_target_conversations(conversation, options.simulate, options.seed))
                _finish_simulation(conversation, turns, options)
                return 0
            for turn in _answer_input_lines(conversation, options):
                turns.append(turn)
    finally:
        # also after Ctrl-C or an error, so that the transcript is not lost
        if options.save is not None and turns:
            transcripts.write(options.save, turns)
        models.close()
    store_facts(turns=[turn.model_dump() for turn in turns])
    return 0


def _check_options(options: ChatOptions) -> None:
    """Reject incompatible options."""
    if options.save is not None:
        if options.replay is not None:
            raise DataError(
                "--save and --replay cannot be combined; drop one of them",
                kind="contradiction",
                column="--save",
            )
        transcripts.check_overwritable(options.save)
    if options.learn is not None and options.simulate is None:
        raise DataError(
            "--learn needs simulated conversations; set their number with --simulate",
            kind="missing-key",
            column="--learn",
        )
    if options.simulate is not None and options.replay is not None:
        raise DataError("--simulate and --replay cannot be combined", kind="contradiction", column="--simulate")
    if options.tune is None:
        return
    if options.simulate is None and options.replay is None:
        raise DataError(
            "--tune needs conversations; set their number with --simulate, or give a transcript with --replay",
            kind="missing-key",
            column="--tune",
        )
    if options.manager != RULES_MANAGER or options.learn is not None or options.ranker is not None:
        raise DataError(
            "--tune trains the recipe's model on tool calls of the rule-based manager or a transcript; drop "
            "--manager, --learn and --ranker",
            kind="contradiction",
            column="--tune",
        )


def build_conversation(
    models: Models, manager: Manager, encoder: str | None = None, judge: FitJudge | None = None
) -> Conversation:
    """Return a conversation based on the models of a folder; see `Tools` for ``judge``."""
    if not models.items:
        raise DataError("chat: this model has no catalogue; give a table with --items", kind="empty", column="--items")
    embed, embed_query = (None, None) if encoder is None else load_embedders(encoder)
    facts = Facts(models.items, embed, embed_query)
    lists = ModelListRecommender(Catalogue(models.items), make_answer_function(models))
    reader = None if manager.name in BASELINE_MANAGERS else Reader(facts)
    return Conversation(Tools(facts, lists, judge), manager, reader)


def _answer_input_lines(conversation: Conversation, options: ChatOptions) -> Iterator[transcripts.Turn]:
    """Answer the lines of standard input, and yield each turn before it is printed."""
    state = State()
    if sys.stdin.isatty():
        say(_WELCOME)
    for line in sys.stdin:
        if not (text := clean(line, TEXT_LIMIT)):
            break
        reply = conversation.answer(state, text)
        state = reply.state
        yield transcripts.Turn.of(text, reply)
        _say_cleaned(reply.text)
        if options.calls:
            calls = "; ".join(map(format_call, reply.calls))
            _say_cleaned(f"{reply.seconds:.2f} s, {reply.cost.prompt_tokens} tokens read: {calls}", "  ")


def _finish_simulation(conversation: Conversation, turns: list[transcripts.Turn], options: ChatOptions) -> None:
    """Print the results of simulated conversations, and train on them if requested."""
    facts = conversation.tools.facts
    begun = sum(turn.user is None for turn in turns)
    store_facts(conversations=begun, turns=len(turns) - begun)
    say(f"{begun} conversations, {len(turns) - begun} turns")
    if options.learn is not None:
        encoder = options.encoder or DEFAULT_ENCODER
        examples, items = build_dialogue_turns(turns, list(facts.items), encoder), text_embedder(encoder)(facts.texts)
        train_dual_encoder(encoder, examples, items, options.seed).save(options.learn)
        say(f"dual encoder written: llmrec chat {options.model} --encoder {options.learn}")


def _replay_transcript(conversation: Conversation, past: list[transcripts.Turn]) -> int:
    different = list(transcripts.replay_differences(past, conversation))
    for line in different:
        _say_cleaned(line)
    count = sum(turn.user is not None for turn in past)
    store_facts(turns=count, different=different)
    say(f"{count} turns, {len(different)} with different output")
    return int(bool(different))


def _say_cleaned(text: str, before: str = "") -> None:
    """Print lines of untrusted text, without control characters."""
    for line in text.split("\n"):
        say(before + clean(line, max(1, len(line))))
