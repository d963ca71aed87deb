"""Counts lines of code for the same tasks in several libraries, and runs the scripts.

``python -m eval.benchmarks.lines_of_code eval/results/lines_of_code.json [LIBRARY=PYTHON ...]`` counts the scripts of
eval/lines_of_code and runs those of llmrec, and those of each library for which a Python is given. Other outcomes are
kept from the file as long as the script is the same. `page` writes eval/LINES_OF_CODE.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import polars as pl
import yaml

import llmrec
from eval.benchmarks.provenance import provenance
from llmrec.durable import write_json
from llmrec.models.wheels import WHEELS, converted_folder, wheel_model_folder
from llmrec.report.table import markdown_table
from tests import shop

FOLDER = Path("eval/lines_of_code")
RESULT = "eval/results/lines_of_code.json"
PAGE = "eval/LINES_OF_CODE.md"
LIBRARY = "llmrec"
NEW = 4
"""Products whose interactions are left out, so that they are new."""
_RUN = {".py": (), ".sh": ("bash", "-e")}
_MINUTES = 15
# RecBole reads its own checkpoints, which contain more than weights.
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
# Distributions whose names differ from those of the folders.
_PACKAGES = {"sentence_transformers": "sentence-transformers"}


def definition(root: Path) -> dict[str, Any]:
    """Return the libraries and tasks."""
    content: dict[str, Any] = yaml.safe_load((root / FOLDER / "tasks.yaml").read_text(encoding="utf-8"))
    return content


def scripts(root: Path, library: str, task: str) -> list[Path]:
    """Return the files of a task in the order in which they run; scripts read settings in YAML."""
    return sorted((root / FOLDER / library).glob(f"{task}.*"))


def lines(path: Path) -> int:
    """Return the number of lines that are neither blank nor only a comment."""
    text = path.read_text(encoding="utf-8")
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in text.splitlines())


def write_data(folder: Path) -> None:
    """Write the tables of the synthetic shop: orders without repeats, of which each customer's last is the test set."""
    shop.write_orders(folder / "orders.csv")
    shop.write_products(folder / "products.csv")
    orders = pl.read_csv(folder / "orders.csv").unique(["customer_id", "product_id"], keep="first", maintain_order=True)
    new = pl.read_csv(folder / "products.csv")["product_id"].tail(NEW)
    orders = orders.filter(~pl.col("product_id").is_in(new.implode())).sort("ordered_at")
    last = pl.int_range(pl.len()).over("customer_id") == pl.len().over("customer_id") - 1
    orders.filter(~last).write_csv(folder / "train.csv")
    orders.filter(last).write_csv(folder / "test.csv")
    (folder / "orders.csv").unlink()


def outcome(files: Sequence[Path], task: Mapping[str, Any], python: str) -> dict[str, Any]:
    """Run the scripts of a task in a temporary folder, and return what was measured.

    Raises:
        SystemExit: If a script fails or does not write its files.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        for file in files:
            shutil.copy(file, folder)
        for model, wheel in WHEELS.items():
            # All libraries read a model from a folder of its name before they query the hub.
            (folder / wheel.hub).parent.mkdir(exist_ok=True)
            (folder / wheel.hub).symlink_to(converted_folder(wheel) or wheel_model_folder(model, wheel))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        programs = os.pathsep.join((str(Path(python).parent), os.environ.get("PATH", "")))
        environment = {**os.environ, **_ENVIRONMENT, "PATH": programs, "PORT": str(port)}
        for file in files:
            if file.suffix not in _RUN:
                continue
            command = [*(_RUN[file.suffix] or (python,)), file.name]
            if task.get("serves") and file is files[-1]:
                with running(command, folder, environment) as process:
                    return {"served": len(recommended(process, port))}
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=_MINUTES * 60, check=False
            )
            if done.returncode:
                raise SystemExit(f"{file} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        for pattern in task.get("writes", ()):
            if not any(folder.glob(pattern)):
                raise SystemExit(f"{files[0]} did not write {pattern}")
        return {"NDCG@10": measured(folder)} if task.get("scored") else {}


@contextmanager
def running(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a service, and stop it with its child processes."""
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=quiet, stderr=quiet, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        process.wait(timeout=60)


def recommended(process: subprocess.Popen[bytes], port: int) -> list[Any]:
    """Return the list of a user, once the service answers."""
    body = json.dumps({"user_id": "C1034", "k": 10}).encode()
    request = Request(f"http://127.0.0.1:{port}/v1/rank", body, {"Content-Type": "application/json"})
    while process.poll() is None:
        try:
            with urlopen(request, timeout=60) as answer:
                items: list[Any] = json.load(answer)["items"]
                return items
        except (URLError, ConnectionError):
            time.sleep(0.5)
    raise SystemExit("the service ended before it answered")


def measured(folder: Path) -> float:
    """Return NDCG@10 of the lists of a folder on its test set.

    Raises:
        SystemExit: If a list is not of ten items that the customer has not ordered.
    """
    lists = pl.read_csv(folder / "lists.csv").select("user_id", "item_id", "rank")
    seen = pl.read_csv(folder / "train.csv").select(user_id="customer_id", item_id="product_id")
    if (
        lists.join(seen, on=["user_id", "item_id"], how="semi").height
        or lists.height != 10 * seen["user_id"].n_unique()
    ):
        raise SystemExit(f"{folder}: lists.csv has seen items, or not ten for each customer")
    truth = pl.read_csv(folder / "test.csv").select(user_id="customer_id", item_id="product_id")
    return round(llmrec.score(lists, truth, k=[10]).metrics["NDCG@10"].value, 4)


def main(target: Path, pythons: Mapping[str, str], root: Path = Path()) -> None:
    """Count and run the scripts, and write the result."""
    known = definition(root)
    old = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {"libraries": {}, "cells": []}
    kept = {(cell["task"], cell["library"], cell["sha256"]): cell for cell in old["cells"]}
    cells = []
    for task in known["tasks"]:
        for library in known["libraries"]:
            files = scripts(root, library, task["name"])
            if not files:
                continue
            digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
            cell = {
                "task": task["name"],
                "library": library,
                "lines": sum(map(lines, files)),
                "files": [file.relative_to(root / FOLDER).as_posix() for file in files],
                "sha256": digest,
            }
            if library in pythons:
                sys.stderr.write(f"{library}/{task['name']}\n")
                cell |= {"ran": True, **outcome([file.absolute() for file in files], task, pythons[library])}
            else:
                cell = kept.get((task["name"], library, digest), {**cell, "ran": False})
            cells.append(cell)
    versions = {**old["libraries"], **{name: version(name, python) for name, python in pythons.items()}}
    command = "python -m eval.benchmarks.lines_of_code eval/results/lines_of_code.json LIBRARY=PYTHON ..."
    head = {"command": command, **provenance(), "libraries": dict(sorted(versions.items()))}
    write_json(target, {**head, "cells": cells})


def version(library: str, python: str) -> str:
    """Return the version of a library in the environment of a Python."""
    code = f"import importlib.metadata as m; print(m.version({_PACKAGES.get(library, library)!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


# --------------------------------------------------------------------------- the page

_HEAD = """# Lines of code

The same ten tasks in six libraries, on the same small tables of a synthetic shop. The page is written by `make figures` from [`eval/lines_of_code/`](lines_of_code) and [the result](results/lines_of_code.json). A number is the lines of code of a script, with a link to it.

- **Counted** are all lines that are not blank and not only a comment: Python formatted by ruff with 120 columns, settings in YAML, and commands of a shell. The tables `train.csv`, `test.csv` and `products.csv` exist already.
- **Scripts** use each library as its own documentation does. A dash means that the library does not do the task; the reasons are below the table.
- **Shorter** than llmrec is printed in bold. `†`: counted, but not run.
- Fewer lines do not make a better library. The authors of llmrec chose the tasks, which are those of recommender systems. What other libraries offer besides is not counted, such as the loss functions of sentence-transformers or the models of LLaMA-Factory.
"""  # noqa: E501


def page(root: Path) -> str:
    """Return the page of the committed result."""
    known = definition(root)
    result = json.loads((root / RESULT).read_text(encoding="utf-8"))
    cells = {(cell["task"], cell["library"]): cell for cell in result["cells"]}
    libraries = known["libraries"]
    rows = []
    for task in known["tasks"]:
        ours = cells[task["name"], LIBRARY]["lines"]
        rows.append([task["goal"], *(_cell(cells.get((task["name"], library)), ours) for library in libraries)])
    shared = [_shared(cells, library) for library in libraries]
    rows.append(["**All tasks of the library**", *(f"{theirs}" for theirs, _ in shared)])
    rows.append(["The same tasks in llmrec", *(f"{ours}" for _, ours in shared)])
    names = list(libraries.values())
    versions = ", ".join(f"{libraries[name]} {number}" for name, number in result["libraries"].items())
    return "\n".join(
        [
            _HEAD,
            markdown_table(["Task", *names], rows, numeric_from=1),
            "",
            f"Run with {versions}. RecBole needs old versions of ray and hyperopt, and "
            "`TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1` to read its checkpoints with this version of torch.",
            "",
            "## Results of the scripts",
            "",
            "NDCG@10 of the lists on the last order of 80 customers. So few customers do not tell which library is "
            "better; the values show that the scripts do the same work. RecBole does not train on the order before it, "
            "which is its validation set.",
            "",
            markdown_table(["Task", *names], list(_measured(known, cells)), numeric_from=1),
            "",
            "## Tasks that a library does not do",
            "",
            "By the name of the script of llmrec:",
            "",
            *_absent(known),
            "",
        ]
    )


def _cell(cell: Mapping[str, Any] | None, ours: int) -> str:
    if cell is None:
        return "–"
    first = next((file for file in cell["files"] if file.endswith((".py", ".sh"))), cell["files"][0])
    text = f"[{cell['lines']}](lines_of_code/{first})"
    return (f"**{text}**" if cell["lines"] < ours else text) + ("" if cell["ran"] else " †")


def _shared(cells: Mapping[tuple[str, str], Mapping[str, Any]], library: str) -> tuple[int, int]:
    """Return the number of lines of all tasks of a library, and of llmrec for the same tasks."""
    tasks = [task for task, name in cells if name == library]
    return tuple(sum(cells[task, name]["lines"] for task in tasks) for name in (library, LIBRARY))  # type: ignore[return-value]


def _measured(known: Mapping[str, Any], cells: Mapping[tuple[str, str], Mapping[str, Any]]) -> Iterator[list[str]]:
    for task in known["tasks"]:
        if task.get("scored"):
            values = [cells.get((task["name"], library), {}).get("NDCG@10") for library in known["libraries"]]
            yield [task["goal"], *("–" if value is None else f"{value:.3f}" for value in values)]


def _absent(known: Mapping[str, Any]) -> Iterator[str]:
    for library, name in known["libraries"].items():
        reasons: dict[str, list[str]] = {}
        for task in known["tasks"]:
            if library in task.get("absent", {}):
                reasons.setdefault(task["absent"][library], []).append(task["name"])
        if reasons:
            yield f"- **{name}**: " + "; ".join(f"{', '.join(tasks)}: {why}" for why, tasks in reasons.items()) + "."


if __name__ == "__main__":
    pythons = dict(argument.split("=", 1) for argument in sys.argv[2:])
    main(Path(sys.argv[1]), {LIBRARY: sys.executable, **pythons})
