"""Ranks a file of requests in shards, on several machines; the output is the same as in a single process."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmrec.answer.rank.options import RankOptions
from llmrec.answer.rank.outputs import check_output_file, mark_outdated, summary_path
from llmrec.answer.rank.ranker import Ranker, with_resolved_model
from llmrec.answer.rank.run import (
    STDOUT,
    PartCost,
    RankingInputs,
    RankTotals,
    check_unique_users,
    empty_parts_folder,
    is_rank_file,
    open_keyed_ranker,
    part_name,
    rank_parts,
    ranking_inputs,
    ranking_summary,
    read_finished_summary,
    read_part_records,
    remove_parts_folder,
    total_and_part_size,
)
from llmrec.data.ranked import resolve_form, write_lists
from llmrec.data.request_file import open_requests
from llmrec.durable import write_checked_json
from llmrec.errors import RecipeError
from llmrec.machine import machine_facts, package_versions
from llmrec.pipeline.resume import StageTimer, lock_folder
from llmrec.pipeline.shards import FinishedShard, finish_shard, job_folder, reusable_shard, shard_folder, verify_shards
from llmrec.records import Shard

log = logging.getLogger(__name__)

_FRESH_COUNTS = ("fresh", "fresh_ranked", "fresh_tokens")


def rank_shard(options: RankOptions, shard: Shard, *, ranker: Ranker | None = None) -> Path:
    """Rank one shard of a file of requests into a folder next to the output; can be resumed.

    Args:
        options: As for the whole file; ``out`` is the file that `merge_rank` writes.
        shard: The shard.
        ranker: A model from `llmrec.answer.rank.ranker.open_ranker` with the same options, for callers that rank
            several shards; it stays open. By default a model is opened and closed here.

    Returns:
        The shard's folder.

    Raises:
        LlmrecError: As `llmrec.answer.rank.run.rank_file`.
    """
    options = with_resolved_model(options)
    if options.target == STDOUT:
        raise RecipeError("--out -: shards are merged into a file; give a file", kind="unsupported", column="--out")
    resolve_form(options.target, options.form)
    reads = (options.source, options.items)
    check_output_file(options.target, reads, option="--out", by="rank", parts=options.parts, restart=options.restart)
    folder, budget = shard_folder(options.target, shard), ranker.budget if ranker else StageTimer()
    before = dict(budget.stages)
    with budget.stage("start"):
        source = open_requests(options.source, bare=options.bare)
    try:
        with lock_folder(folder, is_rank_file):
            if options.restart:
                empty_parts_folder(folder)
                mark_outdated(options.target)
            with open_keyed_ranker(options, source, folder, budget, ranker) as (recommender, key):
                done = reusable_shard(folder, key)
                if done is not None and done.facts["form"] == options.layout:
                    log.warning("shard %s is already complete; use --restart to rank it again", shard)
                else:
                    tally = RankTotals()
                    deque(rank_parts(options, source, recommender, folder, key, tally, shard), maxlen=0)
                    names = [part_name(number) for number in shard.chunks(*total_and_part_size(options, source))]
                    seconds = {name: spent - before.get(name, 0.0) for name, spent in budget.stages.items()}
                    summary = _shard_summary(ranking_inputs(options, source, recommender, key), options, tally, seconds)
                    finish_shard(folder, "rank", shard, key, names, summary)
            # The part contains the answers, so the answer cache is not needed.
            for path in folder.glob("answers.sqlite*"):
                path.unlink()
    finally:
        with suppress(OSError):  # if ranking failed, the folder of the shard does not exist
            job_folder(options.target).rmdir()
    return folder


def drop_shards(target: Path) -> None:
    """Remove the results of earlier calls for all shards of a file, so that each shard is ranked again.

    Raises:
        LlmrecError: If a shard is in progress.
    """
    for folder in sorted(job_folder(target).glob("*-of-*")):
        with lock_folder(folder, is_rank_file):
            remove_parts_folder(folder)
    mark_outdated(target)


def merge_rank(target: Path, folders: Sequence[Path] = ()) -> Mapping[str, Any]:
    """Merge the rankings of all shards into the file that a single process would write, and return the summary.

    Args:
        target: The file of rankings, as given to the shards.
        folders: The shards' folders; by default those next to the file.

    Raises:
        LlmrecError: If shards are missing, damaged, duplicated or from other inputs, or the file cannot be written.
    """
    shards = verify_shards(target, folders)
    first = shards[0].facts
    inputs = RankingInputs(
        first["requests"], target, first["form"], first["blank_lines"], first["model"], shards[0].key
    )
    resolve_form(target, inputs.form)
    parts = target.with_name(target.name + ".parts")
    check_output_file(target, (Path(inputs.requests),), option="the file to merge into", by="rank", parts=parts)
    with lock_folder(parts, is_rank_file):
        done = read_finished_summary(target, inputs.form, inputs.key)
        if done is not None:
            log.warning("%s is already complete", target)
        summary = done or _merge_shards(shards, inputs)
        remove_parts_folder(parts)
    return summary


def _merge_shards(shards: Sequence[FinishedShard], inputs: RankingInputs) -> Mapping[str, Any]:
    paths = [item.folder / name for item in shards for name in item.files]
    tally = RankTotals()
    owners: dict[str, int] = {}
    for path in paths:
        records = list(read_part_records([path]))
        tally.add(records)
        if inputs.form != "records":
            check_unique_users(Path(inputs.requests), records, owners)
    write_lists(inputs.out, read_part_records(paths), inputs.form, shards[0].facts["tag"])
    seconds: Counter[str] = Counter()
    for shard in shards:
        seconds.update(shard.facts["seconds"])
        tally.parts += [PartCost(**part) for part in shard.facts["parts"]]
        for name in _FRESH_COUNTS:
            setattr(tally, name, getattr(tally, name) + shard.facts[name])
    summary = ranking_summary(inputs, tally, seconds)
    summary["shards"] = [
        {"shard": str(shard.shard), **{name: shard.facts[name] for name in ("seconds", "versions", "machine")}}
        for shard in shards
    ]
    write_checked_json(summary_path(inputs.out), summary)
    return summary


def _shard_summary(
    inputs: RankingInputs, options: RankOptions, tally: RankTotals, seconds: Mapping[str, float]
) -> Mapping[str, Any]:
    """Return the values of a shard that the summary of all shards needs."""
    return {
        "requests": inputs.requests,
        "form": inputs.form,
        "blank_lines": inputs.blank_lines,
        "model": dict(inputs.model),
        "tag": options.tag,
        "lines": tally.lines,
        "failed": tally.failed,
        **{name: getattr(tally, name) for name in _FRESH_COUNTS},
        "parts": [asdict(part) for part in tally.parts],
        "seconds": {name: round(spent, 3) for name, spent in seconds.items()},
        "versions": package_versions(),
        "machine": machine_facts(),
    }
