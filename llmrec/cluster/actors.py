"""Runs the shards of a job on Ray actors, scheduled by Ray Data.

The job is stored in the folder of the shards, which all nodes share; Ray transfers only numbers and short records. A
shard that is lost with its process or node is not yielded, and `llmrec.cluster.jobs.run_all_shards` repeats it.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmrec.answer.rank.options import CLUSTER_OPTIONS, RankOptions
from llmrec.answer.rank.ranker import with_resolved_model
from llmrec.answer.rank.run import STDOUT, total_and_part_size
from llmrec.answer.rank.sharded import drop_shards
from llmrec.cli.console import show_run_results, show_shard, show_values
from llmrec.cli.run import RunOptions
from llmrec.cluster.command import merge_shards
from llmrec.cluster.evaluation import evaluate_shard, merge_run
from llmrec.cluster.jobs import (
    SHARDS_PER_ACTOR,
    Job,
    ShardResult,
    Worker,
    choose_shard_count,
    publish_job,
    read_job,
    run_all_shards,
    summarise_workers,
)
from llmrec.cluster.local import evaluate_locally, run_locally
from llmrec.data.request_file import open_requests
from llmrec.durable import read_json
from llmrec.errors import LlmrecError, RecipeError, require
from llmrec.machine import read_processor
from llmrec.pipeline.augmenting import merge_augment
from llmrec.pipeline.run import Run
from llmrec.pipeline.shards import Command, job_folder
from llmrec.pipeline.study import resolve_run_folder
from llmrec.progress import QUIET
from llmrec.recipe.load import detect_page_kind, load_recipe
from llmrec.recipe.schema import RaySection, Recipe
from llmrec.records import Shard
from llmrec.report.page import PAGES

log = logging.getLogger(__name__)

LOCAL = "local"
_EXTRA = "ray"
_KNOCK, _ANSWER = 10.0, 60.0
# only numbers and short records pass through Ray
_STORE = 100_000_000


@dataclass(frozen=True)
class Allocation:
    """Number of actors on a cluster, logical CPUs and GPUs of each, and number of machines that are alive."""

    actors: int
    cpus: float
    gpus: float
    nodes: int


def allocate_actors(nodes: Sequence[Mapping[str, float]], section: RaySection, *, least: int = 1) -> Allocation:
    """Return the number and resources of actors: as many as fit on the cluster, or the requested number.

    Args:
        nodes: The resources of each machine: ``CPU`` and ``GPU``.
        section: The maximum number of actors, and the resources of each.
        least: The minimum number of actors.

    Raises:
        RecipeError: If fewer fit: the job would wait forever.
    """
    gpus = section.gpus if section.gpus is not None else float(any(node.get("GPU", 0) >= 1 for node in nodes))
    fits = [min([node.get("CPU", 0) / section.cpus, *([node.get("GPU", 0) / gpus] if gpus else [])]) for node in nodes]
    most = sum(math.floor(fit + 1e-9) for fit in fits)
    cpus = sum(node.get("CPU", 0) for node in nodes)
    while most and cpus - most * section.cpus < 1:
        most -= 1
    if most < least:
        raise RecipeError(
            f"--ray: {len(nodes)} nodes with {cpus:g} CPUs and {sum(node.get('GPU', 0) for node in nodes):g} GPUs "
            f"have room for {most} actors of {section.cpus:g} CPUs and {gpus:g} GPUs (one CPU is reserved for Ray "
            f"Data); requested: {least}. Request fewer or smaller actors (ray.actors, ray.cpus, ray.gpus; llmrec "
            "rank: --actors, --cpus, --gpus), or start more nodes first",
            kind="exhausted",
            column="--ray",
        )
    return Allocation(min(section.actors or most, most), section.cpus, gpus, len(nodes))


@contextmanager
def cluster(address: str, section: RaySection) -> Iterator[Any]:
    """Start Ray on this machine or connect to a cluster, and provide the Ray module.

    Raises:
        MissingExtra: If Ray is not installed.
        LlmrecError: If the address does not respond, or Ray does not start.
    """
    # Ray sends usage statistics unless they are disabled before its import.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray = require("ray", _EXTRA)
    require("ray.data", _EXTRA)
    fields: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        cpus = max(read_processor().usable, math.ceil((section.actors or 0) * section.cpus)) + 1
        fields |= {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": _STORE}
    else:
        check_cluster_address(address)
    try:
        ray.init(address=address, **fields)
    except Exception as error:
        raise LlmrecError(
            f"--ray {address}: {str(error).splitlines()[0] if str(error) else type(error).__name__}; "
            + ("start the command again" if address == LOCAL else "start the command on a node of that cluster"),
            kind="unreachable",
            column="--ray",
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def check_cluster_address(address: str) -> None:
    """Check whether a cluster responds at an address, because Ray could block for long or end the process.

    Raises:
        RecipeError: If it is not a valid cluster address.
        LlmrecError: If there is no response in time.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise RecipeError(
            f"--ray {address}: name {LOCAL}, or the HOST:PORT of a cluster's head node (ray start --head prints it); "
            "clients (ray://) cannot see the shared folder, so start the command on a node of the cluster",
            kind="bad-value",
            column="--ray",
        )
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        socket.create_connection((host, int(port)), timeout=_KNOCK).close()
        subprocess.run(command, timeout=_ANSWER, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except (OSError, OverflowError, subprocess.SubprocessError) as error:
        why = "it is not a Ray head node, or requires its token"
        raise LlmrecError(
            f"--ray {address}: no Ray cluster found "
            f"({why if isinstance(error, subprocess.SubprocessError) else error}); check that the head node runs (ray "
            "status), and its token (ray get-auth-token)",
            kind="unreachable",
            column="--ray",
        ) from None


class Actor:
    """A `Worker` in a Ray process, which receives rows of Ray Data.

    Args:
        folder: See `Worker`.
        token: See `Worker`.
        count: See `Worker`.
    """

    def __init__(self, folder: str, token: str, count: int) -> None:
        os.environ[QUIET] = "1"
        ray = require("ray", _EXTRA)
        node = f"{ray.util.get_node_ip_address()} ({ray.get_runtime_context().get_node_id()[:8]})"
        self._worker = Worker(Path(folder), token, count, node)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Run the shard that a row names."""
        return {"worked": self._worker.work(int(row["shard"])).as_json()}


def run_on_actors(
    ray: Any, arguments: Mapping[str, Any], section: RaySection, numbers: Sequence[int]
) -> Iterator[ShardResult]:
    """Run shards on actors; see `llmrec.cluster.jobs.ShardRunner`.

    Args:
        ray: The module, connected to a cluster.
        arguments: Constructor arguments of an actor.
        section: The resources of an actor.
        numbers: Numbers of the shards.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # A lost shard is not an error: it is missing in the results and run again.
    context.max_errored_blocks = -1
    resources = allocate_actors(live_node_resources(ray), section)
    rows = ray.data.from_items([{"shard": number} for number in numbers], override_num_blocks=len(numbers))
    pool = ray.data.ActorPoolStrategy(size=min(resources.actors, len(numbers)), max_tasks_in_flight_per_actor=1)
    # A dead process is restarted on its node, but its shard is not retried there: if the node is lost, the shard
    # would wait forever.
    lasting = {"max_restarts": -1, "max_task_retries": 0, "num_cpus": resources.cpus, "num_gpus": resources.gpus}
    result = rows.map(Actor, fn_constructor_kwargs=dict(arguments), compute=pool, **lasting)
    try:
        for row in result.iter_rows():
            yield ShardResult.parse(row["worked"])
    except ray.exceptions.RayError as error:
        log.warning("a pass over the shards was interrupted: %s", str(error).splitlines()[0])


def live_node_resources(ray: Any) -> list[Mapping[str, float]]:
    """Return the resources of each live machine."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def run_job_on_cluster(
    address: str,
    job: Job,
    section: RaySection,
    most: int | None = None,
    first: Callable[[], object] = lambda: None,
) -> bool:
    """Run the shards of a job on a cluster, and report the cost.

    Args:
        address: ``local``, or HOST:PORT of a cluster.
        job: The job.
        section: The resources of an actor, and the number of shards.
        most: The number of shards that would not be empty; None: unknown.
        first: Called when the job is locked and the cluster is ready, before existing shards are read.

    Returns:
        Whether the shards are merged already, which those of a ranking are not.

    Raises:
        LlmrecError: If the cluster cannot be used, or a shard fails.
    """
    with publish_job(job) as token, cluster(address, section) as ray:
        resources = allocate_actors(live_node_resources(ray), section, least=section.actors or 1)
        first()
        default = SHARDS_PER_ACTOR * resources.actors
        count = choose_shard_count(job.target, section.shards, default if most is None else max(1, min(default, most)))
        fields = {"folder": str(job_folder(job.target).absolute()), "token": token, "count": count}
        done = run_all_shards(job, count, partial(run_on_actors, ray, fields, section))
        nodes, processes, tokens = summarise_workers(done)
        spent = sum(entry.seconds for entry in done)
        cost = {"tokens": f"{tokens:,}"} if tokens else {}
        rows = {
            "shards": str(count),
            "actors": f"{processes} on {nodes} nodes",
            **cost,
            "actor seconds": f"{spent:.1f}",
        }
        facts = {"shards": count, "actors": processes, "nodes": nodes, "tokens": tokens, "actor_seconds": spent}
        show_values("ray", rows, record={"ray": facts})
        if resources.gpus and job.command != "rank":
            # Answers depend on the type of device, so they are merged on a device of the same type.
            merge = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=0)(_merge)
            ray.get(merge.remote(fields["folder"], token))
    return resources.gpus > 0


def _merge(folder: str, token: str) -> None:
    os.environ[QUIET] = "1"
    job = read_job(Path(folder), token)
    (merge_run if job.command == "eval" else merge_augment)(job.target, quiet=True)


def rank_on_cluster(options: RankOptions, address: str) -> None:
    """Rank a file of requests on a cluster, and print the results.

    Raises:
        LlmrecError: See `run_job_on_cluster` and `llmrec.answer.rank.run.rank_file`.
    """
    if options.target == STDOUT:
        raise RecipeError("--out -: shards are merged into a file; name a file", kind="unsupported", column="--out")
    options = with_resolved_model(options)
    total, size = total_and_part_size(options, open_requests(options.source, bare=options.bare))
    settings = {name: getattr(options, name) for name in CLUSTER_OPTIONS}
    try:
        section = RaySection(**settings)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        raise RecipeError(
            f"--{name} {settings[name]}: {error.errors()[0]['msg'].lower()}", kind="bad-value", column=f"--{name}"
        ) from None
    # Restart once and on this machine: a lost shard is run again, and keeps its finished parts.
    job = Job("rank", options.target, replace(options, restart=False))
    drop = partial(drop_shards, options.target) if options.restart else lambda: None
    run_job_on_cluster(address, job, section, -(-total // size), drop)
    merge_shards(options.target)


def run_recipe_on_cluster(address: str, command: Command, target: Path, recipe: Recipe) -> None:
    """Evaluate a recipe or generate its texts on a cluster, and print the results.

    Raises:
        LlmrecError: See `run_job_on_cluster`; also the errors of the command in one process.
    """
    merged = run_job_on_cluster(address, Job(command, target, recipe), recipe.ray)
    if command != "eval" or not merged:
        # an existing feature store is not changed
        merge_shards(target)
        return
    results = read_json(target / "results.json", "run the command again")
    show_run_results(Run(target, results, (), target / "report" / PAGES["html"]))


def evaluate_in_shards(options: RunOptions, *, trains: bool = False) -> None:
    """Evaluate one or all shards of a recipe, on a cluster or on this machine.

    Args:
        options: The recipe, its run folder, and one of ``shard``, ``ray`` and ``launch``.
        trains: With ``launch``, train first, and generate the texts of the recipe.

    Raises:
        RecipeError: If the file is not a recipe.
    """
    option = "--shard" if options.shard is not None else "--ray" if options.ray is not None else "--launch"
    shard = None if options.shard is None else Shard.parse(options.shard)
    if (kind := detect_page_kind(options.recipe)) != "recipe":
        raise RecipeError(
            f"{option}: {options.recipe} is a {kind}; evaluate its recipes in shards, and then the {kind}",
            kind="unsupported",
            column=option,
        )
    recipe = load_recipe(options.recipe, options.overrides)
    home = resolve_run_folder(recipe, options.out)
    if options.ray is not None:
        run_recipe_on_cluster(options.ray, "eval", home, recipe)
    elif options.launch is not None:
        show_run_results(
            run_locally(recipe, home, options) if trains else evaluate_locally(recipe, home, options.launch)
        )
    elif shard is not None:
        show_shard(evaluate_shard(recipe, options.out, shard), home)
