"""Measures a fine-tuned model at several depths and dtypes, and exports the best one that is fast enough.

A model evaluated at a depth equals a model truncated there (`llmrec.models.exits`), so the export is an ordinary model
with fewer layers. A run with ``train.exits`` was trained to answer at each of these depths.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from llmrec import __version__
from llmrec.backends.encode import Encoder
from llmrec.backends.hf.backend import HFBackend
from llmrec.durable import write_json, write_text
from llmrec.errors import LlmrecError, ModelError, require
from llmrec.evaluate.predictor import evaluate
from llmrec.exports import safety
from llmrec.exports.agreement import build_validation_study
from llmrec.exports.export import write_export
from llmrec.exports.files import check_replaceable, remove_machine_paths
from llmrec.exports.options import ExportOptions
from llmrec.machine import machine_facts
from llmrec.models import bottleneck
from llmrec.models.load import device, load_config, load_model, load_tokenizer, release_memory, silence_libraries
from llmrec.pipeline.row_specs import protocol_of
from llmrec.pipeline.runs import open_run
from llmrec.pipeline.study import Study
from llmrec.recipe.schema import ModelSection, Recipe
from llmrec.recipe.shared import Dtype
from llmrec.registry import is_lower_better
from llmrec.report.canvas import HALF, NARROW, Canvas, linear_or_log_scale, linear_scale
from llmrec.report.charts import draw_legend
from llmrec.report.render import html_environment, read_style_sheet
from llmrec.strategies.asking import Prompting, create_strategy
from llmrec.tasks.family import family_of

# --------------------------------------------------------------------------- combinations


WeightFormat = Literal["bfloat16", "float32", "int8"]
"""The storage format of weights; int8: only the linear layers of the blocks, the rest in bfloat16."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """The measurements of a model at one depth and dtype.

    Attributes:
        layers: Number of layers.
        dtype: The dtype of its weights.
        quality: The primary metric on the cases; None if it is undefined.
        ms: Latency for 20 candidates in milliseconds.
        mb: Size of its weights in megabytes.
        pareto: Whether it is on the Pareto front of these three.
    """

    layers: int
    dtype: WeightFormat
    quality: float | None
    ms: float
    mb: float
    pareto: bool = False


@dataclass(frozen=True, slots=True)
class CompressionResult:
    """The result of `llmrec compress`.

    Attributes:
        metric: The metric, with its family.
        cases: Number of validation cases.
        target_ms: Maximum latency for 20 candidates in milliseconds.
        rows: Combinations, fastest first.
        chosen: The best that is fast enough, if any.
        folder: The folder of the export.
    """

    metric: str
    cases: int
    target_ms: float
    rows: tuple[Measurement, ...]
    chosen: Measurement | None
    folder: Path | None


def mark_pareto_front(rows: Sequence[Measurement], *, lower: bool) -> tuple[Measurement, ...]:
    """Sort the measurements by latency, and mark the Pareto-optimal ones."""

    def figures(row: Measurement) -> tuple[float, float, float]:
        quality = float("-inf") if row.quality is None else -row.quality if lower else row.quality
        return quality, -row.ms, -row.mb

    def beaten(row: Measurement) -> bool:
        values = figures(row)
        return any(
            all(o >= s for o, s in zip(other, values, strict=True)) and other != values for other in map(figures, rows)
        )

    return tuple(sorted((replace(row, pareto=not beaten(row)) for row in rows), key=lambda row: row.ms))


def select_measurement(rows: Sequence[Measurement], target_ms: float, *, lower: bool) -> Measurement | None:
    """Return the best model below the latency target; None if there is none."""
    fast = [row for row in rows if row.ms <= target_ms and row.quality is not None]
    return max(fast, key=lambda row: ((-1 if lower else 1) * float(row.quality or 0), -row.ms), default=None)


# --------------------------------------------------------------------------- result file


PAGE_FILE = "compress.html"
# Marker shape and colour of each dtype.
_DTYPE_MARKERS = {
    "bfloat16": ("circle", "zero-shot"),
    "float32": ("triangle", "tuned"),
    "int8": ("diamond", "few-shot"),
}
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 16, 56, 296


def write_page(result: CompressionResult, name: str, path: Path) -> None:
    """Write the measurements of a run as an HTML page."""
    rows = [row for row in result.rows if row.quality is not None]
    page = html_environment().get_template("compress.html.j2")
    nonce = hashlib.sha256(repr((name, result)).encode()).hexdigest()[:32]
    pictures = [pareto_chart(rows, result, width) for width in (HALF, NARROW)] if rows else []
    write_text(path, page.render(name=name, found=result, plotted=pictures, nonce=nonce, style=read_style_sheet()))


def pareto_chart(rows: Sequence[Measurement], result: CompressionResult, width: float) -> Canvas:
    """Plot quality against latency with the Pareto front, labelled by number of layers."""
    canvas = Canvas(width=width, height=_BOTTOM + 46)
    times = [row.ms for row in rows]
    x_axis = linear_or_log_scale([*times, result.target_ms] if result.target_ms > 0 else times, _LEFT, width - _RIGHT)
    y_axis = linear_scale([row.quality for row in rows], _BOTTOM, _TOP)
    canvas.left(y_axis, _LEFT, x_axis.end, result.metric)
    canvas.below(x_axis, _TOP, _BOTTOM, "milliseconds, log scale" if x_axis.log else "milliseconds", ticks=5)
    if x_axis.low <= result.target_ms <= x_axis.high:
        target_x = x_axis(result.target_ms)
        canvas.line(target_x, _TOP, target_x, _BOTTOM, "reference")
        canvas.text(min(target_x + 4, width - 46), _TOP - 4, "target", "tick halo")
    sign, pareto = -1 if is_lower_better(result.metric.partition(" of ")[0]) else 1, list[Measurement]()
    for row in sorted(rows, key=lambda row: row.ms):
        if not pareto or sign * float(row.quality or 0) > sign * float(pareto[-1].quality or 0):
            pareto.append(row)
    canvas.path([(x_axis(row.ms), y_axis(float(row.quality or 0))) for row in pareto], "curve good")
    draw_legend(canvas, [(dtype, *_DTYPE_MARKERS[dtype]) for dtype in dict.fromkeys(row.dtype for row in rows)], _LEFT)
    for row in rows:
        form, hue = _DTYPE_MARKERS[row.dtype]
        x, y = x_axis(row.ms), y_axis(float(row.quality or 0))
        title = f"{row.layers} layers, {row.dtype}: {row.quality:.4g}, {row.ms:.0f} ms, {row.mb:.0f} MB"
        canvas.mark(form, x, y, f"fill {hue}", size=8 if row == result.chosen else 5, title=title)
        canvas.text(x, y - (14 if row == result.chosen else 10), str(row.layers), "tick halo", anchor="middle")
    return canvas


log = logging.getLogger(__name__)

TABLE_FILE = "compress.json"
CANDIDATE_COUNT = 20
WEIGHT_FORMATS: tuple[WeightFormat, ...] = ("bfloat16", "float32", "int8")
# Tolerance between the quality of the export and the measurement, since the order of sums differs.
_TOLERANCE = 0.01
# Files of a model that change when layers are removed.
_MODEL_FILES = ("model*.safetensors", "model.safetensors.index.json", "config.json", bottleneck.BOTTLENECKS_FILE)


def compress_model(
    run: Path, out: Path, *, target_ms: float, users: int, depths: Sequence[int] = (), force: bool = False
) -> CompressionResult:
    """Measure all depths and dtypes, write the table and its page to the run, and export the chosen model.

    Args:
        run: A run folder with a trained model.
        out: The folder of the export.
        target_ms: Maximum latency for 20 candidates in milliseconds.
        users: Number of validation cases.
        depths: Numbers of layers to try; empty: six, evenly spaced.
        force: Replace an earlier export.

    Raises:
        LlmrecError: If the target is not a number, the run has no model with label answers, or the export's answers
            differ from the measured ones.
    """
    if not math.isfinite(target_ms):
        raise LlmrecError(
            f"the target of {target_ms} ms is not a finite number; give milliseconds, such as 20",
            kind="bad-value",
            column="--target-ms",
        )
    silence_libraries()
    source = open_run(run)
    if source.merged is None:
        raise LlmrecError(
            f"{run / 'merged'} is missing or has changed; run `llmrec train` again", kind="damaged", at=run
        )
    check_replaceable(out, force=force)
    study = build_validation_study(source.recipe, users)
    family = _label_family(study)
    metric, merged = family_of(family).headline_at(source.recipe.eval.cutoffs), run / "merged"
    kinds = [kind for kind in WEIGHT_FORMATS if kind != "int8" or find_spec("bitsandbytes") is not None]
    results = []
    for kind in kinds:
        try:
            results.append(_measure_depths(study, family, merged, kind, depths))
        except ModelError as error:
            if kind != "int8":
                raise
            # Keep earlier measurements if a package does not work here.
            log.warning("int8 is not available: %s", error)
    rows = mark_pareto_front([row for part in results for row in part], lower=is_lower_better(metric))
    best = select_measurement(rows, target_ms, lower=is_lower_better(metric))
    compressed = CompressionResult(
        f"{metric} of {family}", len(study.cases(family)), target_ms, rows, best, out if best is not None else None
    )
    table = {key: value for key, value in asdict(compressed).items() if key != "folder"}
    write_json(run / TABLE_FILE, {**table, "machine": machine_facts(), "llmrec": __version__})
    write_page(compressed, study.recipe.name, run / PAGE_FILE)
    if best is not None:

        def change(draft: Path) -> None:
            truncate_export(merged, draft, source.recipe, best)
            (exported,) = _measure_depths(study, family, draft, best.dtype, (best.layers,))
            if abs((exported.quality or 0.0) - (best.quality or 0.0)) > _TOLERANCE:
                raise LlmrecError(
                    f"{out}: the export has {metric} {exported.quality}, but {best.quality} was measured; this is a "
                    "defect in llmrec, and nothing was exported",
                    kind="defect",
                    at=out,
                )

        dtype: Dtype = "bfloat16" if best.dtype == "int8" else best.dtype
        options = ExportOptions(run=run, out=out, dtype=dtype, check_users=0, force=force)
        write_export(options, change=change)
    return compressed


def truncate_export(merged: Path, draft: Path, recipe: Recipe, row: Measurement) -> None:
    """Replace the weights of an export by a model with fewer layers, and add a note to the model card.

    The weights are the measured ones, in the measured dtype.
    """
    model = load_in_format(merged, row.dtype, recipe)
    body, text_config = model.get_decoder(), model.config.get_text_config()
    for item in (body.config, text_config):
        item.num_hidden_layers = row.layers
        if getattr(item, "layer_types", None):
            item.layer_types = list(item.layer_types)[: row.layers]
    body.layers = body.layers[: row.layers]
    for file in (*draft.glob("model*.safetensors*"), draft / bottleneck.BOTTLENECKS_FILE):
        file.unlink(missing_ok=True)
    with TemporaryDirectory(dir=draft) as folder:
        model.save_pretrained(folder)
        bottleneck.save(model, Path(folder))
        safety.remove_other_files(Path(folder), _MODEL_FILES)
        for file in Path(folder).iterdir():
            file.replace(draft / file.name)
    remove_machine_paths(draft / "config.json")
    card = (draft / "README.md").read_text(encoding="utf-8")
    note = (
        f"\n`llmrec compress` truncated this model after layer {row.layers}. Results above are for the whole model.\n"
    )
    if row.dtype == "int8":
        stored = "int8 in the linear layers of the blocks, bfloat16 elsewhere"
        card = re.sub(r"(?m)^(\| Weights in this folder \|).*$", rf"\1 {stored} |", card)
        note += "\nThe 8-bit weights require transformers with bitsandbytes (`eval.backend: hf`).\n"
    write_text(draft / "README.md", card + note)


def _label_family(study: Study) -> str:
    """Return the first trained task that is answered by label probabilities."""
    for family in study.shares:
        template = study.eval_templates(family)[0]
        if (strategy := study.tasks[family].scored_by(template)) is not None and strategy in ("yes-no", "expected"):
            return family
    raise LlmrecError(
        "early exit needs a task with label probabilities, and this run trained none; compress a run with yes/no or "
        "rating prediction",
        kind="unsupported",
        column="tasks",
    )


def load_in_format(folder: Path, kind: WeightFormat, recipe: Recipe) -> Any:
    """Load a model with its weights in one of the measured dtypes.

    8-bit weights use LLM.int8() of bitsandbytes (Dettmers et al., arXiv 2208.07339): each row of a matrix and each
    token's states are scaled by their largest value.
    """
    section = _model_section(folder, kind, recipe)
    if kind != "int8":
        return load_model(str(folder), section).to(device(section))
    require("bitsandbytes", "quant")
    if getattr(load_config(str(folder), section), "quantization_config", None) is not None:
        return load_model(str(folder), section)
    quantization = require("transformers", "train").BitsAndBytesConfig(load_in_8bit=True)
    return load_model(str(folder), section, quantization_config=quantization)


def _model_section(folder: Path, kind: WeightFormat, recipe: Recipe) -> ModelSection:
    dtype: Dtype = "bfloat16" if kind == "int8" else kind
    return ModelSection(name=str(folder), dtype=dtype, trust_remote_code=recipe.model.trust_remote_code)


class _TimedPredictor:
    """A model that records how many seconds its answers take."""

    def __init__(self, predictor: Any) -> None:
        self.name, self._predictor, self.seconds = predictor.name, predictor, 0.0

    def answer(self, requests: Sequence[Any]) -> Any:
        self._predictor.answer(requests[:1])
        begin = time.perf_counter()
        answers = self._predictor.answer(requests)
        self.seconds = time.perf_counter() - begin
        return answers


def _measure_depths(
    study: Study, family: str, folder: Path, kind: WeightFormat, depths: Sequence[int]
) -> list[Measurement]:
    """Measure a model at several depths."""
    section, cases = _model_section(folder, kind, study.recipe), study.cases(family)
    encoder = Encoder(load_tokenizer(str(folder), section), max_length=study.recipe.model.max_length)
    model = load_in_format(folder, kind, study.recipe)
    layers = len(model.get_decoder().layers)
    template, family_info = study.eval_templates(family)[0], family_of(family)
    results = []
    for depth in sorted({max(1, round(layers * part / 6)) for part in range(1, 7)} if not depths else set(depths)):
        backend = HFBackend(model, encoder, batch_tokens=study.recipe.eval.batch_tokens, exit=depth)
        prompting = Prompting(backend=backend, task=study.tasks[family], template=template.name)
        strategy = study.tasks[family].scored_by(template)
        assert strategy is not None
        timed = _TimedPredictor(create_strategy(strategy, prompting))
        evaluation = evaluate(timed, cases, name=family, kind=family_info.answer, protocol=protocol_of(study, family))
        if backend.exits is None or backend.exits.whole or not backend.exits.taken:
            raise LlmrecError(
                f"early exit needs one-token labels, and this tokenizer splits the labels of {family} into several "
                "tokens; compress a run with yes/no or whole-star ratings",
                kind="unsupported",
                column="tasks",
            )
        quality = evaluation.figures.metrics[family_info.headline_at(study.recipe.eval.cutoffs)].value
        unused = {id(p) for layer in list(model.get_decoder().layers)[depth:] for p in layer.parameters()}
        size = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in unused)
        ms = 1e3 * CANDIDATE_COUNT * timed.seconds / len(cases)
        results.append(Measurement(depth, kind, None if quality is None else float(quality), ms, size / 1e6))
    del model
    release_memory()
    return results
