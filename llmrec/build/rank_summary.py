"""What a ranking of many requests says of itself at its end, for the console and as JSON."""

from __future__ import annotations

from typing import Any

from llmrec.build.engines import dtype_name
from llmrec.build.facts import machine, versions
from llmrec.build.rank_job import Job
from llmrec.build.rank_options import RankOptions
from llmrec.build.rank_progress import Tally
from llmrec.build.stages import Budget
from llmrec.data.request_files import RequestFile
from llmrec.durable import sha256_of


def summary_of(options: RankOptions, source: RequestFile, job: Job, tally: Tally, budget: Budget) -> dict[str, Any]:
    """Return what the console and the JSON file say."""
    ranking = budget.stages.get("ranking", 0.0)
    return {
        "key": job.key,
        "model": options.model,
        "requests": str(options.requests),
        "out": str(options.out),
        "sha256": sha256_of(options.out),
        "task": job.way.family,
        "template": job.way.template,
        "strategy": job.way.strategy,
        "options": job.way.options,
        "engine": job.engine,
        "server": options.server_model if job.engine == "openai" else None,
        "dtype": dtype_name(job.bundle.model),
        "window": job.encoder.max_length,
        "history": job.bundle.tasks.present()[job.way.family].history,
        "retriever": job.retriever.identity if job.retriever else None,
        "lines": tally.lines,
        "blank_lines": source.blank,
        "ranked": tally.lines - tally.failed,
        "failed": tally.failed,
        "failures": tally.failures,
        "with_notes": tally.noted,
        "notes": tally.notes,
        "with_retrieved": tally.retrieved,
        "prompt_tokens": tally.prompt_tokens,
        "completion_tokens": tally.completion_tokens,
        "forwards": tally.forwards,
        "per_request": _means(tally, tally.prompt_tokens, tally.completion_tokens, tally.forwards),
        "rationale": _rationale(tally) if job.reasoner else None,
        "from_earlier_run": tally.lines - tally.fresh,
        "requests_per_second": round(tally.fresh_ranked / ranking, 3) if tally.fresh_ranked else None,
        "tokens_per_second": round(tally.fresh_tokens / ranking, 1) if tally.fresh_ranked else None,
        "seconds_per_request": _seconds(tally),
        "seconds": {name: round(spent, 3) for name, spent in budget.stages.items()},
        "versions": versions(),
        "machine": machine(),
    }


def _means(tally: Tally, prompt_tokens: int, completion_tokens: int, forwards: int) -> dict[str, float] | None:
    """Return the mean cost of a line that was ranked; None if none was."""
    ranked = tally.lines - tally.failed
    costs = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "forwards": forwards}
    return {name: round(cost / ranked, 2) for name, cost in costs.items()} if ranked else None


def _rationale(tally: Tally) -> dict[str, Any]:
    total = tally.rationale
    costs = (total.prompt_tokens, total.completion_tokens, total.forwards)
    return {
        "written": tally.written,
        "prompt_tokens": total.prompt_tokens,
        "completion_tokens": total.completion_tokens,
        "forwards": total.forwards,
        "per_request": _means(tally, *costs),
    }


def _seconds(tally: Tally) -> dict[str, float] | None:
    """Return seconds a request in the parts that this invocation ranked: over all of them, the fastest, the slowest."""
    if not tally.parts:
        return None
    each = [part.seconds / part.lines for part in tally.parts]
    whole = sum(part.seconds for part in tally.parts) / sum(part.lines for part in tally.parts)
    return {"mean": round(whole, 4), "fastest_part": round(min(each), 4), "slowest_part": round(max(each), 4)}
