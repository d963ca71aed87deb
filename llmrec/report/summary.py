"""The opening paragraph of a report: what a model or a fusion adds, what was run, where a control is ahead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from llmrec.report.escape import flat, visible
from llmrec.report.wording import (
    USERS,
    TaskVerdict,
    count,
    duration,
    facing,
    label,
    listed,
    number,
    outcome,
    stated,
    title,
    verdict,
    with_interval,
)
from llmrec.results import Results, Verdict


def first_sentence(results: Results) -> str:
    """Return what the model adds to the classic recommenders, or without one what the parts bring to their fusion."""
    if _asks(results):
        return added(results)
    return " ".join(filter(None, (brought(results, task) for task in results.tasks)))


def summary(results: Results) -> str:
    """Return the opening paragraph: what the model adds, what was run, what tuning did, where a control is ahead."""
    verdicts = [verdict(results, task) for task in results.tasks]
    tallies = (tuning_tally(verdicts), _control_tally(verdicts)) if _asks(results) else ()
    return " ".join(filter(None, (first_sentence(results), _what_ran(results), *tallies, caution(results))))


def added(results: Results) -> str:
    """Say what the tuned model adds to the classic recommenders: their fusion with it less the best one without it.

    Returns:
        One sentence; nothing for a run without a tuned model.
    """
    rows = {row.id: row for row in results.rows}
    if not any(row.arm == "tuned" for row in results.rows):
        return ""
    parts = []
    for task in results.tasks:
        places = {row.id: place for place, row in enumerate(results.standings(task))}
        joined = {name for name in places if rows[name].fusion is not None}
        metric = results.headline[task]
        pairs = [
            facing(entry, entry.a if rows[entry.a].arm == "tuned" else entry.b)
            for entry in results.comparisons
            if (entry.task, entry.metric) == (task, metric)
            and {entry.a, entry.b} <= joined
            and {rows[entry.a].arm, rows[entry.b].arm} == {"tuned", "baseline"}
        ]
        hardest = min(pairs, key=lambda entry: (entry.verdict is None, places[entry.b]), default=None)
        if hardest is not None:
            parts.append(f"{stated(hardest)} in {title(task)}, {outcome(hardest.verdict)}")
    if not parts:
        return (
            "What the tuned model adds to the classic recommenders was not measured: no fusion joins it with them "
            "(eval.fusion)."
        )
    return f"Joined with the classic recommenders, the tuned model changes their fusion by {'; by '.join(parts)}."


def caution(results: Results, name: Callable[[str], str] = title) -> str:
    """Say what makes a run exploratory: one training seed, which is all that a run has, or few users.

    Args:
        results: Of the run.
        name: How a task is named.

    Returns:
        One sentence; nothing for a run with enough of both.
    """
    few = [name(task) for task in results.tasks if few_users(results, task)]
    short = [
        "one training seed" if results.training else "",
        f"fewer than {USERS} users for {listed(few)}" if few else "",
    ]
    said = ", and ".join(filter(None, short))
    return f"Exploratory, with {said}." if said else ""


def few_users(results: Results, task: str) -> bool:
    """Say whether a task has too few users for a claim; False where results do not say how many it has."""
    return any(row.task == task and row.users is not None and row.users < USERS for row in results.rows)


def _asks(results: Results) -> bool:
    return any(row.arm != "baseline" for row in results.rows)


def brought(results: Results, task: str) -> str:
    """Say what the fusion of a task reaches beside its best part, and what each part brought to it.

    Returns:
        Two sentences; nothing for a task without a fusion.
    """
    metric = results.headline[task]
    joined = [
        row for row in results.standings(task) if row.fusion is not None and row.metrics[metric].value is not None
    ]
    # Of the fusions of one standing the widest joins the most.
    best = max(joined, key=lambda row: len(row.fusion.parts) if row.fusion else 0, default=None)
    if best is None or best.fusion is None:
        return ""
    names = [part.name for part in best.fusion.parts]
    methods = Counter(name.partition("(")[0] for name in names)
    # Parameters only where two parts are one method.
    short = {name: flat(name if methods[name.partition("(")[0]] > 1 else name.partition("(")[0]) for name in names}
    single = next((row for row in results.standings(task) if row.predictor in short), None)
    score = best.metrics[metric]
    first = f"{metric} of the fusion in {title(task)} is {with_interval(score.value, score.low, score.high)}"
    if single is not None:
        first += f", where its best part, {short[single.predictor]}, has {number(single.metrics[metric].value)}"
    told = sorted((part for part in best.fusion.parts if part.loss is not None), key=lambda part: -(part.loss or 0.0))
    gains = [
        f"{short.get(part.name, flat(part.name))} {number(part.loss, sign=True)}"
        for part in told
        if (part.loss_low or 0.0) > 0
    ]
    rest = len(told) - len(gains)
    if not told:
        return f"{first}."
    what = f"What it loses without a part, on validation users: {listed(gains)}" if gains else ""
    several = "one part could" if rest == 1 else f"{rest} parts could each"
    others = f"{several} be left out without a loss that shows" if rest else ""
    said = "; ".join(filter(None, (what, others)))
    return f"{first}. {said[:1].upper()}{said[1:]}."


def _what_ran(results: Results) -> str:
    main, training = results.data.get("main"), results.training
    where, how = "", "was not tuned"
    if main:
        size = f"{count(main.users)} users, {count(main.items)} {visible(main.noun)}"
        where = f" on {visible(main.name)} ({size})"
    if training:
        how = f"was tuned ({training.method}, {count(training.steps)} steps, {duration(training.seconds)})"
    several = "one task" if len(results.tasks) == 1 else f"{len(results.tasks)} tasks"
    if not _asks(results):
        return f"Classic recommenders alone were measured{where} in {several}; no language model was run."
    return f"{visible(results.model_name or 'The model')} {how} and measured{where} in {several}."


def tuning_tally(verdicts: Sequence[TaskVerdict]) -> str:
    """Say in which tasks the planned comparison of the tuned with the zero-shot row came out how."""
    tested = [found for found in verdicts if found.tuned and found.tuned.verdict is not None]
    if not tested:
        return "No comparison of tuned with zero-shot rows was planned."
    names: tuple[Verdict, ...] = ("shown", "contradicted", "not shown")
    groups = {
        name: [title(found.task) for found in tested if found.tuned and found.tuned.verdict == name] for name in names
    }
    several = "the only task" if len(tested) == 1 else f"{len(tested)} tasks"
    parts = [f"{outcome(name)} in {listed(found)}" for name, found in groups.items() if found]
    return f"Tuned against zero-shot, over {several}: {'; '.join(parts)}."


def _control_tally(verdicts: Sequence[TaskVerdict]) -> str:
    ahead = [found for found in verdicts if found.control_leads]
    if not ahead:
        return "No classic baseline is ahead of the best language-model row in any task."
    named = [f"{title(found.task)} ({label(found.best)})" for found in ahead if found.best]
    several = "the only task" if len(verdicts) == 1 else f"{len(ahead)} of {len(verdicts)} tasks"
    return f"A baseline is ahead of every language-model row in {several}: {listed(named)}."
