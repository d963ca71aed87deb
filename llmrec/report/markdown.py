"""The whole report as one Markdown page: what the HTML page says, without plots, example prompts and raw answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from llmrec.report import texts, wording
from llmrec.report.audit import AuditLine, audit_sentence
from llmrec.report.costs import cost_by_arm, cost_by_row
from llmrec.report.escape import cell, code, visible
from llmrec.report.marks import SINGLE, Over, spreads
from llmrec.report.positions import bands, sentences, shown_rows
from llmrec.report.records import Results, Sample, Training
from llmrec.report.results import dump, made_data, signatures
from llmrec.report.slices import slice_table
from llmrec.report.table import comparisons_markdown, grid, task_markdown
from llmrec.report.wording import DASH, count, duration, label, number, rough, title, with_interval


def markdown_page(
    results: Results,
    reasons: Mapping[str, Mapping[str, int]],
    audit: Sequence[AuditLine] | None,
    *,
    mend: str,
) -> str:
    """Return the report as Markdown.

    Args:
        results: Checked results.
        reasons: Row id to failure reason to count.
        audit: Lines of the audit; None where there was none.
        mend: The command that makes the audit.
    """
    parts = [f"# {cell(results.name)}", *(cell(aside.said) for aside in results.set_aside)]
    parts.append(cell(wording.summary(results)))
    for task in results.tasks:
        found = wording.verdict(results, task)
        said = f"{wording.winner_sentence(found)} {wording.tuning_sentence(found, results.rows)}"
        parts.append(f"- **{cell(title(task))}.** {cell(said)}")
    parts += [f"Made data: {cell(', '.join(made))}." for made in [made_data(results)] if made]
    parts.append("## Results")
    for task in results.tasks:
        parts += [f"### {cell(title(task))}", task_markdown(results, task)]
        parts += _templates(results, task) + _positions(results, task)
        parts += _reliability(results, task) + _slices(results, task)
    if results.texts:
        parts += ["## Texts", *_texts(results)]
    if results.comparisons:
        parts += ["## Comparisons", comparisons_markdown(results)]
    parts += ["## Training", *_training(results)]
    parts += ["## Cost", *_costs(results)]
    parts += ["## Parse failures", *_failures(results, reasons)]
    parts += ["## Audit", *audit_markdown(audit, mend)]
    parts += ["## Protocol", *_protocol(results)]
    if results.notes:
        parts += ["## Notes", "\n".join(f"- {cell(note)}" for note in results.notes)]
    return "\n\n".join(parts) + "\n"


def _templates(results: Results, task: str) -> list[str]:
    found = spreads(results, task)
    if not found:
        return []
    rows = [
        [cell(spread.label), *_over(spread.seen), *_over(spread.unseen), SINGLE if spread.single else ""]
        for spread in found
    ]
    header = ["Arm and strategy", "Seen", "mean", "min", "max", "Unseen", "mean", "min", "max", ""]
    note = f"{results.headline[task]} over the templates that a result was measured with; seen: also used in training."
    return ["#### Templates", grid(header, rows), cell(note)]


def _over(over: Over | None) -> list[str]:
    if over is None:
        return [DASH] * 4
    return [str(len(over.templates)), *(number(value) for value in (over.mean, over.low, over.high))]


def _positions(results: Results, task: str) -> list[str]:
    rows = shown_rows(results, task)
    if not rows:
        return []
    lines = [
        [
            cell(label(row)),
            band.name,
            count(band.n),
            with_interval(band.hit, band.hit_low, band.hit_high),
            f"{band.mean_rank} {band.rank_bounds}".rstrip(),
        ]
        for row in rows
        for band in bands(row)
    ]
    header = ["Row", "Target stands at", "n", "HR@1", "Mean rank"]
    return ["#### Position of the target", *(cell(said) for said in sentences(results, task)), grid(header, lines)]


def _reliability(results: Results, task: str) -> list[str]:
    lines = [
        [cell(label(row)), count(each.n), number(each.said), number(each.so)]
        for row in results.standings(task)
        for each in row.reliability
    ]
    if not lines:
        return []
    note = "Answers in up to ten groups of about equal size, by their probability of a yes."
    return ["#### Calibration", grid(["Row", "n", "Mean P(yes)", "Share of yes"], lines), note]


def _slices(results: Results, task: str) -> list[str]:
    table = slice_table(results, task)
    if table is None:
        return []
    lines = [
        [
            cell(line.title) + (" (few)" if line.small else ""),
            count(line.n) if line.users in (None, line.n) else f"{count(line.n)}, {count(line.users)} users",
            *(with_interval(f.value, f.low, f.high) if f else DASH for f in line.figures),
        ]
        for line in table.lines
    ]
    header = ["Slice", "n", *(cell(label(row)) for row in table.rows)]
    notes = [
        f"{table.metric} with 95 % intervals of the best row of each arm and of the best baseline. Few: too few cases "
        "to say much."
    ]
    notes += [f"No case falls into: {'; '.join(table.empty)}."] if table.empty else []
    return ["#### Slices", grid(header, lines), *(cell(note) for note in notes)]


def _texts(results: Results) -> list[str]:
    parts = []
    for task in texts.text_tasks(results):
        found = texts.samples(results, task)
        more = f" The first {texts.OPEN} of them; the page has all." if len(found) > texts.OPEN else ""
        parts += [f"### {cell(title(task))}", texts.about_choice(results, found) + more]
        for place, sample in enumerate(found[: texts.OPEN], start=1):
            parts += [f"#### {place}: {cell(sample.item.title or sample.item.id)}", _sample(results, sample)]
    return parts


def _sample(results: Results, sample: Sample) -> str:
    lines = [f"For {cell(texts.who(sample))}, item {cell(sample.item.id)}"]
    lines += [f"{cell(name)}: {cell(value)}" for name, value in sample.item.fields.items()]
    for told in sample.told:
        where = texts.asked_by(results, sample, told)
        lines.append(f"{cell(told.name)}{f' ({cell(where)})' if where else ''}: {cell(told.text)}")
    lines.append(f"True text: {cell(sample.truth)}")
    for row, written in texts.answered(results, sample):
        failed = f"(could not be read) {cell(f'{written.error}: {written.raw}' if written.raw else written.error)}"
        lines.append(f"{cell(label(row))}: {failed if written.text is None else cell(written.text)}")
    return "\n".join(f"- {line}" for line in lines)


def _training(results: Results) -> list[str]:
    training = results.training
    if training is None:
        return ["Nothing was trained in this run."]
    facts = {
        "Method": cell(training.method),
        "Steps": count(training.steps),
        "Tokens": f"{count(training.tokens)}, {count(training.target_tokens)} of them with loss",
        "Time": f"{duration(training.seconds)}, {count(training.tokens_per_second)} tokens a second",
        "Trained parameters": f"{count(training.trainable_parameters)} of {count(training.total_parameters)}",
        "Rows": cell(", ".join(f"{task} {count(rows)}" for task, rows in training.rows.items()) or DASH),
        "Adapter": code(training.adapter_sha256 or DASH),
    }
    lines = [
        [
            str(line.step),
            number(line.loss),
            *(number((line.valid_loss or {}).get(task)) for task in _validated(training)),
        ]
        for line in training.log
        if line.valid_loss
    ]
    header = ["Step", "Loss", *(f"Validation: {cell(title(task))}" for task in _validated(training))]
    found = ["\n".join(f"- {key}: {said}" for key, said in facts.items())]
    return [*found, grid(header, lines, numeric_from=0), "Losses are nats a target token."] if lines else found


def _validated(training: Training) -> tuple[str, ...]:
    return tuple(dict.fromkeys(task for line in training.log for task in line.valid_loss or {}))


def _failures(results: Results, reasons: Mapping[str, Mapping[str, int]]) -> list[str]:
    rows = [
        [
            cell(title(row.task)),
            cell(label(row)),
            f"{count(sum(reasons[row.id].values()))} of {count(row.n)}",
            "; ".join(f"{cell(reason)} × {count(times)}" for reason, times in reasons[row.id].items()),
        ]
        for row in results.rows
        if row.id in reasons
    ]
    if not rows:
        return ["Every answer of every row could be read."]
    note = "An answer that cannot be read counts as a miss; none is dropped."
    return [grid(["Task", "Row", "Failed", "Reasons"], rows, numeric_from=4), note]


def _costs(results: Results) -> list[str]:
    arms = [
        [
            *(arm.arm, str(arm.rows), count(arm.requests), count(arm.read), count(arm.written)),
            *(duration(arm.seconds), count(arm.rate)),
        ]
        for arm in cost_by_arm(results)
    ]
    rows = [
        [
            *(cell(title(task)), cell(label(cost.row)), count(cost.read), count(cost.written)),
            *(rough(cost.tokens_per_request), duration(cost.seconds), duration(cost.seconds_per_request)),
            rough(cost.forwards_per_request),
        ]
        for task in results.tasks
        for cost in cost_by_row(results, task)
    ]
    parts = [grid(["Arm", "Rows", "Requests", "Tokens read", "Written", "Time", "Tokens/s"], arms)]
    header = ["Task", "Row", "Tokens read", "Written", "Tokens a request", "Time", "Time a request"]
    header.append("Forwards a request")
    parts.append(grid(header, rows, numeric_from=2))
    if results.budget:
        stages = [[cell(stage.stage), duration(stage.seconds)] for stage in results.budget]
        parts.append(grid(["Stage", "Time"], [*stages, ["In all", duration(results.seconds)]]))
    return parts


def audit_markdown(audit: Sequence[AuditLine] | None, mend: str) -> list[str]:
    """Return what the audit found, as paragraphs; ``mend`` is the command where there was none."""
    if audit is None:
        return [f"This run was not audited. To audit it: {code(mend)}"]
    rows = [
        [line.verdict, cell(line.name), cell(line.found), "; ".join(cell(example) for example in line.examples)]
        for line in audit
    ]
    return [cell(audit_sentence(audit)), grid(["Verdict", "Check", "Found", "Examples"], rows, numeric_from=4)]


def _protocol(results: Results) -> list[str]:
    facts = {
        "Made by": f"llmrec {results.llmrec}, {results.created}",
        "Command": results.command,
        "Recipe hash": results.recipe_hash,
        "Seed": str(results.seed),
    }
    for kind, data in results.data.items():
        if data:
            facts[f"Data ({kind})"] = (
                f"{data.name}: {data.users} users, {data.items} items, {data.interactions} interactions; "
                f"split {data.split}, {data.train}/{data.valid}/{data.test}; "
                f"fingerprint {data.fingerprint}, split {data.split_fingerprint}"
            )
    for kind, drawn in results.candidates.items():
        if drawn:
            most = f", {drawn.ceiling:.1%} with the target" if drawn.ceiling is not None else ""
            facts[f"Candidates ({kind})"] = f"{drawn.count} a request, {drawn.kind}{most}, digest {drawn.digest}"
    facts["Machine"] = ", ".join(f"{key} {value}" for key, value in results.machine.items())
    facts["Versions"] = ", ".join(f"{key} {value}" for key, value in results.versions.items())
    lines = [f"- {cell(key)}: {cell(value)}" for key, value in facts.items()]
    lines += [
        f"- Signature, {cell(title(task))}, {cell(', '.join(names))}: {cell(protocol)}"
        for task, entries in signatures(results).items()
        for protocol, names in entries.items()
    ]
    text = dump(results.recipe).rstrip()
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return ["\n".join(lines), f"{fence}yaml\n{visible(text)}\n{fence}"]
