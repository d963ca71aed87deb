"""The summary at the beginning of a report: what was run, and whether the model improves on the baselines.

The model is the best row of a language model alone; without one it is the row that is served, or else the best
ensemble of classic recommenders. The control is the best baseline; for an ensemble the best single recommender. An
ensemble that contains the language model is neither: the model's contribution to it is reported separately
(`model_contribution`). Differences are always model - control, as in the table of comparisons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from llmrec.display import escape_hidden, single_line
from llmrec.registry import is_lower_better
from llmrec.report.wording import (
    USERS,
    TaskVerdict,
    describe_comparison,
    find_comparison,
    format_count,
    format_duration,
    format_metric_difference,
    format_number,
    format_verdict,
    format_with_interval,
    is_single_language_model,
    join_words,
    label,
    orient_comparison,
    rows_with_value,
    short_names,
    title,
    verdict,
)
from llmrec.results import Comparison, Results, Row, Verdict

# --------------------------------------------------------------------------- the main comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """The model of a task and the baseline to which it is compared.

    Attributes:
        task: The family.
        metric: Its headline metric.
        model: The best row of a language model alone; in a run without one the row that is served, or an ensemble;
            None if there is neither.
        control: The best baseline; for an ensemble without a language model the best single one, for a single one
            that is served the best other row.
        difference: ``model - control``, if it was computed.
        names: Names of model and control; with parameters only if rows differ in nothing else.
        served: Whether the model is the one served by default: the best on validation users.
    """

    task: str
    metric: str
    model: Row | None
    control: Row | None
    difference: Comparison | None
    names: tuple[str, str]
    served: bool = False

    @property
    def verdict(self) -> Verdict | None:
        """The verdict of the comparison; None if it was not planned or not computed."""
        return self.difference.verdict if self.difference else None

    @property
    def relative_to(self) -> float | None:
        """The value of the baseline, if the difference can be expressed relative to it."""
        value = None if self.control is None else self.control.metrics[self.metric].value
        return value if value is not None and value > 0 else None


def headline(results: Results, task: str, model: Row | None = None) -> Headline:
    """Return the model and the baseline of a task, and their comparison.

    Args:
        results: Results of a run.
        task: The family.
        model: The row to compare, if not the default of `Headline`.
    """
    metric = results.headline[task]
    rows = rows_with_value(results, task)
    asks = any(row.arm != "baseline" for row in results.rows if row.task == task)
    served = served_row(results, task)
    if model is None and not asks:
        model = served
    if model is None:
        model = next((row for row in rows if (is_single_language_model(row) if asks else row.fusion is not None)), None)
    plain = model is not None and (model.arm != "baseline" or (model is served and model.fusion is None))
    single = plain or (model is None and asks)
    controls = [row for row in rows if row.arm == "baseline" and (single or row.fusion is None)]
    control = next((row for row in controls if model is None or row.differs(model)), None)
    short = short_names(rows)
    names = tuple("" if row is None else short[row.id] for row in (model, control))
    return Headline(
        task=task,
        metric=metric,
        model=model,
        control=control,
        difference=find_comparison(results, model, control),
        names=(names[0], names[1]),
        served=model is not None and model is served,
    )


def served_row(results: Results, task: str) -> Row | None:
    """Return the model of a task that is served by default; None if another task has it."""
    choice = results.choice
    return next((row for row in results.rows if choice and (row.task, row.id) == (task, choice.row)), None)


def report_question(results: Results, found: Iterable[Headline]) -> str:
    """Return the question that a report answers first."""
    if results.has_language_model:
        return "Is the model better than the best baseline?"
    if any(entry.served and entry.model is not None and entry.model.fusion is None for entry in found):
        return "Is the served recommender better than the best other one?"
    return "Is the ensemble better than the best single recommender?"


def headline_sentence(entry: Headline) -> str:
    """Return a sentence on whether the model is better than the baseline, with difference and interval."""
    if entry.model is None or entry.control is None:
        lacking = "language model or ensemble" if entry.model is None else "baseline"
        return f"No {lacking} has a value for {entry.metric}."
    model, control = entry.names
    if entry.difference is None:
        figures = [format_number(row.metrics[entry.metric].value) for row in (entry.model, entry.control)]
        turned = " (lower is better)" if is_lower_better(entry.metric) else ""
        reached = f"{model} has {entry.metric} {figures[0]} and {control} {figures[1]}{turned}"
        return f"{reached}; the difference was not tested."
    users = entry.model.users
    over = f", {format_count(users)} users" if users else ""
    return (
        f"{describe_comparison(entry.difference, model, control)}: {format_metric_difference(entry.difference)}{over}."
    )


def gain(metric: str, value: float) -> float:
    """Return a difference with the sign chosen so that above 0 is better."""
    return -value if is_lower_better(metric) else value


def main_finding(results: Results) -> str:
    """Return what the language model adds to the baselines; without one, which baseline is served and why."""
    asks = results.has_language_model
    tasks = [task for task in results.tasks if not asks or served_row(results, task) is not None]
    served = [served_model_sentences(results, task) for task in tasks]
    return " ".join(filter(None, (*served, contribution_sentence(results))))


def summary_paragraph(results: Results) -> str:
    """Return the first paragraph of the summary."""
    verdicts = [verdict(results, task) for task in results.tasks]
    tallies = (tuning_tally(verdicts), _control_tally(verdicts)) if results.has_language_model else ()
    return " ".join(
        filter(None, (_describe_run(results), *tallies, main_finding(results), exploratory_reason(results)))
    )


def model_contribution(results: Results, task: str) -> Comparison | None:
    """Return the fine-tuned model's contribution to the ensemble of baselines, as a comparison.

    With several ensembles without it, the best one of the planned comparisons counts.
    """
    metric, rows = results.headline[task], {row.id: row for row in results.rows}
    ranks = {row.id: index for index, row in enumerate(results.standings(task))}
    joined = {name for name in ranks if rows[name].fusion is not None}
    pairs = [
        orient_comparison(entry, entry.a if rows[entry.a].arm == "tuned" else entry.b)
        for entry in results.comparisons
        if (entry.task, entry.metric) == (task, metric)
        and {entry.a, entry.b} <= joined
        and {rows[entry.a].arm, rows[entry.b].arm} == {"tuned", "baseline"}
    ]
    return min(pairs, key=lambda entry: (entry.verdict is None, ranks[entry.b]), default=None)


def has_zero_weight(results: Results, ensemble: str) -> bool:
    """Whether an ensemble gives its language model the weight 0."""
    row = results.row(ensemble)
    classic = {entry.predictor for entry in results.rows if entry.task == row.task and entry.arm == "baseline"}
    weights = [part.weight for part in row.fusion.parts if part.name not in classic] if row.fusion else []
    return bool(weights) and not any(weights)


def contribution_sentence(results: Results) -> str:
    """Return a sentence on the fine-tuned model's contribution to the ensemble of baselines.

    Returns:
        One sentence; empty for a run without a tuned model.
    """
    if not any(row.arm == "tuned" for row in results.rows):
        return ""
    parts = []
    for task in results.tasks:
        result = model_contribution(results, task)
        if result is not None:
            nothing = ", with weight 0" if has_zero_weight(results, result.a) else ""
            parts.append(
                f"{format_metric_difference(result)} in {title(task)}{nothing}, {format_verdict(result.verdict)}"
            )
    if not parts:
        return "The contribution of the fine-tuned model to an ensemble of baselines was not measured (eval.fusion)."
    return f"Adding the fine-tuned model to the ensemble of the baselines: {'; '.join(parts)}."


def exploratory_reason(results: Results, name: Callable[[str], str] = title) -> str:
    """Return why a run is exploratory: it has a single training seed, or few users.

    Args:
        results: Results of the run.
        name: Returns the name of a task.

    Returns:
        One sentence; empty for a run with enough of both.
    """
    few = [name(task) for task in results.tasks if has_few_users(results, task)]
    short = [
        "one training seed" if results.training else "",
        f"fewer than {USERS} users for {join_words(few)}" if few else "",
    ]
    reasons = ", and ".join(filter(None, short))
    return f"Exploratory: {reasons}." if reasons else ""


def has_few_users(results: Results, task: str) -> bool:
    """Whether a task has too few users for a claim; False if their number is unknown."""
    return any(row.task == task and row.users is not None and row.users < USERS for row in results.rows)


def served_model_sentences(results: Results, task: str) -> str:
    """Return which model of a task is served and why, with its test result.

    Without a chosen row it is about the best ensemble.

    Returns:
        Sentences; empty for a task with neither.
    """
    metric, served = results.headline[task], served_row(results, task)
    joined = [row for row in rows_with_value(results, task) if row.fusion is not None]
    row = served or next(iter(joined), None)
    if row is None:
        return ""
    result = headline(results, task, row)
    score, name = row.metrics[metric], result.names[0]
    reached = f"{metric} of {name} in {title(task)} is {format_with_interval(score.value, score.low, score.high)}"
    if row.users:
        reached += f" on {format_count(row.users)} test users"
    if result.control is not None and result.difference is not None:
        reached += (
            f". {describe_comparison(result.difference, *result.names)}: {format_metric_difference(result.difference)}"
        )
    elif result.control is not None:
        reached += f"; {result.names[1]} has {format_number(result.control.metrics[metric].value)}"
    return " ".join(filter(None, (_choice_sentence(results, task), f"{reached}.", _ablation_sentence(row, results))))


def _choice_sentence(results: Results, task: str) -> str:
    """Return which model is served and how it was chosen; empty if it belongs to another task."""
    choice, row = results.choice, served_row(results, task)
    if choice is None or row is None:
        return ""
    short = short_names(rows_with_value(results, task))
    figures = sorted(choice.figures.items(), key=lambda entry: -entry[1])
    second = next(((name, value) for name, value in figures if name != choice.row), None)
    after = f"; the second best is {short.get(second[0], second[0])}, {second[1]:.4f}" if second else ""
    return (
        f"{short.get(row.id, label(row))} is served: it has the best {choice.metric} of {len(figures)} recommenders on "
        f"{format_count(choice.users)} validation users, {choice.value:.4f}{after}."
    )


def _ablation_sentence(row: Row, results: Results) -> str:
    """Return a sentence on how much an ensemble loses without each of its members."""
    if row.fusion is None:
        return ""
    rows = [entry for entry in results.rows if entry.task == row.task]
    names = short_names(rows)
    short = {entry.predictor: names[entry.id] for entry in rows if entry.fusion is None}
    parts = sorted((part for part in row.fusion.parts if part.loss is not None), key=lambda part: -(part.loss or 0.0))
    gains = [
        f"{short.get(part.name, single_line(part.name))} {format_number(part.loss, sign=True)}"
        for part in parts
        if (part.loss_low or 0.0) > 0
    ]
    rest = len(parts) - len(gains)
    if not parts:
        return ""
    what = f"Ablation on validation users (loss without a member): {join_words(gains)}" if gains else ""
    several = "one member could" if rest == 1 else f"{rest} members could each"
    others = f"{several} be removed without a significant loss" if rest else ""
    text = "; ".join(filter(None, (what, others)))
    return f"{text[:1].upper()}{text[1:]}."


def _describe_run(results: Results) -> str:
    main, training = results.data.get("main"), results.training
    where, how = "", "was not fine-tuned"
    if main:
        size = f"{format_count(main.users)} users, {format_count(main.items)} {escape_hidden(main.noun)}"
        where = f" on {escape_hidden(main.name)} ({size})"
    if training:
        steps = f"{format_count(training.steps)} steps"
        how = f"was fine-tuned ({training.method}, {steps}, {format_duration(training.seconds)})"
    several = "one task" if len(results.tasks) == 1 else f"{len(results.tasks)} tasks"
    if not results.has_language_model:
        return f"Baselines were evaluated{where} on {several}, without a language model."
    return f"{escape_hidden(results.model_name or 'The model')} {how} and evaluated{where} on {several}."


def tuning_tally(verdicts: Sequence[TaskVerdict]) -> str:
    """Return the verdicts on fine-tuned versus zero-shot models, with their tasks."""
    tested = [result for result in verdicts if result.tuned and result.tuned.verdict is not None]
    if not tested:
        return "No comparison of fine-tuned and zero-shot was planned."
    names: tuple[Verdict, ...] = ("shown", "contradicted", "not shown")
    groups = {
        name: [title(result.task) for result in tested if result.tuned and result.tuned.verdict == name]
        for name in names
    }
    several = "the only task" if len(tested) == 1 else f"{len(tested)} tasks"
    parts = [f"{format_verdict(name)} in {join_words(result)}" for name, result in groups.items() if result]
    return f"Fine-tuned vs. zero-shot, {several}: {'; '.join(parts)}."


def _control_tally(verdicts: Sequence[TaskVerdict]) -> str:
    best = [(title(result.task), result.best) for result in verdicts]
    named = [f"{task} ({label(row)})" for task, row in best if row is not None and row.arm == "baseline"]
    if not named:
        return "No baseline is better than the best language model in any task."
    several = "the only task" if len(verdicts) == 1 else f"{len(named)} of {len(verdicts)} tasks"
    return f"A baseline is better than every language model in {several}: {join_words(named)}."
