"""Compares the behaviour of two versions of the code.

``python -m eval.benchmarks.same_run record OUT`` runs a fixed list of scenarios on small synthetic data, and writes
their output and files to ``OUT/NAME.txt``. Only the command line, HTTP and the functions of ``llmrec`` are used, so the
same script records any checkout: ``PYTHONPATH=CHECKOUT python same_run.py record OUT``. Recorded scenarios are kept,
unless ``--again`` is given; ``--only NAME`` selects scenarios.

``python -m eval.benchmarks.same_run compare ONE TWO`` prints the differences between two such folders, or between two
run folders, with exit code 1 if there are any.

Times, costs, paths, versions and hashes are left out: they may differ between two recordings of the same code.
"""

from __future__ import annotations

import argparse
import atexit
import calendar
import csv
import difflib
import gzip
import hashlib
import importlib.util
import itertools
import json
import os
import random
import re
import runpy
import shutil
import signal
import socket
import sys
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Time limit of one step in seconds.
LIMIT = 400
# Maximum number of table rows to record; longer tables are recorded as hashes of columns.
ROWS = 2000
# The head of a section of a recording.
HEAD = "##### "

# --------------------------------------------------------------------------- what is left out

# Keys of JSON and columns of tables that hold times, versions, checksums or the machine.
_VOLATILE = re.compile(
    r"llmrec|checksum|commit|created|finished|hardware|machine|versions|memory_gb|.*(?:milli)?seconds(?:_.*)?|.*_per_second"
)
# Headers of columns of times in pages.
_TIMED = re.compile(r"tok(?:ens)?/s|\b(?:times?|seconds?|minutes?|hours?|ms)\b", re.IGNORECASE)
_NUMBER = r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?"
_UNITS = r"(?:ms|µs|s|sec|seconds?|min|minutes?|h|hours?|d|days?)"
_SIZES = r"(?:bytes|[kKMGT]i?B)"
_PATTERNS = tuple(
    (re.compile(pattern), mark)
    for pattern, mark in (
        (r"\b[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\b", "UUID"),
        (r"(?<![\w.])(?=[0-9a-f]*[0-9])(?=[0-9a-f]*[a-f])[0-9a-f]{12,64}\b", "HASH"),
        (rf"(?<![\w.]){_NUMBER} ?{_UNITS}(?:/\w+)?(?![\w-])", "TIME"),
        (rf"(?<![\w.]){_NUMBER} ?{_SIZES}\b", "SIZE"),
        # All data is of 2001: later dates and seconds are those of the recording.
        (r"\b20[2-9]\d-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d)?(?:\.\d+)?(?:Z|[+-]\d\d:?\d\d)?)?", "NOW"),
        (r"\b1[7-9]\d{8}(?:\.\d+)?\b", "NOW"),
        (r"\b(127\.0\.0\.1|localhost):\d+", r"\1:PORT"),
        (r"\bllmrec([: ])\d+\.\d+\.\d+", r"llmrec\1VERSION"),
        (r"\d[\d,\xa0\u2009\u202f ]*(?=tok/s|tokens (?:a|per) second)", "RATE "),
        (r"\bload:? \d+(?:\.\d+)?", "load"),
        (r"(?im)^( *(?:seconds|speed)) .*", r"\1 TIME"),
        # The number of readiness probes of a starting service.
        (r"(?m)^GET /ready 503 .*\n", ""),
        # The slowest stages come first.
        (r"\btime: TIME \(.*\)", "time: TIME"),
        (r"/tmp/[\w./-]+", "TEMPORARY"),
    )
)


def normal(text: str, folders: dict[str, str] | None = None) -> str:
    """Remove differences between two recordings of the same code from a text; ``folders`` have names."""
    for folder, name in (folders or {}).items():
        text = text.replace(folder, name)
    for pattern, mark in _PATTERNS:
        text = pattern.sub(mark, text)
    return "\n".join(line.rstrip() for line in text.splitlines())


def bare(value: Any) -> Any:
    """Return JSON without keys of times, costs, versions and hashes."""
    if isinstance(value, dict):
        # peft writes the names of layers as a set.
        return {
            key: sorted(item) if key == "target_modules" and isinstance(item, list) else bare(item)
            for key, item in value.items()
            if not _VOLATILE.fullmatch(key)
        }
    return [bare(item) for item in value] if isinstance(value, list) else value


# --------------------------------------------------------------------------- what is in a file


def dump(path: Path) -> str:
    """Return the content of a file as text: tables by row, weights by hash, JSON by key."""
    kind = path.suffix
    if kind == ".parquet":
        return _table(path)
    if kind == ".safetensors":
        return _weights(path)
    if kind in {".sqlite", ".db", ".bin", ".pt", ".npz", ".npy", ".xlsx", ".png", ".gz", ".zst"}:
        return "(binary)"
    text = path.read_text(encoding="utf-8")
    if kind in {".csv", ".tsv"}:
        return _delimited(text, "," if kind == ".csv" else "\t")
    if kind == ".json":
        return _json(text)
    if kind == ".jsonl":
        return "\n".join(_json(line, indent=None) for line in text.splitlines())
    if kind == ".md":
        return "\n".join(_markdown(text.splitlines()))
    return _page(text) if kind in {".html", ".svg"} else text


def _json(text: str, indent: int | None = 1) -> str:
    try:
        return json.dumps(bare(json.loads(text)), indent=indent, ensure_ascii=False)
    except ValueError:
        return text


def _page(text: str) -> str:
    """Return an HTML page with one line per tag, without plots over time and columns of times."""

    def table(match: re.Match[str]) -> str:
        rows = re.findall(r"<tr.*?</tr>", match[0], re.DOTALL)
        cells = [re.findall(r"<t[hd].*?(?=<t[hd][ >]|</tr>)", row, re.DOTALL) for row in rows]
        drop = {number for number, cell in enumerate(cells[0] if cells else ()) if _TIMED.search(cell)}
        # A share of the time, where times are.
        drop |= {number for number, cell in enumerate(cells[0] if drop else ()) if "Share" in cell}
        kept = ["".join(cell for number, cell in enumerate(row) if number not in drop) for row in cells]
        return "<table>" + "".join(f"<tr>{row}</tr>" for row in kept)

    text = re.sub(
        r"<svg.*?</svg>", lambda match: "<svg>TIME" if _TIMED.search(match[0]) else match[0], text, flags=re.S
    )
    text = re.sub(r"(<dt>[^<]*(?:second|/s)[^<]*</dt>\s*<dd>)[^<]*", r"\1TIME", text)
    text = re.sub(r"<table.*?(?=</table>)", table, text, flags=re.DOTALL)
    return re.sub(r">\s*<", ">\n<", text)


def _markdown(lines: list[str]) -> Iterator[str]:
    """Return the lines of a page without columns of times."""
    drop: set[int] = set()
    for number, line in enumerate(lines):
        if not line.startswith("|"):
            drop = set()
        elif not number or not lines[number - 1].startswith("|"):
            drop = {column for column, cell in enumerate(line.split("|")) if _TIMED.search(cell)}
        yield "|".join(cell for column, cell in enumerate(line.split("|")) if column not in drop) if drop else line


def _delimited(text: str, separator: str) -> str:
    rows = list(csv.reader(text.splitlines(), delimiter=separator))
    keep = [number for number, name in enumerate(rows[0] if rows else ()) if not _VOLATILE.fullmatch(name)]
    return "\n".join(separator.join(row[number] for number in keep if number < len(row)) for row in rows)


def _table(path: Path) -> str:
    import polars as pl

    frame = pl.read_parquet(path)
    frame = frame.drop([name for name in frame.columns if _VOLATILE.fullmatch(name)])
    keys = [name for name in ("row_id", "request_id") if name in frame.columns]
    if keys:
        frame = frame.sort(keys, maintain_order=True)
    head = [f"{name}: {dtype}" for name, dtype in frame.schema.items()]
    if len(frame) > ROWS:
        return "\n".join([f"{len(frame)} rows", *(f"{line} {_digest(frame, line)}" for line in head)])
    return "\n".join([*head, *(json.dumps(row, default=str, ensure_ascii=False) for row in frame.iter_rows())])


def _digest(frame: Any, line: str) -> str:
    column = frame[line.partition(":")[0]]
    return "-".join(re.findall("....", hashlib.sha256(json.dumps(column.to_list(), default=str).encode()).hexdigest()))


def _weights(path: Path) -> str:
    from safetensors.torch import load_file

    lines = []
    for name, tensor in sorted(load_file(path).items()):
        content = hashlib.sha256(tensor.contiguous().view(-1).view(_bytes()).numpy().tobytes()).hexdigest()
        # Shorter than what is taken for a hash, and left out.
        lines.append(f"{name} {tensor.dtype} {list(tensor.shape)} {content[:10]}")
    return "\n".join(lines)


def _bytes() -> Any:
    import torch

    return torch.uint8


# --------------------------------------------------------------------------- steps of a scenario


@dataclass
class Recorder:
    """Runs the steps of one scenario in separate processes, and records their output.

    Attributes:
        folder: The folder of the scenario, in the common working folder.
        folders: Absolute paths and their placeholders.
        sections: Head and text of the recorded sections.
    """

    folder: Path
    folders: dict[str, str]
    sections: list[tuple[str, str]] = field(default_factory=list)

    def note(self, head: str, text: str) -> None:
        """Record a text under a head."""
        self.sections.append((normal(head, self.folders), normal(text, self.folders)))

    def cli(self, *args: object, json_output: bool = False, stdin: str = "") -> int:
        """Run ``python -m llmrec ARGS`` and record its exit code and output."""
        words = [str(arg) for arg in args]
        head = "llmrec " + " ".join(words)
        return self._step(head, lambda: _llmrec(words), json_output=json_output, stdin=stdin)

    def python(self, head: str, work: Callable[[], object]) -> int:
        """Run a function and record its output."""
        return self._step(head, work)

    def show(self, *patterns: str, under: str = "") -> None:
        """Record the names of the files in a folder, and the content of those that match a pattern."""
        top = self.folder / under if under else self.folder

        def work() -> None:
            files = sorted(path for path in top.rglob("*") if path.is_file())
            # Without hashes, whose order is irrelevant.
            sys.stdout.write("\n".join(sorted(normal(path.relative_to(top).as_posix()) for path in files)) + "\n")
            for path in files:
                name = path.relative_to(top)
                if any(name.match(pattern) for pattern in patterns):
                    sys.stdout.write(f"{HEAD}{top.name}/{name.as_posix()}\n{dump(path)}\n")

        self._step(f"files of {top.relative_to(self.folder.parent)}", work, split=True)

    @contextmanager
    def serve(self, *args: object) -> Iterator[Service]:
        """Run ``llmrec serve ARGS`` on a free port until the block ends."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = ["serve", *map(str, args), "--port", str(port)]
        pid, files = _start(lambda: _llmrec(words))
        try:
            service = Service(self, f"http://127.0.0.1:{port}")
            service.wait(pid)
            yield service
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            _, status = os.waitpid(pid, 0)
            out, err = _output(files)
            code = os.waitstatus_to_exitcode(status)
            # Requests that wait for models are logged when they are answered.
            log = "\n".join(sorted(normal(err, self.folders).splitlines()))
            self.note(" ".join(["llmrec", *words[:-2]]), f"exit code {code}\n{out}\n{log}")

    def _step(
        self,
        head: str,
        work: Callable[[], object],
        *,
        json_output: bool = False,
        stdin: str = "",
        split: bool = False,
    ) -> int:
        code, out, err = forked(work, stdin)
        if json_output:
            out = _json(out)
        if split:
            first, *others = out.split(HEAD)
            self.note(head, first)
            for other in others:
                self.note(*other.split("\n", 1))
            out = ""
        else:
            self.note(head, f"exit code {code}\n{out}")
        if err.strip():
            self.note(f"{head} (error stream)", err)
        return code


@dataclass(frozen=True)
class Service:
    """A running service, each answer of which is recorded."""

    recorder: Recorder
    url: str

    def wait(self, pid: int) -> None:
        """Wait until models are loaded, or the process has ended."""
        end = time.monotonic() + LIMIT
        while time.monotonic() < end:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                raise RuntimeError("the service has ended")
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/ready", timeout=10):
                return
            time.sleep(0.2)
        raise RuntimeError("the service is not ready")

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> None:
        """Send a request and record status and body of the response; ``body`` is JSON or bytes."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        given = {"Content-Type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        request = urllib.request.Request(f"{self.url}{path}", data, given, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                status, kind, content = answer.status, answer.headers.get_content_type(), answer.read()
        except urllib.error.HTTPError as error:
            status, kind, content = error.code, error.headers.get_content_type(), error.read()
        text = content.decode("utf-8", errors="replace")
        if kind == "application/json":
            text = _json(text)
        elif kind == "text/plain":
            # Of measurements the names.
            text = "\n".join(re.sub(r" [-+.\dEe]+(?:Inf|NaN)?$", "", line) for line in text.splitlines())
        elif kind == "text/event-stream":
            lines = (line.partition("data: ") for line in text.splitlines())
            text = "\n".join(f"{begin}{mark}{_json(rest, None) if mark else rest}" for begin, mark, rest in lines)
        shown = "" if body is None else f" {data.decode('utf-8', errors='replace') if data else ''}"
        self.recorder.note(f"{method} {path}{shown}"[:300], f"{status} {kind}\n{text}")


def _llmrec(words: list[str]) -> None:
    sys.argv = ["llmrec", *words]
    runpy.run_module("llmrec", run_name="__main__", alter_sys=True)


def forked(work: Callable[[], object], stdin: str = "", limit: int = LIMIT) -> tuple[int, str, str]:
    """Run a function in a separate process; return its exit code, output and error stream.

    The process is a fork of this one, which has already imported torch.
    """
    pid, files = _start(work, stdin, limit)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), *_output(files)


def _output(files: tuple[str, str]) -> tuple[str, str]:
    out, err = (Path(file).read_text(encoding="utf-8", errors="replace") for file in files)
    return out, err


def _start(work: Callable[[], object], stdin: str = "", limit: int = LIMIT) -> tuple[int, tuple[str, str]]:
    base = f".step-{next(_STEPS)}"
    out, err, source = f"{base}.out", f"{base}.err", f"{base}.in"
    Path(source).write_text(stdin, encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid, (out, err)
    code = 1
    try:
        signal.alarm(limit)
        for number, file, flags in ((0, source, os.O_RDONLY), (1, out, _WRITE), (2, err, _WRITE)):
            os.dup2(os.open(file, flags, 0o600), number)
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException as error:
        # Without the lines of the code.
        sys.stderr.write("".join(traceback.format_exception_only(error)))
    finally:
        signal.alarm(0)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


_STEPS = itertools.count()
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC

# --------------------------------------------------------------------------- scenarios

Scenario = Callable[[Recorder], None]
SCENARIOS: dict[str, Scenario] = {}
# Scenarios whose files are inputs of others.
NEEDS: dict[str, tuple[str, ...]] = {}


def scenario(*needs: str) -> Callable[[Scenario], Scenario]:
    """Register a scenario; ``needs`` are the scenarios whose files it reads."""

    def add(function: Scenario) -> Scenario:
        name = function.__name__.replace("_", "-")
        SCENARIOS[name], NEEDS[name] = function, needs
        return function

    return add


GENRES = ("Comedy", "Crime", "Drama", "Fantasy", "War")
FIRST = ("Quiet", "Golden", "Broken", "Distant", "Silver", "Hidden", "Burning", "Winter")
SECOND = ("River", "Garden", "Letters", "Harbour", "Mirror", "Crossing", "Orchard", "Station", "Kingdom", "Promise")
PRAISE = ("A lovely story", "Well played and well written", "I would watch it again", "Better than expected")
BLAME = ("Far too long", "The ending makes no sense", "I nearly fell asleep", "Not what was promised")
DATA = (
    "data: {source: table, path: inputs/events.csv, noun: films, columns: {user: user_id, item: item_id, "
    "rating: rating, time: time, title: title, text: review, fields: [genre, year]}}\n"
)


def films() -> list[dict[str, str]]:
    """Return 80 synthetic items."""
    return [
        {
            "item_id": f"f{number + 1:02}",
            "title": f"{FIRST[number % 8]} {SECOND[number // 8]}",
            "genre": GENRES[number * 7 % 5],
            "year": str(1950 + number * 13 % 50),
        }
        for number in range(80)
    ]


def events() -> list[dict[str, str]]:
    """Return synthetic interactions of 60 users with two favourite genres each, by time."""
    dice = random.Random("same run")
    rows = []
    for user in range(60):
        liked = dice.sample(GENRES, 2)
        choice = [film for film in films() if film["genre"] in liked or dice.random() < 0.2]
        for step, film in enumerate(dice.sample(choice, dice.randint(8, 16))):
            rating = min(5, max(1, (4 if film["genre"] in liked else 2) + dice.choice((-1, 0, 0, 1))))
            words = dice.choice(PRAISE if rating > 3 else BLAME)
            review = f"{words}: {film['genre'].lower()} of {film['year']}." if dice.random() < 0.8 else ""
            day = 1 + (user + step * 2) % 28
            when = f"2001-{1 + step % 12:02}-{day:02}T{dice.randint(0, 23):02}:{dice.randint(0, 59):02}:00"
            rows.append({"user_id": f"u{user + 1:02}", **film, "rating": str(rating), "time": when, "review": review})
    return sorted(rows, key=lambda event: event["time"])


def reviews() -> Iterator[dict[str, object]]:
    """Return the interactions with a review, in the format of Amazon's 2014 reviews."""
    for event in events():
        if event["review"]:
            head, _, tail = event["review"].partition(": ")
            moment = calendar.timegm(time.strptime(event["time"], "%Y-%m-%dT%H:%M:%S"))
            text = f"{head}. The plot is {tail} I liked the music of {event['title']}."
            yield {
                "reviewerID": event["user_id"],
                "asin": event["item_id"],
                "reviewText": text,
                "overall": float(event["rating"]),
                "summary": head,
                "unixReviewTime": moment,
            }


def requests() -> list[dict[str, Any]]:
    """Return requests for ranked lists: known, unknown and cold-start users, and two that fail."""
    titles = {film["item_id"]: film["title"] for film in films()}
    ids = list(titles)
    rows: list[dict[str, Any]] = [
        {
            "id": f"r{number}",
            "user_id": f"u{number * 7 % 60 + 1:02}",
            "history": [ids[(number * 7 + step * 3) % 80] for step in range(4)],
            "candidates": [ids[(number * 11 + step * 5 + 1) % 80] for step in range(5)],
        }
        for number in range(6)
    ]
    rows[1]["history"] = []
    rows[2]["user_id"] = "nobody"
    rows[3]["candidates"] = ["no-such-film", "f01"]
    rows[4]["history"] = ["f05", "unknown", "f09"]
    del rows[5]["history"]
    return rows


def write_requests(folder: Path) -> None:
    """Write the requests in all supported formats, and requests about one item each."""
    import polars as pl

    rows = requests()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    text += (
        '{"id": "mixed", "history": [{"item_id": "f03", "rating": 5}], "candidates": ["f04", {"title": "New One"}]}\n'
    )
    (folder / "requests.jsonl").write_text(text + '{"id": "broken", "candidates": [}\n[1, 2]\n', encoding="utf-8")
    flat = [{"id": row["id"], "user_id": row["user_id"]} for row in rows]
    for row, whole in zip(flat, rows, strict=True):
        row |= {key: "|".join(whole.get(key, ())) for key in ("history", "candidates")}
    write_csv(folder / "requests.csv", flat)
    frame = pl.DataFrame([{**row, "history": row.get("history")} for row in rows])
    frame.write_parquet(folder / "requests.parquet")
    questions = [{"id": f"q{n}", "user_id": f"u{n * 5 % 60 + 1:02}", "item": f"f{n * 9 % 80 + 1:02}"} for n in range(4)]
    write_csv(folder / "questions.csv", [*questions, {"id": "unknown", "user_id": "u01", "item": "no-such-film"}])
    truth = [{"user": row["user_id"], "item": row["candidates"][0]} for row in rows]
    write_csv(folder / "truth.csv", truth)


def write_csv(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write rows with a header."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_model(folder: Path) -> None:
    """Save a random causal language model of two layers with its tokenizer."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    transformers.utils.logging.disable_progress_bar()
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator([" ".join((*FIRST, *SECOND, *GENRES, *PRAISE, *BLAME))] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.chat_template = CHAT
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=4096,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
        )
    )
    # Larger weights than the usual initialisation, so that answers differ between prompts.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


CLASSIC = (
    """\
name: classic
description: Classic recommenders of all families.
"""
    + DATA
    + """\
tasks:
  sequential:
    baselines: [random, popularity, {name: item-knn, history: 5}, markov-1, {name: markov, order: 3}, ease, rp3beta,
                transitions, {name: content, encoder: lsa}]
  direct: {baselines: [random, popularity, item-knn, markov-1]}
  rating: {baselines: [global-mean, user-mean, item-mean, user-item-bias, svd]}
  ctr: {baselines: [like-ratio, logistic]}
  explanation: {baselines: [frequent-text, nearest-text]}
eval: {arms: [], users: 40, bootstrap: 50, candidates: {count: 10}, fusion: {controls: true}}
"""
)
TUNED = (
    """\
name: tuned
description: A tiny language model of all families.
model: {name: inputs/model, dtype: float32, max_length: 1024}
"""
    + DATA
    + """\
tasks:
  sequential: {strategies: [likelihood, likelihood-prior], baselines: [random, popularity, item-knn, markov-1]}
  direct: {strategies: [label, list, pointwise-yes, permutation, window, setwise, pairwise]}
  rating: {strategies: [expected, parsed]}
  ctr: {}
  explanation: {max_tokens: 6}
train:
  {steps: 4, batch_tokens: 1024, max_row_tokens: 512, valid_rows: 4, valid_every: 2, lora: {top_layers: 1},
   report_to: []}
eval:
  backend: hf
  arms: [zero-shot, few-shot, tuned]
  users: 4
  bootstrap: 50
  candidates: {count: 5}
  fusion: {model_users: 12, arms: [tuned]}
"""
)


REVIEWS = """\
name: reviews
description: Reviews and their stars.
model: {name: inputs/model, dtype: float32, max_length: 1024}
data: {source: amazon-reviews, path: inputs/reviews.json.gz, noun: films}
tasks:
  review: {max_tokens: 6, shown: 60}
  stars: {}
  explanation: {max_tokens: 6}
train:
  {steps: 2, batch_tokens: 512, max_row_tokens: 512, valid_rows: 4, lora: {top_layers: 1}, report_to: []}
eval: {backend: hf, arms: [zero-shot, tuned], users: 4, bootstrap: 50}
"""
CODES = (
    """\
name: codes
description: Items as codes, found by constrained search.
model: {name: inputs/model, dtype: float32, max_length: 1024}
index: {scheme: semantic, item_token: true, semantic: {encoder: chance, levels: 2, codes: 8}}
"""
    + DATA
    + """\
tasks:
  sequential: {templates: [bare-codes], untuned_templates: [continue-list], strategies: [search]}
  alignment: {}
train:
  {steps: 3, batch_tokens: 512, max_row_tokens: 256, valid_rows: 4, softmax: items, lora: {top_layers: 1},
   report_to: []}
eval: {backend: hf, arms: [tuned], users: 4, bootstrap: 50, beams: 5, candidates: {kind: catalogue, count: 5}}
"""
)
CHATS = """\
chat: chats
description: Managers of a conversation.
recipe: inputs/classic.yaml
users: 5
seeds: [0, 1]
turns: 3
bootstrap: 60
rows:
  - {manager: random}
  - {manager: history}
  - {manager: rules}
  - {manager: rules, name: of years, knows: [year], users: 3}
pairs: [[rules, history], [of years, history]]
"""
SUITE = (
    """\
suite: suite
description: Recommenders tuned on validation, and an ensemble.
"""
    + DATA
    + """\
seeds: [0, 1]
split_seeds: [0, 1]
bootstrap: 60
rows:
  - {baseline: random}
  - {baseline: popularity}
  - {baseline: item-knn, grid: {decay: [0.5, 0.9], history: [5, 20]}}
  - {baseline: markov-1}
  - {baseline: ease, tune: false}
  - {name: fusion, fuse: [item-knn, ease]}
pairs: [[fusion, ease]]
"""
)
BENCHMARK = """\
benchmark: bench
description: Settings of a model that answers from hashes.
recipe: inputs/fake.yaml
bootstrap: 60
runs:
  - {name: zero-shot}
  - {name: few-shot, overrides: ["eval.arms=[few-shot]"], grid: {eval.shots.k: [1, 2]}}
  - {name: seeds, seeds: [3, 4]}
pairs: [["pointwise-yes · after-history · zero-shot", "label · after-history · zero-shot"]]
"""
FAKE = (
    """\
name: fake
description: A model that answers from hashes.
model: {name: inputs/model}
"""
    + DATA
    + """\
tasks: {direct: {strategies: [label, pointwise-yes]}, rating: {strategies: [expected]}}
eval: {arms: [zero-shot], backend: fake, scorer: fake, users: 20, bootstrap: 50, candidates: {count: 5}}
"""
)
AUGMENT = (
    """\
name: augmenting
model: {name: inputs/model, dtype: float32, max_length: 1024}
"""
    + DATA.replace("noun: films", "noun: films, split: {kind: prefix, valid: 0.2, test: 0.2}")
    + """\
tasks: {ctr: {baselines: [like-ratio, logistic]}}
eval: {backend: hf, arms: [], batch: 4, users: 20, bootstrap: 50}
augment: {limit: 6, max_tokens: 4, encoder: chance, factors: [taste]}
"""
)

RECIPES = {
    "classic": CLASSIC,
    "tuned": TUNED,
    "reviews": REVIEWS,
    "codes": CODES,
    "chats": CHATS,
    "suite": SUITE,
    "bench": BENCHMARK,
    "fake": FAKE,
    "augment": AUGMENT,
}
# Tables with a fault.
BROKEN: dict[str, bytes] = {
    "empty.csv": b"",
    "header.csv": b"user_id,item_id,rating,time\n",
    "columns.csv": b"a,b\n1,2\n",
    "short-row.csv": b"user_id,item_id,rating,time\nu1,f1,5,2001-01-01\nu1,f2\n",
    "long-row.csv": b"user_id,item_id,rating,time\nu1,f1,5,2001-01-01,more\n",
    "rating.csv": b"user_id,item_id,rating,time\nu1,f1,five,2001-01-01\nu1,f2,4,2001-01-02\n",
    "infinite.csv": b"user_id,item_id,rating,time\nu1,f1,inf,2001-01-01\n",
    "time.csv": b"user_id,item_id,rating,time\nu1,f1,5,2001-13-01\n",
    "times.csv": b"user_id,item_id,rating,time\nu1,f1,5,2001-01-01\nu1,f2,5,990000000\n",
    "empty-id.csv": b"user_id,item_id,rating,time\nu1,,5,2001-01-01\n",
    "twice.csv": b"user_id,item_id,rating,time\nu1,f1,5,2001-01-01\nu1,f1,4,2001-01-02\n",
    "doubled.csv": b"user_id,item_id,item_id,time\nu1,f1,f1,2001-01-01\n",
    "quote.csv": b'user_id,item_id,title\nu1,f1,"never closed\nu2,f2,x\n',
    "encoding.csv": "user_id,item_id,title\nu1,f1,Caf\u00e9\n".encode("latin-1"),
    "nul.csv": b"user_id,item_id,title\nu1,f1,a\0b\n",
    "object.jsonl": b'{"user_id": "u1", "item_id": "f1"}\n{"user_id": "u1", "item_id": {"a": 1}}\n',
    "broken.jsonl": b'{"user_id": "u1", "item_id": "f1"}\n{"user_id": "u1"\n',
    "list.jsonl": b"[1, 2]\n",
    "not.parquet": b"PAR1 is not enough",
    "not.csv.gz": b"user_id,item_id\nu1,f1\n",
    "page.csv": b"<!DOCTYPE html>\n<html><body>Not found</body></html>\n",
    "not.xlsx": b"PK\x03\x04",
}
# Invalid recipe keys.
WRONG = (
    ("tasks.sequentail={}",),
    ("train.steps=many",),
    ("train.steps=-1",),
    ("model.name=no-such-model",),
    ("data.path=no-such-file.csv",),
    ("data.columns.user=nobody",),
    ("data.noun=",),
    ("tasks.direct.strategies=[labels]",),
    ("tasks.sequential.baselines=[random, no-such]",),
    ("tasks.sequential.baselines=[random]",),
    ("tasks.rating.templates=[no-such]",),
    ("tasks.sequential.baselines=[random, popularity, {name: item-knn, hystory: 3}, markov-1]",),
    ("eval.candidates.kind=catalogue", "tasks.direct.strategies=[label]"),
    ("train.method=lora9",),
    ("index={scheme: semantic}", "tasks.sequential.templates=[bare-codes]", "index.semantic.levels=0"),
    ("eval.planned=[[a, b]]",),
    ("no-such-key=1",),
    ("eval",),
)

# User-visible files of a run folder; the others are internal.
RUN = ("results.json", "predictions.parquet", "candidates/*.parquet", "recipe.yaml", "audit.json", "train_log.jsonl",
       "report/*.md", "report/*.csv", "report/*.html")  # fmt: skip


@scenario()
def inputs(t: Recorder) -> None:
    """The tables, the recipes and the model that all other scenarios use."""
    write_csv(t.folder / "events.csv", events())
    write_csv(t.folder / "films.csv", films())
    with gzip.open(t.folder / "reviews.json.gz", "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(review) + "\n" for review in reviews())
    for name, text in RECIPES.items():
        (t.folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    t.python("model", lambda: write_model(t.folder / "model"))
    t.python("requests", lambda: write_requests(t.folder))
    t.show("*.csv", "*.jsonl", "*.yaml", "*.safetensors", "tokenizer.json")


@scenario("inputs")
def classic(t: Recorder) -> None:
    """A run without a language model, and the same run again."""
    for _ in range(2):
        t.cli("-v", "run", "inputs/classic.yaml", "--out", "classic/run")
    t.show(*RUN, under="run")
    t.cli("report", "classic/run", "--table")
    t.cli("--json", "audit", "classic/run", json_output=True)


@scenario("inputs")
def tuned(t: Recorder) -> None:
    """A run with a LoRA, zero-shot and few-shot rows of all families, and the same run again."""
    for _ in range(2):
        t.cli("-v", "run", "inputs/tuned.yaml", "--out", "tuned/run")
    t.show(*RUN, "adapter/*.safetensors", "merged/model.safetensors", under="run")
    t.cli("report", "tuned/run", "--table")
    t.cli("--json", "audit", "tuned/run", json_output=True)


@scenario("inputs")
def reviewing(t: Recorder) -> None:
    """A run over reviews: the families review, stars and explanation with keyphrases."""
    t.cli("run", "inputs/reviews.yaml", "--out", "reviewing/run")
    t.show(*RUN, under="run")


@scenario("inputs")
def codes(t: Recorder) -> None:
    """Semantic IDs: an index, constrained search over the catalogue, and alignment."""
    t.cli("index", "inputs/codes.yaml")
    for scheme in ("sequential", "random", "collaborative", "category", "token", "title"):
        more = ["index.category.fields=[genre]"] if scheme == "category" else []
        t.cli("index", "inputs/codes.yaml", f"index={{scheme: {scheme}}}", *more)
    t.cli("run", "inputs/codes.yaml", "--out", "codes/run")
    t.show(*RUN, "adapter/*.safetensors", "merged/model.safetensors", under="run")


@scenario("inputs")
def networks(t: Recorder) -> None:
    """Recommenders that are trained: factors, sequence networks, networks over texts, and yes/no networks."""
    sequential = (
        "random, popularity, item-knn, markov-1, markov-cooccurrence, recent-popularity, {name: als, factors: 8}, "
        "{name: bpr, factors: 8}, {name: sasrec, epochs: 2}, {name: gru4rec, epochs: 2}, "
        "{name: transitions-text, encoder: lsa}"
    )
    words = (
        f"tasks.sequential={{baselines: [{sequential}]}}",
        "tasks.ctr={baselines: [like-ratio, logistic, {name: deepfm, epochs: 2}, {name: din, epochs: 2}]}",
        "tasks.rating={baselines: [global-mean, user-mean, item-mean, user-item-bias, mf, svd]}",
    )
    t.cli("run", "inputs/classic.yaml", *words, "--out", "networks/run")
    t.show(*RUN, under="run")


@scenario("inputs", "tuned")
def training(t: Recorder) -> None:
    """Training methods: all weights, a head, packing, early stopping, and preferences after a first stage."""
    one = ("tasks={sequential: {}}", "eval.arms=[tuned]", "eval.fusion={controls: true}", "eval.shots={}")
    for name, words in (
        ("full", (*one, "train.method=full", "train.lora=null", "train.packing=tree")),
        ("judged", (*one, "train.judge={users: 4, patience: 1}")),
        ("head", ("tasks={rating: {strategies: [head], head: {alpha: 0.5}}}", *one[1:])),
        ("preference", (*one, "train.start=tuned/run", "train.preference={loss: s-dpo, negatives: 2}")),
        ("listwise", ("tasks={direct: {templates: [which-title], strategies: [likelihood], loss: softmax}}", *one[1:])),
    ):
        t.cli("run", "inputs/tuned.yaml", *words, "--out", f"training/{name}")
        t.show("results.json", "train_log.jsonl", "adapter/*.safetensors", "merged/model.safetensors", under=name)


@scenario("inputs")
def checking(t: Recorder) -> None:
    """`check` of valid and invalid recipes."""
    for name in RECIPES:
        t.cli("check", f"inputs/{name}.yaml")
    t.cli("check", "inputs/tuned.yaml", "--dry-run")
    t.cli("--json", "check", "inputs/classic.yaml", json_output=True)
    for words in WRONG:
        t.cli("--json", "check", "inputs/tuned.yaml", *words, json_output=True)
    (t.folder / "broken.yaml").write_text("name: broken\ndata: {source: table\n", encoding="utf-8")
    (t.folder / "twice.yaml").write_text(FAKE + "eval: {}\n", encoding="utf-8")
    for name in ("checking/broken.yaml", "checking/twice.yaml", "checking/none.yaml", "inputs/events.csv"):
        t.cli("check", name)


@scenario("inputs")
def showing(t: Recorder) -> None:
    """Output of `data`, `prompts` and `schema`."""
    splits = ("leave_one_out", "last_share", "last_basket", "global_time", "user_disjoint", "prefix", "cold_items")
    for split in splits:
        t.cli("data", "inputs/classic.yaml", f"data.split.kind={split}")
    t.cli("data", "inputs/classic.yaml", "data.filter={min_rating: 3, user_core: 4, item_core: 4}")
    t.cli("data", "inputs/classic.yaml", "data.filter.where=\"rating > 2 and genre != 'War'\"")
    t.cli("data", "recipes/made/classic.yaml")
    t.cli("prompts", "inputs/tuned.yaml")
    t.cli("prompts", "inputs/codes.yaml")
    t.cli("prompts", "inputs/tuned.yaml", "--set", "m6")
    t.cli("prompts", "inputs/tuned.yaml", "-t", "next-title", "-t", "no-such")
    t.cli("schema", "recipe", json_output=True)
    t.cli("schema", "suite", json_output=True)


@scenario("inputs")
def starting(t: Recorder) -> None:
    """`init` of valid tables."""
    lines = (t.folder.parent / "inputs/events.csv").read_text(encoding="utf-8").splitlines()
    renamed = ["Kunde;Artikel;Name;Sparte;Jahr;Sterne;Datum;Text", *(line.replace(",", ";") for line in lines[1:])]
    (t.folder / "german.csv").write_text("\n".join(renamed), encoding="utf-8")
    faulty = [*lines[:40], lines[20], "u01,,No Id,War,1950,3,2001-02-03T04:05:00,", *lines[40:80]]
    (t.folder / "faulty.csv").write_text("\n".join(faulty), encoding="utf-8")
    t.cli("init", "inputs/events.csv", "--out", "starting/plain.yaml")
    t.cli("--json", "init", "inputs/events.csv", "--out", "starting/plain.yaml", "--force", json_output=True)
    t.cli("init", "inputs/events.csv", "--out", "starting/plain.yaml")
    t.cli("init", "inputs/events.csv", "--items", "inputs/films.csv", "--rating", "none", "--out", "starting/two.yaml")
    t.cli("init", "starting/german.csv", "--out", "starting/german.yaml")
    t.cli("init", "starting/faulty.csv", "--out", "starting/faulty.yaml")
    t.cli("init", "starting/faulty.csv", "--mend", "starting/mended.csv", "--out", "starting/mended.yaml")
    t.cli("init", "inputs/reviews.json.gz", "--out", "starting/reviews.yaml")
    t.cli("init", "inputs/events.csv", "--user", "nobody", "--out", "starting/none.yaml")
    t.show("*.yaml", "*.csv")


@scenario("inputs")
def reading(t: Recorder) -> None:
    """The errors of malformed tables, by `init` and by a recipe."""
    words = ("--force", "--user", "user_id", "--item", "item_id")
    for name, content in BROKEN.items():
        (t.folder / name).write_bytes(content)
        t.cli("--json", "init", f"reading/{name}", "--out", "reading/out.yaml", *words, json_output=True)
        columns = (
            "{user: user_id, item: item_id, time: time}" if b"time" in content else "{user: user_id, item: item_id}"
        )
        t.cli("data", "inputs/classic.yaml", f"data={{source: table, path: reading/{name}, columns: {columns}}}")


@scenario("inputs", "classic", "tuned", "codes")
def ranking(t: Recorder) -> None:
    """Ranked lists by every kind of model, for every request format."""
    tuned = ("rank", "--model", "tuned/run", "--backend", "hf")
    for kind in ("jsonl", "csv", "parquet"):
        t.cli(*tuned, "--in", f"inputs/requests.{kind}", "--out", f"ranking/tuned-{kind}.jsonl")
    for strategy in ("list", "window", "pairwise"):
        words = ("--task", "direct", "--strategy", strategy, "--in", "inputs/requests.csv")
        t.cli(*tuned, *words, "--out", f"ranking/{strategy}.csv", "--top", "3")
    t.cli(*tuned, "--in", "inputs/requests.csv", "--out", "ranking/all.jsonl", "--candidates", "all", "--beams", "4")
    t.cli(*tuned, "--in", "inputs/requests.csv", "--out", "-", "--rationale", "1", "--limit", "2")
    t.cli(*tuned, "--in", "inputs/requests.csv", "--out", "ranking/retrieved.tsv", "--retrieve", "item-knn", "--k", "4")
    t.cli(*tuned, "--in", "inputs/requests.csv", "--out", "ranking/joined.jsonl", "--fuse", "model")
    codes = ("rank", "--model", "codes/run", "--backend", "hf", "--candidates", "all", "--beams", "4")
    t.cli(*codes, "--in", "inputs/requests.csv", "--out", "ranking/codes.jsonl")
    classic = ("rank", "--model", "classic/run")
    for number, name in enumerate(("fusion", "fusion with texts", "item-knn", "ease", "content", "no such")):
        t.cli(*classic, "--by", name, "--in", "inputs/requests.jsonl", "--out", f"ranking/classic-{number}.jsonl")
    t.cli(*classic, "--in", "inputs/requests.csv", "--out", "ranking/classic.trec")
    t.cli(*classic, "--in", "inputs/requests.csv", "--out", "ranking/long.csv", "--form", "long", "--top", "3")
    t.cli(*classic, "--all-users", "--to", "ranking/users.csv", "--top", "3")
    words = ("--baseline", "item-knn", "--recipe", "inputs/classic.yaml")
    t.cli("rank", *words, "--in", "inputs/requests.csv", "--out", "ranking/baseline.parquet")
    untuned = ("rank", "--model", "inputs/model", "--items", "inputs/films.csv", "--noun", "films", "--backend", "hf")
    t.cli(*untuned, "--in", "inputs/requests.csv", "--out", "ranking/untuned.jsonl")
    for shard in ("1/2", "2/2"):
        t.cli(
            *tuned, "--in", "inputs/requests.jsonl", "--out", "ranking/merged.jsonl", "--shard", shard, "--batch", "2"
        )
    t.cli("merge", "ranking/merged.jsonl")
    for name in ("none.csv", "truth.csv"):
        t.cli(*classic, "--in", f"inputs/{name}", "--out", "ranking/none.jsonl")
    t.show("*.jsonl", "*.csv", "*.tsv", "*.trec", "*.parquet", "*.summary.json")


@scenario("inputs", "classic", "tuned", "reviewing")
def predicting(t: Recorder) -> None:
    """Answers about one item each."""
    for family in ("rating", "ctr", "explanation", "stars"):
        words = ("predict", "--model", "tuned/run", "--backend", "hf", "--family", family)
        t.cli(*words, "--in", "inputs/questions.csv", "--out", f"predicting/{family}.jsonl")
    words = ("predict", "--model", "reviewing/run", "--backend", "hf", "--family", "review")
    t.cli(*words, "--in", "inputs/questions.csv", "--out", "predicting/review.jsonl")
    t.cli("predict", "--model", "classic/run", "--in", "inputs/questions.csv", "--out", "predicting/classic.jsonl")
    t.show("*.jsonl", "*.json")


@scenario("inputs", "ranking")
def scoring(t: Recorder) -> None:
    """Scores of ranked lists."""
    truth = ("--truth", "inputs/truth.csv", "--resamples", "50")
    t.cli("score", "ranking/tuned-csv.jsonl", *truth)
    t.cli("--json", "score", "ranking/tuned-csv.jsonl", "ranking/joined.jsonl", *truth, json_output=True)
    words = ("ranking/long.csv", "ranking/classic.trec", *truth, "--planned", "NDCG@5", "--k", "1,5")
    t.cli("score", *words)
    for lists in (
        "ranking/classic-0.jsonl",
        "inputs/events.csv",
        "inputs/requests.csv",
        "ranking/none.csv",
        "inputs/tuned.yaml",
    ):
        t.cli("score", lists, *truth)


@scenario("inputs", "classic", "tuned")
def serving(t: Recorder) -> None:
    """Every route of a service, its errors, and its tools for agents."""
    shutil.copytree("tuned/run", t.folder / "run")
    names = [word for name in ("tuned", "fusion", "item-knn", "popularity") for word in ("--models", name)]
    with t.serve("serving/run", "--backend", "hf", "--store", "serving/store.sqlite", "--mcp", *names) as http:
        for path in ("/health", "/ready", "/v1/models", "/openapi.json", "/v1/items?q=river&limit=3", "/v1/items/f03"):
            http.ask("GET", path)
        for path in ("/v1/users/u01", "/v1/items/none", "/v1/users/nobody", "/v1/none", "/v1/items?limits=3"):
            http.ask("GET", path)
        user = {"history": ["f01", {"item_id": "f02", "rating": 5}, {"title": "Unheard Of"}]}
        listed = {"candidates": ["f05", "f06", {"title": "Something New"}]}
        for model in ("tuned", "fusion", "item-knn", "popularity", "none"):
            http.ask("POST", "/v1/rank", {**user, "model": model, "k": 3})
            http.ask("POST", "/v1/rank", {**user, **listed, "model": model})
            http.ask("POST", "/v1/rank", {"user_id": "u07", "model": model, "k": 3})
        http.ask("POST", "/v1/rank", {**user, **listed, "show_prompt": True, "rationale": 1})
        http.ask("POST", "/v1/rank", {**user, **listed, "strategy": "pointwise-yes"})
        http.ask("POST", "/v1/rank", {"user_id": "somebody new", "k": 3})
        rules = {"only": {"genre": ["War", "Drama"]}, "block": ["f03"], "quotas": [{"field": "genre", "most": 1}]}
        http.ask("POST", "/v1/rank", {**user, "model": "item-knn", "k": 5, "rules": rules})
        http.ask("POST", "/v1/rank", {**user, "model": "item-knn", "rules": {"only": {"gender": ["x"]}}})
        several = {"requests": [{**user, "k": 2, "model": "fusion"}, {**user, "candidates": ["none"]}]}
        http.ask("POST", "/v1/rank/batch", several)
        for verb in ("rate", "predict", "explain"):
            http.ask("POST", f"/v1/{verb}", {"user_id": "u02", "item_id": "f09"})
            http.ask("POST", f"/v1/{verb}", {**user, "item": {"title": "Something New"}, "show_prompt": True})
            http.ask("POST", f"/v1/{verb}", {**user, "item_id": "none"})
            http.ask(
                "POST", f"/v1/{verb}/batch", {"requests": [{"user_id": "u03", "item_id": "f09"}, {"item_id": "none"}]}
            )
        http.ask("POST", "/v1/explain", {"user_id": "u02", "item_id": "f09"}, Accept="text/event-stream")
        http.ask("POST", "/v1/ask", {"family": "rating", "user_id": "u02", "item_id": "f09"})
        http.ask("POST", "/v1/ask", {"family": "stars", "user_id": "u02", "item_id": "f09"})
        for way in ("interactions", "text", "colour"):
            http.ask("POST", "/v1/similar", {"item_ids": ["f03"], "k": 3, "by": way})
        http.ask("POST", "/v1/chat", {"text": "a comedy, but nothing from the fifties", "k": 3})
        http.ask("POST", "/v1/chat", {"text": "something like Quiet River"}, Accept="text/event-stream")
        lines = {"query": "Quiet River\nGolden River", "documents": ["Broken Mirror", "Silver Station"], "top_n": 1}
        for path in ("/v1/rerank", "/v2/rerank"):
            http.ask("POST", path, lines)
        http.ask("POST", "/v1/rerank", {"query": "x", "documents": []})
        new = {"item_id": "n1", "title": "Newest Promise", "fields": {"genre": "War", "year": "1999"}}
        http.ask("PUT", "/v1/items", {"items": [new]})
        http.ask("PUT", "/v1/items", {"items": [{"item_id": "n2"}]})
        http.ask("POST", "/v1/rank", {**user, "candidates": ["n1", "f07"]})
        seen = [{"user_id": "newcomer", "item_id": "f04"}, {"user_id": "newcomer", "item_id": "f08", "rating": 5}]
        http.ask("POST", "/v1/events", {"events": seen})
        http.ask("POST", "/v1/events", {"events": [{"user_id": "newcomer", "item_id": "none"}]})
        http.ask("GET", "/v1/users/newcomer")
        http.ask("POST", "/v1/rank", {"user_id": "newcomer", "model": "item-knn", "k": 3})
        for path in ("/v1/users/newcomer", "/v1/users/u05", "/v1/items/n1", "/v1/items/none"):
            http.ask("DELETE", path)
        for body in (
            b"{",
            b"[]",
            b'{"k": 1, "k": 2}',
            b'{"user": "u01"}',
            b'{"history": "f01"}',
            b'{"k": "many"}',
            b"",
        ):
            http.ask("POST", "/v1/rank", body)
        http.ask("POST", "/v1/rank", b"k=1", Content_Type="application/x-www-form-urlencoded")
        http.ask("GET", "/v1/rank")
        speaks = {"Accept": "application/json, text/event-stream"}
        http.ask(
            "POST",
            "/mcp",
            _rpc("initialize", protocolVersion="2025-06-18", capabilities={}, clientInfo=_CLIENT),
            **speaks,
        )
        http.ask("POST", "/mcp", _rpc("tools/list"), **speaks)
        for tool, arguments in _TOOLS:
            http.ask("POST", "/mcp", _rpc("tools/call", name=tool, arguments=arguments), **speaks)
        for path in ("/", "/chat", "/metrics"):
            http.ask("GET", path)
        http.ask("POST", "/v1/reload")


@scenario("inputs", "classic")
def keys(t: Recorder) -> None:
    """A service with API keys and rules, and one with a baseline only."""
    made = []
    for words in (("somebody",), ("boss", "--admin")):
        code, out, _ = forked(lambda words=words: _llmrec(["serve-key", "keys/keys.json", *words]))
        made.append(printed[0] if (printed := re.findall(r"llmrec_\S+", out)) else f"exit code {code}")
    (t.folder / "rules.yaml").write_text("without: {genre: [War]}\nblock: [f03]\n", encoding="utf-8")
    words = ("--keys", "keys/keys.json", "--rules", "keys/rules.yaml", "--store", "keys/store.sqlite")
    with t.serve("classic/run", *words, "--models", "item-knn") as http:
        for headers in ({}, {"Authorization": "Bearer no"}, *({"Authorization": f"Bearer {key}"} for key in made)):
            http.ask("POST", "/v1/rank", {"user_id": "u05", "k": 4}, **headers)
            http.ask("DELETE", "/v1/users/u06", **headers)
        http.ask("GET", "/health")
    t.cli("serve-key", "keys/keys.json", "somebody", "--revoke")
    t.cli("serve-key", "keys/keys.json", "nobody", "--revoke")
    t.cli("serve", "classic/run", "--host", "0.0.0.0", "--port", "0")


_CLIENT = {"name": "same-run", "version": "1"}
_TOOLS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("search_items", {"query": "river", "limit": 2}),
    ("recommend", {"history": ["f01", {"item_id": "f02", "rating": 5}], "k": 2}),
    ("recommend", {"user_id": "u04", "k": 2, "model": "item-knn"}),
    ("recommend", {"users": "u04"}),
    ("no_such_tool", {}),
)


def _rpc(method: str, **parameters: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": 1, "method": method, "params": parameters}


TALK = """\
I'd like a comedy, but nothing from the fifties
why the first one?
something like number 2
more
not crime
I loved Quiet River
a film about a harbour
dramas or wars
what do you know about me?
forget everything
thanks

"""


@scenario("inputs", "classic", "tuned")
def talking(t: Recorder) -> None:
    """Conversations: read from a file, replayed, and with simulated users."""
    chat = ("chat", "classic/run", "--models", "item-knn")
    t.cli(*chat, "--save", "talking/talk.jsonl", stdin=TALK)
    t.cli(*chat, "--replay", "talking/talk.jsonl")
    t.cli("chat", "classic/run", "--models", "fusion", "--replay", "talking/talk.jsonl")
    t.cli(*chat, "--simulate", "4", "--save", "talking/simulated.jsonl")
    t.cli(
        *chat,
        "--manager",
        "inputs/model",
        "--dtype",
        "float32",
        "--save",
        "talking/model.jsonl",
        stdin=TALK[:120] + "\n\n",
    )
    t.cli(
        *chat,
        "--ranker",
        "inputs/model",
        "--dtype",
        "float32",
        "--save",
        "talking/ranker.jsonl",
        stdin=TALK[:70] + "\n\n",
    )
    t.cli("chat", "tuned/run", "--models", "none", stdin="hello\n\n")
    t.show("*.jsonl")


@scenario("inputs", "tuned")
def exporting(t: Recorder) -> None:
    """An exported model, its card, and what it answers."""
    words = ("export", "tuned/run", "--check-users", "4", "--licence", "mit", "--base-licence", "apache-2.0")
    t.cli(*words, "--out", "exporting/whole", "--with-interactions")
    t.cli(*words, "--out", "exporting/whole")
    t.cli(*words, "--out", "exporting/adapter", "--adapter-only", "--no-items")
    t.show("*.md", "*.safetensors", "*.json", "*.parquet")
    requests = ("--in", "inputs/requests.csv", "--backend", "hf")
    t.cli("rank", "--model", "exporting/whole", *requests, "--out", "exporting/lists.csv")
    t.cli("rank", "--model", "exporting/adapter", *requests, "--out", "exporting/none.csv")
    t.cli("rank", "--model", "exporting/whole", *requests, "--fuse", "baselines", "--out", "exporting/fused.csv")
    t.show("lists.csv", "none.csv", "fused.csv")


@scenario("inputs")
def automatic(t: Recorder) -> None:
    """A recommender within a budget of time; its settings depend on the machine, so only names are kept."""
    words = ["auto", "inputs/events.csv", "--classic", "--budget", "60s", "--users", "20", "--out", "automatic/run"]
    code, _, err = forked(lambda: _llmrec(words))
    names = sorted(path.name for path in (t.folder / "run").iterdir())
    t.note("llmrec " + " ".join(words), "\n".join([f"exit code {code}", *names, err if code else ""]))
    words = ["--in", "inputs/requests.csv", "--by", "popularity", "--out", "automatic/lists.jsonl"]
    t.cli("rank", "--model", "automatic/run", *words)
    for words in (("--budget", "soon"), ("--budget", "1s")):
        t.cli("auto", "inputs/events.csv", "--classic", *words, "--out", "automatic/none")
    t.python("lists", lambda: sys.stdout.write(dump(t.folder / "lists.jsonl")))


@scenario("inputs")
def searching(t: Recorder) -> None:
    """A search of a recipe's keys: every combination, and a second call."""
    words = ("tune", "inputs/classic.yaml", "--over", "tasks.sequential.history=3,10", "--metric", "sequential/NDCG@10")
    for _ in range(2):
        t.cli(*words, "--out", "searching/trials", "--set", "eval.users=20")
    t.cli("tune", "inputs/classic.yaml", "--over", "tasks.sequential.hystory=3,10", "--out", "searching/none")
    t.show("best.yaml", "trials.csv", "tune.json")


@scenario("inputs")
def features(t: Recorder) -> None:
    """A store of texts: imported, shown, compared, corrected and forgotten."""
    texts = [{"user_id": f"u{number:02}", "text": f"likes {GENRES[number % 5]}"} for number in range(1, 9)]
    write_csv(t.folder / "texts.csv", texts)
    write_csv(t.folder / "others.csv", [{**texts[0], "text": "likes nothing"}, *texts[2:]])
    write_csv(t.folder / "seen.csv", [{"user_id": "u01", "item_id": "f01"}, {"user_id": "u02", "item_id": "f02"}])
    make = ("features", "import", "--kind", "user", "--encoder", "chance")
    t.cli(*make, "features/texts.csv", "--seen", "features/seen.csv", "--out", "features/one")
    t.cli(*make, "features/others.csv", "--out", "features/two")
    t.cli(*make, "inputs/films.csv", "--out", "features/three")
    t.cli("features", "show", "features/one")
    t.cli("features", "show", "features/one", "u01", "u03", "nobody")
    t.cli("features", "diff", "features/one", "features/two")
    t.cli("features", "edit", "features/one", "u01", "--text", "likes everything")
    t.cli("features", "forget", "features/one", "u02")
    t.cli("--json", "features", "show", "features/one", json_output=True)
    t.cli("features", "show", "features/none")
    t.show()


@scenario("inputs")
def augmenting(t: Recorder) -> None:
    """Texts by a language model, in one process and in shards, and their baseline."""
    for words in ((), ("--shard", "1/2"), ("--shard", "2/2")):
        folder = "shards" if words else "whole"
        t.cli("augment", "inputs/augment.yaml", "--out", f"augmenting/{folder}", *words)
    t.cli("merge", "augmenting/shards")
    t.cli("features", "diff", "augmenting/whole", "augmenting/shards")
    t.cli("augment", "inputs/augment.yaml", "--without-model", "--out", "augmenting/control")
    t.cli("augment", "inputs/augment.yaml", "--dry-run")
    for store in ("whole", "shards", "control"):
        t.cli("features", "show", f"augmenting/{store}", "u07", "u12")
        t.cli("features", "show", f"augmenting/{store}", "f11", "f13", "--kind", "item")
    t.show()


@scenario("inputs", "tuned")
def shards(t: Recorder) -> None:
    """An evaluation in shards."""
    shutil.copytree("tuned/run", t.folder / "run")
    for shard in ("1/2", "2/2"):
        t.cli("eval", "inputs/tuned.yaml", "eval.users=6", "eval.batch=2", "--out", "shards/run", "--shard", shard)
    t.cli("merge", "shards/run")
    t.cli("merge", "shards/none")
    t.show(*RUN, under="run")


@scenario("inputs", "classic", "tuned")
def joining(t: Recorder) -> None:
    """Finished runs combined and compared."""
    t.cli("run", "inputs/classic.yaml", "eval.users=20", "seed=1", "--out", "joining/other")
    words = ("tasks.sequential.baselines=[random, popularity, item-knn, markov-1, ease]", "eval.candidates.count=5")
    t.cli("run", "inputs/classic.yaml", *words, "--out", "joining/same")
    t.cli("run", "inputs/classic.yaml", *words, "tasks.sequential.history=3", "--out", "joining/short")
    t.cli("compare", "joining/same", "joining/short", "--resamples", "50", "--to", "joining/differences.csv")
    t.cli("--json", "compare", "joining/same", "joining/short", "--resamples", "50", json_output=True)
    t.cli("compare", "joining/same", "joining/other")
    t.cli("compare", "joining/same", "tuned/run")
    t.cli("fuse", "joining/same", "joining/short", "--out", "joining/joined")
    t.cli("fuse", "joining/same", "joining/other", "--out", "joining/none")
    t.show("differences.csv")
    t.show(*RUN, under="joined")


@scenario("inputs")
def suites(t: Recorder) -> None:
    """A suite, a benchmark and a suite of conversations, each twice, with their pages."""
    for _ in range(2):
        for name in ("suite", "bench", "chats"):
            t.cli("eval", f"inputs/{name}.yaml", "--out", f"suites/{name}", "--results", "suites/eval/results")
    t.cli("report", "suites/eval/results")
    t.show("*.json", "*.md", "*.csv", "*.svg", under="eval")


@scenario("inputs", "classic")
def refreshing(t: Recorder) -> None:
    """New interactions and items for a served folder."""
    late = [{**event, "user_id": f"n{event['user_id'][1]}"} for event in events()[:40]]
    write_csv(t.folder / "late.csv", late)
    words = ("refresh", "classic/run", "--events", "refreshing/late.csv", "--out", "refreshing/live")
    for _ in range(2):
        t.cli(*words)
    t.cli("rank", "--model", "refreshing/live", "--in", "inputs/requests.csv", "--out", "refreshing/lists.csv")
    t.show("lists.csv")


@scenario("inputs", "classic", "tuned")
def python(t: Recorder) -> None:
    """The functions of `llmrec`, on frames and paths."""

    def show(*values: object) -> None:
        sys.stdout.write("".join(f"{value}\n" for value in values))

    def refused(work: Callable[[], object]) -> None:
        import llmrec

        try:
            show(work())
        except llmrec.LlmrecError as error:
            show(error, error.file, error.row, error.column)

    def frames() -> None:
        import llmrec

        show(*llmrec.__all__)
        rows = events()
        begun = llmrec.init(rows)
        show(begun, llmrec.check("inputs/classic.yaml"), llmrec.load_recipe("inputs/classic.yaml", ["eval.users=3"]))
        recipe = {
            "name": "frames",
            "data": {"source": "table", "columns": {"user": "user_id", "item": "item_id", "time": "time"}},
            "tasks": {"sequential": {"baselines": ["random", "popularity", "item-knn", "markov-1"]}},
            "eval": {"arms": [], "users": 20, "bootstrap": 50, "candidates": {"count": 5}},
        }
        run = llmrec.run(recipe, "python/frames", data=rows, quiet=True)
        show(run, run.results["recipe"]["name"], json.dumps(bare(run.results["rows"]), default=str))
        refused(lambda: llmrec.run({**recipe, "data": {"source": "table", "columns": {"user": "nobody"}}}, data=rows))
        refused(lambda: llmrec.load_recipe("inputs/classic.yaml", {"eval.user": 1}))
        refused(lambda: llmrec.auto(rows, budget="soon", out="python/none"))
        refused(lambda: llmrec.load("python/none"))

    def loaded(folder: str) -> None:
        import llmrec

        with llmrec.load(folder) as rec:
            show(rec)
            for work in (
                lambda: rec.rank(history=["f01", "f02"], k=3),
                lambda: rec.rank(user="u04", k=3),
                lambda: rec.rank(user="nobody", candidates=["f01", "f05"]),
                lambda: rec.rank(candidates=["none"]),
                lambda: rec.rate("f05", user="u04"),
                lambda: rec.explain("f05", user="u04"),
            ):
                refused(work)

    def scored() -> None:
        import llmrec

        lists = [{"user": f"u{user}", "item": f"f{item}", "score": item / 2} for user in range(9) for item in range(6)]
        truth = [{"user": f"u{user}", "item": f"f{user % 7}"} for user in range(9)]
        scores = llmrec.score(lists, truth, against=lists[::2], resamples=50)
        show(scores, scores.metrics, scores.comparisons)
        refused(lambda: llmrec.score(lists + lists[:1], truth))
        show(llmrec.compare("classic/run", "classic/run", resamples=50))

    t.python("frames", frames)
    t.python("load classic", lambda: loaded("classic/run"))
    t.python("load tuned", lambda: loaded("tuned/run"))
    t.python("score and compare", scored)


# --------------------------------------------------------------------------- recording


def record(out: Path, names: Sequence[str], *, again: bool) -> None:
    """Record scenarios; recorded ones are kept unless ``again``."""
    checkout = _checkout()
    work = out.resolve() / "work"
    work.mkdir(parents=True, exist_ok=True)
    _environment(checkout, work)
    os.chdir(work)
    _import()
    sys.stderr.write(f"recording {checkout}\n")
    chosen = set(names or SCENARIOS)
    for name in SCENARIOS:
        wanted = name in chosen or any(name in NEEDS[other] for other in _closure(chosen))
        path = work.parent / f"{name}.txt"
        if not wanted or (path.exists() and not (again and name in chosen)):
            continue
        begin = time.monotonic()
        recorder = Recorder(work / name, {str(work): "WORK", str(checkout): "CHECKOUT", sys.prefix: "PYTHON"})
        shutil.rmtree(recorder.folder, ignore_errors=True)
        recorder.folder.mkdir()
        try:
            SCENARIOS[name](recorder)
        except Exception as error:
            recorder.note("failed", repr(error))
        text = "".join(f"{HEAD}{head}\n{text}\n" for head, text in recorder.sections)
        path.write_text(text, encoding="utf-8")
        sys.stderr.write(f"{name}: {time.monotonic() - begin:.1f} s\n")


def _closure(names: set[str]) -> set[str]:
    more = names | {need for name in names for need in NEEDS[name]}
    return names if more == names else _closure(more)


def _checkout() -> Path:
    spec = importlib.util.find_spec("llmrec")
    if spec is None or spec.origin is None:
        raise SystemExit("llmrec is not there: PYTHONPATH=CHECKOUT python same_run.py record OUT")
    return Path(spec.origin).resolve().parents[1]


def _environment(checkout: Path, work: Path) -> None:
    """Set what commands read of the environment; a script's own folder is none of modules."""
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(checkout), *(path for path in sys.path if Path(path or ".").resolve() not in (here, checkout))]
    for name in [name for name in os.environ if name.startswith(("LLMREC_", "HF_"))]:
        del os.environ[name]
    os.environ |= {
        "COLUMNS": "120",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HOME": str(work / ".hub"),
        "HF_HUB_OFFLINE": "1",
        "LLMREC_CACHE": str(work / ".cache"),
        "LLMREC_FITS": "off",
        "NO_COLOR": "1",
        "OMP_NUM_THREADS": "1",
        "POLARS_MAX_THREADS": "1",
        "PYTHONPATH": str(checkout),
        "TERM": "dumb",
        "TOKENIZERS_PARALLELISM": "false",
        "TZ": "UTC",
    }


def _import() -> None:
    """Import slow libraries once, before forking; the imports must not start threads."""
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers
    from transformers import AutoTokenizer, LlamaForCausalLM, Trainer  # noqa: F401

    transformers.logging.set_verbosity_warning()
    llmrec = importlib.import_module("llmrec")
    for name in llmrec.__all__:
        getattr(llmrec, name)


# --------------------------------------------------------------------------- comparing


def sections(path: Path) -> dict[str, str]:
    """Return the sections of a recorded scenario by head; a repeated head is numbered."""
    result: dict[str, str] = {}
    # What this version leaves out may be in a recording by an earlier one.
    for text in normal(path.read_text(encoding="utf-8")).split(f"\n{HEAD}"):
        head, _, body = text.removeprefix(HEAD).partition("\n")
        number = 2
        while (name := head if head not in result else f"{head} [{number}]") in result:
            number += 1
        result[name] = body
    return result


def recorded(folder: Path) -> dict[str, dict[str, str]]:
    """Return the sections of each scenario of a recording, or the files of a run folder as one scenario."""
    if (folder / "results.json").is_file():
        files = ("results.json", "predictions.parquet", "adapter/adapter_model.safetensors")
        folders = {str(folder.resolve()): "RUN", str(folder): "RUN"}
        return {"run": {name: normal(dump(folder / name), folders) for name in files if (folder / name).is_file()}}
    result = {path.stem: sections(path) for path in sorted(folder.glob("*.txt"))}
    if not result:
        raise SystemExit(f"{folder}: neither a recording nor a run folder")
    return result


def differences(one: Path, other: Path, lines: int = 12) -> list[str]:
    """Return the differences between two recordings or two run folders, with the first lines of each."""
    first, second = recorded(one), recorded(other)
    result = [f"{name}: only in {one if name in first else other}" for name in sorted(first.keys() ^ second.keys())]
    for name in sorted(first.keys() & second.keys()):
        left, right = first[name], second[name]
        for head in [*left, *(head for head in right if head not in left)]:
            if left.get(head) == right.get(head):
                continue
            sides = (left.get(head, "(not there)"), right.get(head, "(not there)"))
            diff = list(difflib.unified_diff(*(side.splitlines() for side in sides), n=0, lineterm=""))[2:]
            more = [f"... {len(diff) - lines} more lines"] if len(diff) > lines else []
            result.append("\n    ".join([f"{name}: {head}", *map(_short, diff[:lines]), *more]))
    return result


def _short(line: str, most: int = 300) -> str:
    return line if len(line) <= most else f"{line[:most]} ... {len(line) - most} more characters"


def main(arguments: Sequence[str] | None = None) -> int:
    """Record scenarios, or compare two recordings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run the scenarios and write their output")
    recording.add_argument("out", type=Path)
    recording.add_argument("--only", nargs="+", default=(), choices=list(SCENARIOS), metavar="NAME")
    recording.add_argument("--again", action="store_true", help="also recorded scenarios")
    comparing = commands.add_parser("compare", help="print the differences; exit code 1 if there are any")
    comparing.add_argument("one", type=Path)
    comparing.add_argument("two", type=Path)
    comparing.add_argument("--lines", type=int, default=12, help="lines per difference")
    given = parser.parse_args(arguments)
    if given.command == "record":
        record(given.out, given.only, again=given.again)
        return 0
    result = differences(given.one, given.two, given.lines)
    sys.stdout.write("\n".join(result or ["the same"]) + "\n")
    return int(bool(result))


if __name__ == "__main__":
    sys.exit(main())
