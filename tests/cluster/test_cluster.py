"""Jobs on a cluster: each shard is processed once, errors, and results equal to one process."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from llmrec.answer.rank import run
from llmrec.answer.rank.options import RankOptions
from llmrec.answer.rank.run import rank_file
from llmrec.answer.rank.sharded import merge_rank, rank_shard
from llmrec.cli.main import app
from llmrec.cluster import actors, jobs
from llmrec.cluster.actors import allocate_actors, check_cluster_address, cluster, rank_on_cluster
from llmrec.cluster.evaluation import merge_run
from llmrec.cluster.jobs import (
    JOB_FILE,
    Job,
    ShardProgress,
    ShardResult,
    Worker,
    choose_shard_count,
    publish_job,
    run_all_shards,
    summarise_workers,
)
from llmrec.data.features import FeatureStore
from llmrec.durable import sha256_of
from llmrec.errors import LlmrecError, MissingExtra, RecipeError
from llmrec.pipeline import engines
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.augmenting import augment, merge_augment
from llmrec.pipeline.resume import lock_folder
from llmrec.pipeline.shards import finish_shard, job_folder, shard_folder
from llmrec.progress import running_tasks
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import RaySection
from llmrec.records import Shard
from tests.answer.rank_cases import items_csv, jsonl, options, records
from tests.augment_recipe import augmenting_recipe
from tests.cluster.test_shards import figures, recipe
from tests.facts import Facts, raises

COUNT = 5


def job_in(folder: Path) -> Job:
    """Return a job that no worker processes."""
    return Job("rank", folder / "out.jsonl", options(folder, folder / "in.jsonl", folder / "out.jsonl"))


def worked(number: int, process: int = 1, **more: Any) -> ShardResult:
    return ShardResult(number, "node", process, 1.0, **more)


def test_lost_shards_are_processed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    passes: list[list[int]] = []

    def spread(numbers: Sequence[int]) -> Iterator[ShardResult]:
        passes.append(list(numbers))
        # Out of order, and the second pass loses all of its shards.
        keep = [[4, 1], [], [2, 5], [3]][len(passes) - 1]
        yield from (worked(number, len(passes), tokens=10) for number in keep)

    with caplog.at_level(logging.WARNING):
        done = run_all_shards(job_in(tmp_path), COUNT, spread)
    assert passes == [[1, 2, 3, 4, 5], [2, 3, 5], [2, 3, 5], [3]]
    assert [each.shard for each in done] == [1, 2, 3, 4, 5]
    assert summarise_workers(done) == (1, 3, 50) and "the processes of 3 shards died" in caplog.text


def test_progress_of_all_shards(tmp_path: Path) -> None:
    seen: list[str] = []

    def spread(numbers: Sequence[int]) -> Iterator[ShardResult | ShardProgress]:
        for entry in (
            ShardProgress(1, 0.6),
            ShardProgress(2, 0.5),
            ShardProgress(2, 0.9),
            worked(1),
            worked(2),
            ShardProgress(3, 0.7),
        ):
            yield entry
            seen.append(running_tasks()[-1].reached())
        yield from (worked(number) for number in numbers if number > 2)

    run_all_shards(job_in(tmp_path), COUNT, spread)
    assert seen == [f"{count} of 5 shards" for count in (0, 1, 1, 1, 2, 2)]


def test_repeatedly_lost_shards_end_the_job(tmp_path: Path) -> None:
    passes = []

    def spread(numbers: Sequence[int]) -> Iterator[ShardResult]:
        passes.append(numbers)
        yield from (worked(number) for number in numbers if number != 2)

    with raises(LlmrecError, Facts("failed", "2-of-5", says=("failed 3 times", "--shard 2/5"))):
        run_all_shards(job_in(tmp_path), COUNT, spread)
    assert len(passes) == 1 + jobs.MAX_LOST_PASSES


def test_failed_shard_ends_the_job_at_once(tmp_path: Path) -> None:
    def spread(numbers: Sequence[int]) -> Iterator[ShardResult]:
        yield worked(1)
        yield worked(2, error="items.csv, row 3 has no title")
        raise AssertionError("the job went on")

    with raises(LlmrecError, Facts("failed", says=("shard 2/5, on node", "items.csv, row 3"))):
        run_all_shards(job_in(tmp_path), COUNT, spread)


def test_number_of_shards_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    assert choose_shard_count(target, None, 8) == 8 and choose_shard_count(target, 3, 8) == 3
    shard_folder(target, Shard(2, 6)).mkdir(parents=True)
    assert choose_shard_count(target, None, 8) == 6 == choose_shard_count(target, 6, 8)
    with raises(RecipeError, Facts("mismatch", "out.jsonl.shards", column="--shards", says="into 6")):
        choose_shard_count(target, 3, 8)
    shard_folder(target, Shard(2, 4)).mkdir(parents=True)
    with raises(RecipeError, Facts("mismatch", says=("6", "4"))):
        choose_shard_count(target, None, 8)


def test_published_job_is_read_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ranking = job_in(Path())
    page = load_recipe("recipes/movielens-100k/four-tasks.yaml", ["eval.users=7", "ray.gpus=2"])
    for job in (ranking, Job("eval", Path("runs/x"), page)):
        with publish_job(job) as token:
            read = jobs.read_job(job_folder(job.target), token)
            assert (read.command, read.target, read.options) == (job.command, job.target.absolute(), job.options)
            with raises(LlmrecError, Facts("busy")), publish_job(job):
                pass
        assert not (job_folder(job.target) / JOB_FILE).exists()


def test_error_of_a_node_without_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_keeper", None)
    result = Worker(tmp_path / "elsewhere", "token", 2, "node 7").work(1)
    assert "all nodes share" in result.error and result.node == "node 7"
    job = job_in(tmp_path)
    with publish_job(job):
        assert "all nodes share" in Worker(job_folder(job.target), "of another job", 2, "node 7").work(1).error
    assert ShardResult.parse(result.as_json()) == result


def test_worker_waits_for_a_locked_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard, holder = Shard(1, 1), []
    job = job_in(tmp_path)

    def rank_shard(*_: object, ranker: object) -> Path:
        folder = shard_folder(job.target, shard)
        with lock_folder(folder):
            (folder / "part").write_text("result", encoding="utf-8")
            return finish_shard(folder, "rank", shard, "key", ["part"], {"fresh_tokens": 12}).folder

    held = lock_folder(shard_folder(job.target, shard))
    monkeypatch.setattr(jobs, "rank_shard", rank_shard)
    monkeypatch.setattr(jobs, "open_ranker", lambda *_, **__: None)
    monkeypatch.setattr(time, "sleep", lambda _: holder.append(held.__exit__(None, None, None)))
    held.__enter__()
    with publish_job(job) as token:
        result = Worker(job_folder(job.target), token, 1, "node").work(1)
    assert (result.error, result.tokens, len(holder)) == ("", 12, 1)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Return the names of started engines; engines of earlier tests are dropped."""
    names: list[str] = []
    start = engines.Engines._start

    def noted(self: engines.Engines, engine: str, *more: Any) -> Any:
        names.append(engine)
        return start(self, engine, *more)

    monkeypatch.setattr(engines, "_keeper", None)
    monkeypatch.setattr(engines, "release_memory", lambda: None)
    monkeypatch.setattr(engines.Engines, "_start", noted)
    yield names


def test_worker_ranks_as_one_process_with_one_engine(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[str]
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(run, "PART_SIZE", 2)
    requests = jsonl(tmp_path / "in.jsonl", records(9, candidates=3, history=2))
    rank_options = options(llama_folder, requests, tmp_path / "out.jsonl", items=items_csv(tmp_path), batch=2)
    single = rank_file(replace(rank_options, out=tmp_path / "whole.jsonl"))
    job = Job("rank", rank_options.target, rank_options)
    with publish_job(job) as token:
        worker = Worker(job_folder(job.target), token, 4, "node")
        done = run_all_shards(job, 4, lambda numbers: (worker.work(number) for number in reversed(numbers)))
    assert (
        started == ["hf", "hf"] and summarise_workers(done)[2] == single["prompt_tokens"] + single["completion_tokens"]
    )
    assert merge_rank(rank_options.target)["sha256"] == single["sha256"] == sha256_of(rank_options.target)


def test_worker_ranks_by_an_ensemble(trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="the train extra is not installed")
    monkeypatch.setattr(run, "PART_SIZE", 2)
    users = [{"id": f"r{n}", "history": [f"k{n + 1:02d}", f"k{n + 11:02d}"]} for n in range(7)]
    requests = jsonl(tmp_path / "in.jsonl", users)
    rank_options = RankOptions(
        model=str(trained_run), requests=requests, out=tmp_path / "out.jsonl", by="fusion with texts", top=5
    )
    single = rank_file(replace(rank_options, out=tmp_path / "whole.jsonl"))
    job = Job("rank", rank_options.target, rank_options)
    with publish_job(job) as token:
        worker = Worker(job_folder(job.target), token, 3, "node")
        run_all_shards(job, 3, lambda numbers: (worker.work(number) for number in reversed(numbers)))
    assert single["ranked"] == len(users)
    assert merge_rank(rank_options.target)["sha256"] == single["sha256"] == sha256_of(rank_options.target)


def test_restart_drops_old_results_once(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    requests = jsonl(tmp_path / "in.jsonl", records(4, candidates=3, history=2))
    rank_options = options(llama_folder, requests, tmp_path / "out.jsonl", items=items_csv(tmp_path), batch=2)
    old = [rank_shard(rank_options, Shard(number, 2)) for number in (1, 2)]
    merge_rank(rank_options.target)

    again, stamp = replace(rank_options, restart=True, shards=3), rank_options.target.stat().st_mtime_ns
    # Failures before the start keep the old results: an invalid address, and a job in progress.
    with pytest.raises(LlmrecError):
        rank_on_cluster(again, "unknown:0")
    with publish_job(Job("rank", rank_options.target, rank_options)), raises(LlmrecError, Facts("busy")):
        rank_on_cluster(again, "local")
    assert all(folder.exists() for folder in old) and rank_options.target.stat().st_mtime_ns == stamp

    @contextmanager
    def cluster(*_: object) -> Iterator[Any]:
        assert all(folder.exists() for folder in old)
        yield SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": {"CPU": 4}}])

    def work_all(job: Job, count: int, _: object) -> list[ShardResult]:
        assert not any(folder.exists() for folder in old)
        assert isinstance(job.options, RankOptions) and not job.options.restart
        for number in range(1, count + 1):
            rank_shard(job.options, Shard(number, count))
        return [worked(number) for number in range(1, count + 1)]

    monkeypatch.setattr(actors, "cluster", cluster)
    monkeypatch.setattr(actors, "run_all_shards", work_all)
    with pytest.raises(typer.Exit):
        rank_on_cluster(again, "local")
    assert rank_options.target.stat().st_mtime_ns > stamp and shard_folder(rank_options.target, Shard(3, 3)).exists()


def test_worker_keeps_its_engine(llama_folder: Path, tmp_path: Path, started: list[str]) -> None:
    pytest.importorskip("transformers")
    recipe_ = augmenting_recipe(llama_folder, batch=2, model_dtype="float32", max_tokens=3)
    single = augment(recipe_, tmp_path / "whole", quiet=True)
    job = Job("augment", tmp_path / "store", recipe_)
    with publish_job(job) as token:
        worker = Worker(job_folder(job.target), token, 2, "node")
        done = run_all_shards(job, 2, lambda numbers: (worker.work(number) for number in numbers))
    assert (
        started == ["hf", "hf"]
        and summarise_workers(done)[2] == single.cost.prompt_tokens + single.cost.completion_tokens
    )
    merge_augment(job.target, quiet=True)
    assert FeatureStore.open(job.target).stamp == FeatureStore.open(single.folder).stamp


@pytest.mark.slow
def test_worker_evaluates_as_one_process(llama_folder: Path, tmp_path: Path, started: list[str]) -> None:
    pytest.importorskip("trl", reason="the train extra is not installed")
    recipe_ = recipe(llama_folder)
    pipeline.run(recipe_, tmp_path / "whole", quiet=True, may_train=False)
    job = Job("eval", tmp_path / "run", recipe_)
    with publish_job(job) as token:
        worker = Worker(job_folder(job.target), token, 2, "node")
        run_all_shards(job, 2, lambda numbers: (worker.work(number) for number in numbers))
    merge_run(job.target, quiet=True)
    assert started == ["hf", "hf"] and figures(job.target) == figures(tmp_path / "whole")


@pytest.mark.parametrize(
    ("nodes", "options_", "count", "gpus"),
    [
        ([{"CPU": 4}, {"CPU": 4}], {}, 7, 0),
        ([{"CPU": 4}, {"CPU": 4}], {"cpus": 0.5}, 14, 0),
        ([{"CPU": 16, "GPU": 8}, {"CPU": 8}], {"gpus": 2, "cpus": 4}, 4, 2),
        ([{"CPU": 8, "GPU": 8}], {}, 7, 1),
        ([{"CPU": 16}], {"actors": 3}, 3, 0),
    ],
)
def test_one_cpu_stays_free(nodes: list[dict[str, float]], options_: dict[str, Any], count: int, gpus: float) -> None:
    allocation = allocate_actors(nodes, RaySection(**options_))
    assert (allocation.actors, allocation.gpus, allocation.nodes) == (count, gpus, len(nodes))
    assert sum(node["CPU"] for node in nodes) - allocation.actors * allocation.cpus >= 1


def test_rejects_cluster_without_a_free_cpu() -> None:
    for nodes, options_ in (([{"CPU": 1.0}], {}), ([{"CPU": 4.0}], {"gpus": 1}), ([{"CPU": 4.0}], {"cpus": 4})):
        with raises(RecipeError, Facts("exhausted", column="--ray", says="one CPU is reserved")):
            allocate_actors(nodes, RaySection(**options_))
    section = RaySection(actors=6)
    with raises(RecipeError, Facts("exhausted", column="--ray", says="requested: 6")):
        allocate_actors([{"CPU": 4}], section, least=6)
    assert allocate_actors([{"CPU": 4}], section).actors == 3


def test_rejects_invalid_and_unreachable_addresses() -> None:
    for address in ("ray://head:10001", "head", ":1", "http://head:6379", "head:port"):
        with raises(RecipeError, Facts("bad-value", column="--ray", says="HOST:PORT")):
            check_cluster_address(address)
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        with raises(LlmrecError, Facts("unreachable", column="--ray")):
            check_cluster_address(f"127.0.0.1:{free.getsockname()[1]}")


def test_rejects_server_that_is_not_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors, "_ANSWER", 0.2)
    facts = Facts("unreachable", column="--ray", says="not a Ray head node")
    with closing(socket.create_server(("127.0.0.1", 0))) as mute, raises(LlmrecError, facts):
        check_cluster_address(f"127.0.0.1:{mute.getsockname()[1]}")


def test_missing_ray_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with raises(MissingExtra, Facts("not-installed", says="llmrec[ray]")), cluster("local", RaySection()):
        pass


def test_ray_and_one_shard_exclude_each_other(tmp_path: Path) -> None:
    for command in ("run", "augment"):
        words = [command, "recipes/movielens-100k/four-tasks.yaml", "--shard", "1/2", "--ray", "local"]
        with raises(RecipeError, Facts("contradiction", column="--shard")):
            CliRunner().invoke(app, words, catch_exceptions=False)
    with raises(RecipeError, Facts("unsupported", column="--out")):
        rank_on_cluster(options(tmp_path, tmp_path / "in.jsonl", Path("-")), "local")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra ray is not installed")
def test_ray_equals_one_process(llama_folder: Path, tmp_path: Path) -> None:
    requests = jsonl(tmp_path / "in.jsonl", records(130, candidates=3, history=2))
    command = [sys.executable, "-m", "llmrec.cli.main", "rank", "--model", str(llama_folder), "--in", str(requests)]
    command += ["--items", str(items_csv(tmp_path)), "--backend", "hf", "--dtype", "float32", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    for name, more in (("whole", []), ("ray", ["--ray", "local", "--actors", "2", "--shards", "3"])):
        process = subprocess.run(
            [*command, "--out", str(tmp_path / f"{name}.jsonl"), *more],
            env=environment,
            capture_output=True,
            timeout=600,
        )
        assert process.returncode == 0, process.stderr.decode()
    assert json.loads(process.stdout)["ray"]["shards"] == 3
    assert sha256_of(tmp_path / "ray.jsonl") == sha256_of(tmp_path / "whole.jsonl")
