"""The page of a suite of conversations: one table, and the planned comparisons."""

from __future__ import annotations

from llmrec.bench.records import ChatLine, ChatResult
from llmrec.bench.wording import planned_line, planned_note, standing
from llmrec.chat.opening import MANAGERS
from llmrec.report.escape import cell, code
from llmrec.report.table import grid
from llmrec.report.wording import DASH, SEEDS, USERS


def page_of(results: ChatResult) -> str:
    """Return the Markdown page.

    Args:
        results: What `llmrec.bench.conversations` wrote.
    """
    machine = results.machine
    where = f"{machine.get('cpu') or 'an unknown processor'}, {machine.get('cores') or 'unknown'} cores"
    fields = ", ".join(f"{name} ({count:,} items)" for name, count in results.fields.items())
    names = list(results.rows[0].metrics)
    header = ["Row", *names, "turns", "seconds a turn", "tokens a turn", "calls that parse", "users"]
    lines = [
        f"# {cell(results.chat)}",
        "",
        f"{cell(results.description)} {code(results.command)}, {results.seconds / 60:.0f} min on "
        f"{cell(where)}. Written by that command; do not edit.",
        "",
        f"Conversations with simulated users about the {results.data.items:,} items of {cell(results.data.name)}. "
        f"{cell(results.recommender)} orders them. There are {results.users:,} users for each of {len(results.seeds)} "
        f"seeds. A user wants an item that was held out ({code(results.split)}), and speaks of its fields, of numbers "
        f"only years, and never of its title: {cell(fields)}. "
        f"{cell(names[-1])} is the share of conversations one of whose first {results.turns} lists held it. Intervals "
        "are 95 % over users. These users answer every question and say little else, so that the figures say what a "
        "manager does with constraints, not how people talk.",
        "",
        grid(list(map(cell, header)), [_row(row, names) for row in results.rows]),
    ]
    lines += [f"\n{cell(row.name)}: {told}." for row in results.rows if (told := _models(row))]
    for row in results.rows:
        if row.lines_with_a_wanted_title:
            lines += ["", f"{cell(row.name)}: {row.lines_with_a_wanted_title:,} lines of users name what is wanted."]
    for row in results.rows:
        if few := standing(row.users, SEEDS):
            lines += ["", f"{cell(row.name)}: {few}"]
    if results.pairs:
        lines += ["", planned_note(len(results.pairs), earlier=False), "", cell(results.detectable), ""]
        lines += [
            f"- {cell(results.metric)}, {pair.users:,} users{', exploratory' if pair.users < USERS else ''}: "
            + planned_line(pair, "less")
            for pair in results.pairs
        ]
    return "\n".join([*lines, ""])


def _models(row: ChatLine) -> str:
    """Say which language models stand behind a row, unless its name does."""
    leads = f"{code(row.manager)} chooses the tools" if row.manager not in (*MANAGERS, row.name) else ""
    grades = f"{code(row.ranker)} grades the first items of each list" if row.ranker else ""
    return ", and ".join(filter(None, (leads, grades)))


def _row(row: ChatLine, names: list[str]) -> list[str]:
    shares = []
    for name in names:
        figure = row.metrics[name]
        interval = f" [{figure.low:.3f}, {figure.high:.3f}]" if name == names[-1] else ""
        shares.append(f"{figure.value:.3f}{interval}")
    knows = f" (users know {', '.join(row.knows)})" if row.knows else ""
    tokens = f"{row.tokens_a_turn:,.0f}" if row.tokens_a_turn else DASH
    cost = [f"{row.turns:.1f}", f"{row.seconds_a_turn:.3f}", tokens, f"{row.parse_rate:.3f}", f"{row.users:,}"]
    return [cell(row.name + knows), *shares, *cost]
