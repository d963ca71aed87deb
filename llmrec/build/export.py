"""A run becomes a folder of its own: merged weights, tokenizer, how to ask it, and a model card.

What is written is a list of what may be, not of what may not: safetensors, configurations, the tokenizer, text. The
folder is built beside its place and moved there whole, so that a killed export leaves nothing under the final name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from llmrec.backends.encode import Encoder
from llmrec.backends.models import dtype as torch_dtype
from llmrec.backends.models import load_tokenizer, quiet_libraries, release_memory, resolve
from llmrec.build import agreement, bundle, cards, hub, vetting
from llmrec.build.finished import Source, open_run
from llmrec.build.placing import placing, refuse
from llmrec.build.stages import locked
from llmrec.build.study import Study
from llmrec.build.training import training_key
from llmrec.durable import sha256_of, write_json, write_text
from llmrec.errors import DataError, LlmrecError, ModelError, did_you_mean, require
from llmrec.recipe import Recipe
from llmrec.report import card
from llmrec.report.card import Agreement

SUMS = "SHA256SUMS"

_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "additional_chat_templates/*.jinja"),
)
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
_MODEL = (*_WEIGHTS, "config.json", "generation_config.json", *_TOKENIZER)
# Where libraries note which folder of which machine something was loaded from.
_PLACES = ("_name_or_path", "name_or_path", "_model_name_or_path", "is_local", "local_files_only")
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SLACK = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `export` is asked for.

    Attributes:
        out: The folder to write.
        dtype: Of the weights; ``auto``: the one that the run was evaluated in.
        adapter_only: Write the adapter instead of a whole model.
        with_items: Put the catalogue into the folder.
        users: Validation cases a family on which the export is checked; 0: none.
        licence: Of the tuned weights and the card.
        base_licence: Of the base model, where it does not say itself.
        push: Hub name to upload to.
        private: Whether that repository is private.
        force: Replace an earlier export.
    """

    out: Path
    dtype: str = "auto"
    adapter_only: bool = False
    with_items: bool = False
    users: int
    licence: str | None = None
    base_licence: str | None = None
    push: str | None = None
    private: bool = True
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A finished export.

    Attributes:
        folder: Where it lies.
        dtype: Of its weights.
        files: Size of each file in bytes, by name.
        agreement: What was measured before and after; None if nothing was.
        notes: What a reader must know.
        address: Where it was uploaded to.
    """

    folder: Path
    dtype: str
    files: Mapping[str, int]
    agreement: Agreement | None
    notes: tuple[str, ...]
    address: str | None = None


def export(run: Path, options: Options, *, say: Callable[[str], None] = lambda text: None) -> Exported:
    """Write a run's tuned model, or its adapter, as a folder that stands alone.

    Args:
        run: A run folder that `llmrec train` or `llmrec run` finished.
        options: What to write, and where.
        say: Is told what is going on.

    Raises:
        LlmrecError: If the run is unfinished or altered, the folder cannot be written, or the upload failed.
    """
    # First of all: other libraries say hello as soon as they are imported.
    quiet_libraries()
    require("peft", "train")
    _consistent(options)
    if options.push:
        hub.check(options.push)
    refuse(options.out, force=options.force, ours=_ours)
    with locked(run) if os.access(run, os.W_OK) and (run / "train.json").is_file() else nullcontext():
        source = open_run(run)
        done = _write(source, options, say)
    if not options.push:
        return done
    say(f"uploading to {options.push}")
    address = hub.push(done.folder, options.push, list(done.files), private=options.private)
    return replace(done, address=address)


def summary(done: Exported) -> list[tuple[str, dict[str, str]]]:
    """Return what a person wants to see of an export: titles, each with names and values."""
    size = sum(done.files.values())
    what = {"folder": str(done.folder), "dtype": done.dtype, "size": f"{size / 1e6:,.1f} MB in {len(done.files)} files"}
    shown = [("export", what | ({"address": done.address} if done.address else {}))]
    if done.agreement is not None:
        shown.append((f"{done.agreement.before} → {done.agreement.after}", card.agreement_lines(done.agreement)))
    if done.notes:
        shown.append(("notes", {str(n): note for n, note in enumerate(done.notes, 1)}))
    return shown


def verify(folder: Path) -> bool:
    """Whether a folder is an export, and holds what its ``SHA256SUMS`` says and nothing else."""
    listed = _listed(folder)
    return listed is not None and all(sha256_of(folder / name) == digest for name, digest in listed.items())


def _ours(folder: Path) -> bool:
    """Whether a folder holds the files of an export and no others; their content may have been edited."""
    return _listed(folder) is not None


def _listed(folder: Path) -> dict[str, str] | None:
    """Return the digests in ``SHA256SUMS`` by file; None if the folder holds other files than those."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        listed = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError):
        return None
    held = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir()}
    return listed if held == {*listed, SUMS} else None


def _consistent(options: Options) -> None:
    if not options.out.name or not options.out.name.isprintable():
        raise LlmrecError(
            f"--out {str(options.out)!r} names no folder to be made; write one, such as --out films-model"
        )
    if options.dtype not in ("auto", *_BYTES):
        raise LlmrecError(
            f"--dtype {options.dtype!r} is unknown{did_you_mean(options.dtype, _BYTES)}; known: {', '.join(_BYTES)}"
        )
    if options.adapter_only and options.dtype != "auto":
        raise LlmrecError("--dtype is for merged weights, and --adapter-only writes none; leave one of them out")


# --------------------------------------------------------------------------- the folder


def _write(source: Source, options: Options, say: Callable[[str], None]) -> Exported:
    recipe = source.recipe
    base, study = _base(source), _study(source, options)
    dtype = options.dtype
    if dtype == "auto":
        dtype = source.merged or str(torch_dtype(recipe.model)).removeprefix("torch.")
    _check_room(source, base, dtype, options)
    notes = _notes(source, base, study)
    with placing(options.out, force=options.force, ours=_ours) as draft:
        if options.adapter_only:
            _copy_adapter(source, base, draft)
        else:
            _put_weights(source, base, study, dtype, draft, say)
        _put_bundle(source, study, draft)
        tokenizer = load_tokenizer(base if options.adapter_only else str(draft), recipe.model)
        encoder = Encoder(tokenizer, max_length=recipe.model.max_length)
        found = None
        if not options.adapter_only:
            _settle_generation(draft, encoder)
            if options.users and study is not None:
                adapter = source.folder / "adapter"
                found = agreement.measure(study, encoder, base, adapter, draft, dtype, users=options.users, say=say)
        if options.with_items and study is not None:
            _put_items(study, draft)
        facts = cards.Facts(
            run=source.folder,
            recipe=recipe,
            record=source.record,
            base=base,
            study=study,
            told=json.loads((draft / bundle.FILE).read_text(encoding="utf-8")),
            encoder=encoder,
            dtype=dtype,
            agreement=found,
            notes=notes,
        )
        written = cards.build(facts, _wishes(options))
        write_text(draft / "README.md", card.render(written))
        cards.put_licence(written, base, draft)
        vetting.inspect(draft, (source.folder, Path(base), options.out.parent), own_code=written.own_code)
        files = _seal(draft)
    return Exported(folder=options.out, dtype=dtype, files=files, agreement=found, notes=notes)


def _wishes(options: Options) -> cards.Wishes:
    name = options.out.name
    return cards.Wishes(
        name=options.push.rpartition("/")[2] if options.push else name,
        address=options.push or name,
        adapter_only=options.adapter_only,
        with_items=options.with_items,
        licence=options.licence,
        base_licence=options.base_licence,
    )


def _base(source: Source) -> str:
    """Return the folder of the base model."""
    try:
        return resolve(source.recipe.model)
    except ModelError as error:
        raise ModelError(f"the base model of {source.folder} is needed for the export: {error}") from error


def _study(source: Source, options: Options) -> Study | None:
    """Build the study on validation cases; None if the data is gone and nothing that was asked for needs it."""
    try:
        return agreement.on_validation(source.recipe, options.users)
    except DataError as error:
        needed = "--with-items" if options.with_items else "--check-users" if options.users else None
        if needed is None or (options.adapter_only and not options.with_items):
            return None
        mend = "leave that out" if options.with_items else "give --check-users 0; the card then says so"
        raise DataError(f"{error} ({needed} reads the data of the run; without it, {mend})") from error


def _notes(source: Source, base: str, study: Study | None) -> tuple[str, ...]:
    """Say what could not be confirmed."""
    if study is None:
        return ("The data could not be read at export, so the record of the training could not be checked against it.",)
    if training_key(study, base) != source.record["key"]:
        return (
            "Recipe, data, base model, templates or llmrec version are not all the same at export as they were in "
            "training.",
        )
    return ()


def _check_room(source: Source, base: str, dtype: str, options: Options) -> None:
    folder = source.folder / "adapter" if options.adapter_only else Path(base)
    if options.adapter_only:
        needed = sum(file.stat().st_size for file in folder.iterdir())
    else:
        needed = vetting.elements(folder) * _BYTES[dtype]
    place = options.out.absolute().parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed + _SLACK:
        raise LlmrecError(
            f"{place} has {free / 1e9:.2f} GB free, and the export needs about {(needed + _SLACK) / 1e9:.2f} GB; "
            "make room, choose another --out, or a smaller --dtype"
        )


def _copy_adapter(source: Source, base: str, draft: Path) -> None:
    if source.record["method"] == "full":
        raise LlmrecError(f"{source.folder} tuned every weight, so it has no adapter; leave out --adapter-only")
    adapter = source.folder / "adapter"
    shutil.copyfile(adapter / "adapter_model.safetensors", draft / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    origin = cards.origin(source.recipe.model, base)
    config |= {"base_model_name_or_path": origin.hub or origin.name, "revision": origin.revision}
    write_json(draft / "adapter_config.json", config)


def _put_weights(
    source: Source, base: str, study: Study | None, dtype: str, draft: Path, say: Callable[[str], None]
) -> None:
    """Write weights, configuration and tokenizer: those of the run where the dtype is theirs, else merged anew."""
    merged = source.folder / "merged"
    if source.merged == dtype:
        say(f"copying the merged weights, {dtype}")
        _copy(merged, draft, _allowed(source.recipe))
    else:
        from llmrec.train import lora

        say(f"merging the adapter into the base in float32, saving {dtype}")
        section = source.recipe.model.model_copy(update={"dtype": dtype})
        if source.record["method"] == "full":
            lora.save_full(source.folder / "adapter", section, draft)
        else:
            lora.merge(base, section, source.folder / "adapter", draft)
        release_memory()
        _same_base(source, study, base, dtype, draft)
        if source.merged is not None:
            _copy(merged, draft, _TOKENIZER)
        else:
            load_tokenizer(base, source.recipe.model).save_pretrained(draft)
        vetting.keep_only(draft, _allowed(source.recipe))
    for name in ("config.json", "tokenizer_config.json"):
        _drop_places(draft / name)


def _same_base(source: Source, study: Study | None, base: str, dtype: str, draft: Path) -> None:
    """Refuse a merge with another base model than the one that was trained on.

    Raises:
        LlmrecError: If neither the run's merged weights nor its training record speak for the base.
    """
    if source.record["method"] == "full":
        return
    if source.merged is not None:
        if vetting.same_weights(source.folder / "merged", draft):
            return
    elif study is not None and training_key(study, base) == source.record["key"]:
        return
    raise LlmrecError(
        f"the adapter in {source.folder} was not trained on the model that is now in {base}, or nothing is left to "
        "tell by; put the base model back (model.name, model.revision), or train again with `llmrec train`"
    )


def _allowed(recipe: Recipe) -> tuple[str, ...]:
    return (*_MODEL, "*.py") if recipe.model.trust_remote_code else _MODEL


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for file in sorted(source.glob(pattern)):
            place = target / file.relative_to(source)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, place)


def _drop_places(path: Path) -> None:
    if path.is_file():
        values = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, {key: value for key, value in values.items() if key not in _PLACES})


def _settle_generation(draft: Path, encoder: Encoder) -> None:
    """Ask for what evaluation did: greedy decoding up to the end of turn, whatever the base model sampled with."""
    path = draft / "generation_config.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    ends = found.get("eos_token_id") or []
    tokenizer = encoder.tokenizer
    settled = {
        "bos_token_id": found.get("bos_token_id", tokenizer.bos_token_id),
        "eos_token_id": sorted({*(ends if isinstance(ends, list) else [ends]), *encoder.stop_ids}),
        "pad_token_id": found.get("pad_token_id", tokenizer.pad_token_id),
        "do_sample": False,
    }
    write_json(path, {key: value for key, value in settled.items() if value is not None})


def _put_bundle(source: Source, study: Study | None, draft: Path) -> None:
    """Write how the model is to be asked: as training wrote it, or anew where that is gone."""
    stored = source.folder / "merged" / bundle.FILE
    if stored.is_file():
        shutil.copyfile(stored, draft / bundle.FILE)
    elif study is not None:
        bundle.write(study, draft)
    else:
        raise LlmrecError(f"{stored} is gone and the data cannot be read; train again with `llmrec train`")


def _put_items(study: Study, draft: Path) -> None:
    """Write the catalogue: item_id, title, and one column a field."""
    items = study.data.dataset.items
    names = sorted({name for item in items.values() for name in item.fields} - {"item_id", "title"})
    columns: dict[str, list[str | None]] = {
        "item_id": list(items),
        "title": [item.title for item in items.values()],
        **{name: [item.fields.get(name) for item in items.values()] for name in names},
    }
    pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.String)).write_parquet(draft / "items.parquet")


def _seal(draft: Path) -> dict[str, int]:
    """Write ``SHA256SUMS`` and return the size of every file."""
    files = sorted(file for file in draft.rglob("*") if file.is_file())
    lines = [f"{sha256_of(file)}  {file.relative_to(draft).as_posix()}\n" for file in files]
    write_text(draft / SUMS, "".join(lines))
    return {file.relative_to(draft).as_posix(): file.stat().st_size for file in (*files, draft / SUMS)}
