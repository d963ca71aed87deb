"""Fine-tunes a language model as dialogue manager, and measures its agreement with held-out calls."""

from __future__ import annotations

from collections.abc import Sequence

from llmrec.chat import tuning
from llmrec.chat.conversation import Conversation
from llmrec.chat.managers import Manager
from llmrec.chat.opening import open_manager_factory
from llmrec.chat.options import ChatOptions
from llmrec.chat.simulator import (
    OTHER_MESSAGES,
    USUAL_MESSAGES,
    MessageTemplates,
    random_target_conversations,
    transcript_turns,
)
from llmrec.chat.transcripts import Turn
from llmrec.chat.tuning import (
    Agreement,
    MostFrequentManager,
    TrainingDecision,
    known_prompt_share,
    measure_agreement,
    replay_decisions,
    split_decisions,
)
from llmrec.cli.console import say, store_facts
from llmrec.models.load import resolve_model_folder
from llmrec.pipeline.study import resolve_run_folder
from llmrec.recipe.schema import Recipe
from llmrec.tasks.base import seeded_random

# Simulated users for training: turns per conversation, and probability of a message without a preference.
_SIMULATED_TURNS, _ASIDE_PROBABILITY = 8, 0.4
# Number of calls on which each manager is evaluated; an untuned model takes a second or more per call.
_EVALUATED_CALLS = 60


def fine_tune_manager(
    conversation: Conversation, page: Recipe, past: Sequence[Turn] | None, options: ChatOptions
) -> Sequence[Turn]:
    """Fine-tune a language model as dialogue manager, print its agreement, and return the training turns.

    Without a transcript of the past, conversations are simulated with the rule-based manager of ``conversation``.

    Raises:
        LlmrecError: If the recipe, the transcript or the model cannot be used.
    """
    turns = past
    if turns is None:
        turns = _simulate_turns(conversation, options.simulate or 0, options.seed, USUAL_MESSAGES)
    moments = replay_decisions(conversation, turns)
    allowed = [moment for moment in moments if moment.allowed]
    trained, held = split_decisions(allowed, page.seed)
    samples = {"held out": _sample_decisions(held, page.seed)}
    if past is None:
        others = replay_decisions(
            conversation, _simulate_turns(conversation, max(10, len(held) // 4), options.seed + 1, OTHER_MESSAGES)
        )
        samples["in other words"] = _sample_decisions([other for other in others if other.allowed], page.seed)
    names = sorted({moment.conversation for moment in moments})
    left_out = len(moments) - len(allowed)
    say(f"{len(trained)} examples from {len(names)} conversations; {left_out} invalid calls are excluded")
    result: dict[str, dict[str, Agreement]] = {"usual": _measure_agreements(MostFrequentManager.of(trained), samples)}
    with open_manager_factory(
        resolve_model_folder(page.model, seed=page.seed), k=options.k, dtype=options.dtype
    ) as new_manager:
        result["untrained"] = _measure_agreements(new_manager(options.seed), samples)
    folder = resolve_run_folder(page, None)
    done = tuning.fine_tune_on_decisions(page, trained, held, folder, quiet=False)
    with open_manager_factory(str(folder), k=options.k, dtype=options.dtype) as new_manager:
        result["tuned"] = _measure_agreements(new_manager(options.seed), samples)
    losses = [line["valid_loss"]["chat"] for line in done.log if line.get("valid_loss")]
    say(f"{done.steps} steps in {done.seconds:.0f} s; held-out loss {', '.join(f'{loss:.3f}' for loss in losses)}")
    for name, parts in result.items():
        for part, rates in parts.items():
            say(
                f"{name}, {part}: {rates.call:.3f} of {rates.moments} calls are correct, {rates.tool:.3f} select the "
                "correct tool"
            )
    store_facts(
        rows=len(trained),
        conversations=len(names),
        left_out=left_out,
        known={part: round(known_prompt_share(item, trained), 4) for part, item in samples.items()},
        held_out_loss=[round(loss, 4) for loss in losses],
        steps=done.steps,
        seconds=round(done.seconds, 1),
        agreement={name: tuning.agreements_as_dicts(item) for name, item in result.items()},
    )
    say(f"conversation manager fine-tuned: llmrec chat {options.model} --manager {folder}")
    return () if past is not None else turns


def _simulate_turns(conversation: Conversation, count: int, seed: int, words: MessageTemplates) -> list[Turn]:
    return transcript_turns(
        random_target_conversations(conversation, count, seed, _SIMULATED_TURNS, _ASIDE_PROBABILITY, words)
    )


def _sample_decisions(moments: Sequence[TrainingDecision], seed: int) -> list[TrainingDecision]:
    """Return a random sample of calls for the evaluation."""
    return seeded_random("chat", seed, "asked").sample(list(moments), min(_EVALUATED_CALLS, len(moments)))


def _measure_agreements(manager: Manager, samples: dict[str, list[TrainingDecision]]) -> dict[str, Agreement]:
    return {part: measure_agreement(manager, item) for part, item in samples.items()}
