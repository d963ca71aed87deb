"""Fine-tunes a language model as dialogue manager, on the tool calls in transcripts.

An example has the prompt of `ModelManager`, and the call of the transcript as answer. RecLLM also tunes its modules on
conversations with simulated users (Friedman et al. 2023, arXiv 2305.07961). Each call is learned after the preceding
calls of the transcript (teacher forcing), so no example shows the consequences of the model's mistakes.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from llmrec.backends.encode import Encoder, TokenRow
from llmrec.chat.calls import Call, format_call, is_ending_call
from llmrec.chat.conversation import Conversation
from llmrec.chat.managers import Manager, ManagerInput, call_choices, render_decision_prompt
from llmrec.chat.state import State
from llmrec.chat.transcripts import Turn
from llmrec.durable import read_json, replace_atomically, write_checked_json
from llmrec.errors import DataError, RecipeError, require
from llmrec.fingerprint import fingerprint
from llmrec.models.load import (
    device,
    load_config,
    load_tokenizer,
    model_folder_hash,
    release_memory,
    resolve_model_folder,
    silence_libraries,
)
from llmrec.models.memory import TRAINING_ADVICE, convert_memory_errors
from llmrec.models.traits import is_encoder_decoder
from llmrec.pipeline.resume import RUN_FILES, lock_folder
from llmrec.pipeline.training import remove_foreign_checkpoints
from llmrec.prompts.template import Template, load_templates
from llmrec.recipe.schema import ADAPTER_METHODS, Recipe
from llmrec.tasks.base import seeded_random
from llmrec.terminal import set_command_folder
from llmrec.types import Cost, Example, Prompt

if TYPE_CHECKING:
    from llmrec.train.sft import TrainingResult
    from llmrec.train.steps import PlannedSteps

log = logging.getLogger(__name__)

MANAGER_FILE = "manager.json"
"""The file next to a fine-tuned manager's weights that records its base model and prompt."""
MIN_CONVERSATIONS = 20
"""Minimum number of conversations for fine-tuning: a tenth of them is held out."""
_FAMILY = "chat"
# Recipe keys that do not apply here.
_UNSUPPORTED_KEYS = ("preference", "judge", "reward", "examples", "start", "teacher")


@dataclass(frozen=True)
class TrainingDecision:
    """A decision in a transcript: the input and the call that was made.

    Attributes:
        conversation: The number of its conversation in the transcript, from 1.
    """

    conversation: int
    moment: ManagerInput
    call: Call

    @property
    def allowed(self) -> bool:
        """Whether a language model could make the call, since rules can also search for non-adjacent words."""
        return self.call in call_choices(self.moment)


@dataclass
class _TranscriptManager:
    """A manager that repeats the calls of a transcript and records its inputs."""

    name: str = "transcript"
    conversation: int = 0
    line: int = 0
    left: list[Call] = field(default_factory=list)
    decisions: list[TrainingDecision] = field(default_factory=list)

    def choose(self, moment: ManagerInput) -> tuple[Call, Cost]:
        """See `Manager`."""
        if not self.left:
            raise DataError(
                f"line {self.line} of the transcript has no tool call that ends the turn, such as show or say; add "
                "this call, or remove the line",
                kind="missing-value",
                column="calls",
            )
        call = self.left.pop(0)
        self.decisions.append(TrainingDecision(self.conversation, moment, call))
        return call, Cost()


def replay_decisions(conversation: Conversation, turns: Sequence[Turn]) -> list[TrainingDecision]:
    """Return all decisions in a transcript with their calls, in order.

    Calls are those of the transcript, so manual corrections of it are learned.
    """
    follower = _TranscriptManager()
    replayed, state = replace(conversation, manager=follower), State()
    for number, turn in enumerate(turns, start=1):
        if turn.user is None or number == 1:
            follower.conversation, state = follower.conversation + 1, State()
        if turn.user is None:
            continue
        follower.line, follower.left = number, list(turn.calls)
        state = replayed.answer(state, turn.user).state
        if follower.left:
            raise DataError(
                f"line {number} of the transcript has calls after the one that ends the turn; remove "
                f"{', '.join(call.tool for call in follower.left)}",
                kind="contradiction",
                column="calls",
            )
    return follower.decisions


def split_decisions(
    moments: Sequence[TrainingDecision], seed: int
) -> tuple[list[TrainingDecision], list[TrainingDecision]]:
    """Divide decisions into training and held-out decisions; 10 % of the conversations are held out."""
    names = sorted({moment.conversation for moment in moments})
    if len(names) < MIN_CONVERSATIONS:
        raise DataError(
            f"{len(names)} conversations are too few for fine-tuning, since a tenth of them is held out; give at "
            f"least {MIN_CONVERSATIONS}",
            kind="too-few",
            column="--tune",
        )
    seeded_random("chat", seed, "held out").shuffle(names)
    held_out = frozenset(names[: len(names) // 10])
    return (
        [moment for moment in moments if moment.conversation not in held_out],
        [moment for moment in moments if moment.conversation in held_out],
    )


def training_example(choice: TrainingDecision, number: int, template: Template) -> Example:
    """Return a decision as a training example: the prompt, with the call as answer."""
    _, answer = template.step({"text": format_call(choice.call)})
    return Example(
        id=f"{_FAMILY}/{number}",
        user_id=f"conversation {choice.conversation}",
        task=_FAMILY,
        template=template.id,
        messages=render_decision_prompt(choice.moment, template).messages,
        answer=answer,
        ends_turn=True,
    )


# --------------------------------------------------------------------------- agreement


@dataclass(frozen=True)
class Agreement:
    """How often a manager chooses the same calls as a transcript.

    Attributes:
        moments: Number of compared choices.
        call: The fraction with the same call.
        tool: The fraction with the same tool, regardless of arguments.
    """

    moments: int
    call: float
    tool: float


def measure_agreement(manager: Manager, moments: Sequence[TrainingDecision]) -> Agreement:
    """Return the agreement of a manager with the decisions in a transcript.

    Raises:
        LlmrecError: If an engine fails.
    """
    chosen = [manager.choose(moment.moment)[0] for moment in moments]
    size = max(1, len(moments))
    return Agreement(
        len(moments),
        sum(call == item.call for call, item in zip(chosen, moments, strict=True)) / size,
        sum(call.tool == item.call.tool for call, item in zip(chosen, moments, strict=True)) / size,
    )


@dataclass
class MostFrequentManager:
    """A baseline: the most frequent allowed call after the same earlier calls of the turn."""

    counts: Mapping[tuple[str, ...], Counter[Call]]
    name: str = "usual"

    @staticmethod
    def of(moments: Sequence[TrainingDecision]) -> MostFrequentManager:
        """Count the training calls, and return the manager."""
        counts: dict[tuple[str, ...], Counter[Call]] = {}
        for moment in moments:
            counts.setdefault(_earlier_tools(moment.moment), Counter())[moment.call] += 1
        return MostFrequentManager(counts)

    def choose(self, moment: ManagerInput) -> tuple[Call, Cost]:
        """See `Manager`."""
        allowed = call_choices(moment)
        usual = [
            call for call, _ in self.counts.get(_earlier_tools(moment), Counter()).most_common() if call in allowed
        ]
        return (usual or [call for call in allowed if is_ending_call(call)])[0], Cost()


def _earlier_tools(moment: ManagerInput) -> tuple[str, ...]:
    return tuple(call.tool for call, _ in moment.steps)


def known_prompt_share(moments: Sequence[TrainingDecision], trained: Sequence[TrainingDecision]) -> float:
    """Return the share of decisions whose prompt is also in the training examples."""
    template = load_templates(_FAMILY)["manage"]
    seen = {_prompt_text(render_decision_prompt(item.moment, template)) for item in trained}
    return sum(_prompt_text(render_decision_prompt(moment.moment, template)) in seen for moment in moments) / max(
        1, len(moments)
    )


def _prompt_text(prompt: Prompt) -> str:
    return "\0".join(message.text for message in prompt.messages)


# --------------------------------------------------------------------------- training


def check_manager_recipe(page: Recipe) -> None:
    """Reject a recipe whose model or training cannot be used for dialogue managers."""
    if page.train.method not in (*ADAPTER_METHODS, "full"):
        raise RecipeError(
            f"train.method={page.train.method} cannot train a manager; set train.method to one of "
            f"{', '.join((*ADAPTER_METHODS, 'full'))}",
            kind="unsupported",
            column="train.method",
        )
    for key in _UNSUPPORTED_KEYS:
        if getattr(page.train, key) is not None:
            raise RecipeError(
                f"train.{key}: not supported for conversations; remove the key",
                kind="unsupported",
                column=f"train.{key}",
            )


def fine_tune_on_decisions(
    page: Recipe, trained: Sequence[TrainingDecision], held: Sequence[TrainingDecision], folder: Path, *, quiet: bool
) -> TrainingResult:
    """Fine-tune the model of a recipe on decisions; the merged model is stored in ``merged``.

    Only the sections ``model`` and ``train`` of the recipe, and its seed, are used; see `split_decisions` for the
    decisions. Up to ``train.valid_rows`` of those held out give the validation loss.
    """
    from llmrec.train.batches import plan_steps
    from llmrec.train.rows import tokenise_validation_rows

    silence_libraries()
    template, section = load_templates(_FAMILY)["manage"], page.train
    seed = page.seed if section.seed is None else section.seed
    base = resolve_model_folder(page.model, seed=page.seed)
    if is_encoder_decoder(load_config(base, page.model)):
        raise RecipeError(
            f"model.name={page.model.name} is an encoder-decoder; choose a decoder as manager",
            kind="unsupported",
            column="model.name",
        )
    encoder = Encoder(load_tokenizer(base, page.model), max_length=page.model.max_length)
    limit = section.max_row_tokens
    rows = tokenise_validation_rows(
        (training_example(item, n, template) for n, item in enumerate(trained)), encoder, limit, paired=False
    )
    # truncated calls would be invalid
    rows = [row for row in rows if row.labels[-1] == encoder.end_id]
    if len(rows) < len(trained):
        log.warning("%d of %d examples are longer than train.max_row_tokens", len(trained) - len(rows), len(trained))
    if not rows:
        raise RecipeError(
            f"no example of the conversations fits train.max_row_tokens={limit}; raise this key",
            kind="too-large",
            column="train.max_row_tokens",
        )
    valid = tokenise_validation_rows(
        (training_example(item, n, template) for n, item in enumerate(held[: section.valid_rows], start=len(trained))),
        encoder,
        limit,
        paired=False,
    )
    steps = plan_steps(
        _iterate_epochs(rows, seed),
        steps=section.steps,
        batch_tokens=section.batch_tokens,
        seed=seed,
        width=limit if section.packing == "tree" else None,
    )
    with lock_folder(folder, RUN_FILES):
        set_command_folder(folder)
        key = fingerprint(
            "chat", weights=model_folder_hash(base), rows=steps.digest(), train=section.model_dump(), seed=seed
        )
        remove_foreign_checkpoints(folder, key)
        with convert_memory_errors("training", TRAINING_ADVICE, "train.batch_tokens"):
            done = _train_model(page, encoder, base, steps, valid, folder, seed, quiet)
        _write_merged_model(page, encoder, base, folder, template)
    return done


def _iterate_epochs(rows: Sequence[TokenRow], seed: int) -> Iterator[TokenRow]:
    """Yield examples endlessly, reshuffled in each epoch."""
    for number in count():
        order = list(rows)
        seeded_random("chat rows", seed, str(number)).shuffle(order)
        yield from order


def _train_model(
    page: Recipe,
    encoder: Encoder,
    base: str,
    steps: PlannedSteps,
    valid: Sequence[TokenRow],
    folder: Path,
    seed: int,
    quiet: bool,
) -> TrainingResult:
    from llmrec.train import lora, sft

    # seeds the random initial weights of adapters
    require("torch", "train").manual_seed(seed)
    model = lora.load_trainable(base, page.model, page.train)
    done = sft.train(
        model,
        encoder,
        steps,
        {_FAMILY: valid},
        page.train,
        folder=folder,
        seed=seed,
        quiet=quiet,
        device=device(page.model),
    )
    del model
    release_memory()
    return done


def _write_merged_model(page: Recipe, encoder: Encoder, base: str, folder: Path, template: Template) -> None:
    from llmrec.train import lora

    with replace_atomically(folder / "merged") as draft:
        if page.train.method == "full":
            lora.save_full_model(folder / "adapter", page.model, draft)
        else:
            lora.merge_adapter(base, page.model, folder / "adapter", draft)
        encoder.tokenizer.save_pretrained(draft)
        write_checked_json(
            draft / MANAGER_FILE, {"base": page.model.name, "template": template.id, "sha": template.sha}
        )


def manager_weights(name: str) -> tuple[str, bool]:
    """Return the weights of a dialogue manager, and whether they were fine-tuned for this purpose."""
    for folder in (Path(name) / "merged", Path(name)):
        if (folder / MANAGER_FILE).is_file():
            about = read_json(folder / MANAGER_FILE, "tune the manager again with `llmrec chat --tune`")
            if about.get("sha") != load_templates(_FAMILY)["manage"].sha:
                log.warning(
                    "%s was fine-tuned with another version of the prompt chat/manage; repeat the fine-tuning", folder
                )
            return str(folder), True
    return name, False


def agreements_as_dicts(figures: Mapping[str, Agreement]) -> dict[str, dict[str, float]]:
    """Return agreements by name as plain data."""
    return {name: {key: round(value, 4) for key, value in asdict(item).items()} for name, item in figures.items()}
