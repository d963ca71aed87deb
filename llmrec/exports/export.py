"""Exports a run to a self-contained folder with merged weights, tokenizer, templates and a model card.

Only files on an allow-list are written: safetensors, configurations, the tokenizer, text. The folder is built under a
temporary name and then renamed, so that a killed export leaves nothing under the final name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from llmrec.backends.encode import Encoder
from llmrec.data.assemble import write_items
from llmrec.display import Displayed, Summary
from llmrec.durable import note_written_path, read_json, sha256_of, write_text
from llmrec.ensembles.carried import write_training_data
from llmrec.errors import DataError, LlmrecError, ModelError, did_you_mean, require
from llmrec.exports import agreement, card, card_facts, safety
from llmrec.exports.card import Agreement
from llmrec.exports.files import (
    TOKENIZER_FILES,
    allowed_patterns,
    check_replaceable,
    copy_adapter,
    copy_files,
    copy_index,
    is_export,
    read_checksums,
    remove_machine_paths,
    replacing_folder,
    set_greedy_generation,
    stored_inputs_hash,
    write_bundle,
    write_checksums,
)
from llmrec.exports.options import ExportOptions, check_fine_tuned
from llmrec.fingerprint import fingerprint
from llmrec.models.load import (
    BUNDLE_FILE,
    load_config,
    load_tokenizer,
    model_folder_hash,
    release_memory,
    resolve_model_folder,
    silence_libraries,
)
from llmrec.models.load import dtype as torch_dtype
from llmrec.models.rating_head import copy_rating_head
from llmrec.models.soft_prompt import copy_soft_prompt_files, tokenizer_with_soft_tokens
from llmrec.models.streaming import tensor_sizes
from llmrec.models.traits import is_encoder_decoder
from llmrec.pipeline.bundle import CHECKSUMS_FILE
from llmrec.pipeline.resume import lock_folder
from llmrec.pipeline.run import Run, as_folder
from llmrec.pipeline.runs import TrainedRun, open_earlier_run, open_run
from llmrec.pipeline.study import Study
from llmrec.pipeline.training import training_key
from llmrec.progress import ignore_line, log_line
from llmrec.recipe.load import recipe_hash
from llmrec.recipe.schema import SOFT_PROMPT_METHODS

_BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2, "float16": 2}
_SLACK = 64 * 2**20


@dataclass(frozen=True, kw_only=True, repr=False)
class Exported(Displayed):
    """The result of an export.

    Attributes:
        folder: The folder.
        dtype: Dtype of its weights.
        files: Size of each file in bytes, by name.
        agreement: Agreement with the trained model; None if not measured.
        notes: Remarks for readers.
        address: The address of the upload.
    """

    folder: Path
    dtype: str
    files: Mapping[str, int]
    agreement: Agreement | None
    notes: tuple[str, ...]
    address: str | None = None

    def _summary(self) -> Summary:
        (_, what), *rest = export_summary(self)
        rows = [(title, name, text) for title, lines in rest for name, text in lines.items()]
        return Summary("Model exported by llmrec.export", what, ("checked", "what", "value"), rows)


def export(
    run: Run | str | Path,
    out: str | Path,
    *,
    dtype: str = "auto",
    adapter_only: bool = False,
    with_items: bool = True,
    with_interactions: bool = False,
    check_users: int = 50,
    licence: str | None = None,
    base_licence: str | None = None,
    push: str | None = None,
    private: bool = True,
    force: bool = False,
    quiet: bool = False,
) -> Exported:
    """Export a fine-tuned model to a self-contained folder for llmrec, transformers and vLLM, with a model card.

    Args:
        run: A finished run, or its folder.
        out: The folder to write.
        dtype: Dtype of the weights; ``"auto"``: that of the run's evaluation.
        adapter_only: Write the adapter instead of a whole model.
        with_items: Whether to include the catalogue, which may be proprietary.
        with_interactions: Whether to include training interactions.
        check_users: Validation cases per task on which the export is checked.
        licence: Licence of the tuned weights and the card.
        base_licence: Licence of the base model, if the model does not declare it.
        push: Name on the model hub, ``USER/NAME``, to upload to.
        private: Whether the upload is private.
        force: Replace an earlier export.
        quiet: Do not print progress.

    Raises:
        LlmrecError: If the run is unfinished or altered, the folder cannot be written, or the upload failed.
    """
    options = ExportOptions(
        run=as_folder(run),
        out=Path(out),
        dtype=dtype,
        adapter_only=adapter_only,
        with_items=with_items,
        with_interactions=with_interactions,
        check_users=check_users,
        licence=licence,
        base_licence=base_licence,
        push=push,
        private=private,
        force=force,
    )
    return write_export(options, say=ignore_line if quiet else log_line)


def write_export(
    options: ExportOptions, *, say: Callable[[str], None] = ignore_line, change: Callable[[Path], None] | None = None
) -> Exported:
    """Write the fine-tuned model of a run, or its adapter, to a self-contained folder.

    Args:
        options: The content and path of the export.
        say: Called with a line for every step.
        change: Called with the folder before it is inspected, sealed and renamed; may change it.

    Raises:
        LlmrecError: If the run is unfinished or altered, the folder cannot be written, or the upload failed.
    """
    run = options.run
    check_fine_tuned(run)
    # Must precede the import of other libraries, which print messages.
    silence_libraries()
    require("peft", "train")
    _check_options(options)
    if options.push:
        safety.check_upload(options.push)
    if options.force or not is_export(options.out):
        check_replaceable(options.out, force=options.force)
    with lock_folder(run) if os.access(run, os.W_OK) and (run / "train.json").is_file() else nullcontext():
        source = open_run(run)
        with note_written_path(options.out):
            done = _write_folder(source, options, say, change)
    if not options.push:
        return done
    say(f"uploading to {options.push}")
    address = safety.upload_export(done.folder, options.push, list(done.files), private=options.private)
    return replace(done, address=address)


def export_summary(done: Exported) -> list[tuple[str, dict[str, str]]]:
    """Return the summary of an export for the terminal: names and values by title."""
    size = sum(done.files.values())
    what = {"folder": str(done.folder), "dtype": done.dtype, "size": f"{size / 1e6:,.1f} MB in {len(done.files)} files"}
    shown = [("export", what | ({"address": done.address} if done.address else {}))]
    if done.agreement is not None:
        shown.append((f"{done.agreement.before} → {done.agreement.after}", card.agreement_lines(done.agreement)))
    if done.notes:
        shown.append(("notes", {str(n): note for n, note in enumerate(done.notes, 1)}))
    return shown


def _check_options(options: ExportOptions) -> None:
    if not options.out.name or not options.out.name.isprintable():
        raise LlmrecError(
            f"--out {str(options.out)!r} is not a folder name; give one, such as --out films-model",
            kind="bad-value",
            column="--out",
        )
    if options.dtype not in ("auto", *_BYTES_PER_VALUE):
        raise LlmrecError(
            f"--dtype {options.dtype!r} is unknown{did_you_mean(options.dtype, _BYTES_PER_VALUE)}; known: "
            f"{', '.join(_BYTES_PER_VALUE)}",
            kind="unknown-name",
            column="--dtype",
        )
    if options.adapter_only and options.dtype != "auto":
        raise LlmrecError(
            "--dtype applies to merged weights, which --adapter-only does not write; drop one of these options",
            kind="contradiction",
            column="--dtype",
        )


# --------------------------------------------------------------------------- exported folder


def _write_folder(
    source: TrainedRun, options: ExportOptions, say: Callable[[str], None], change: Callable[[Path], None] | None
) -> Exported:
    recipe = source.recipe
    origin, study = _published_base(source), _validation_study(source, options)
    base = _adapter_base(source, origin)
    if is_encoder_decoder(load_config(base, recipe.model)):
        raise LlmrecError.at(
            source.folder,
            "unsupported",
            " contains an encoder-decoder, which exports do not support; use the folder "
            f"{source.folder / 'merged'}, which transformers and `llmrec rank` load",
        )
    dtype = options.dtype
    if dtype == "auto":
        dtype = source.merged or str(torch_dtype(recipe.model)).removeprefix("torch.")
    notes = _reader_notes(source, base, study, options)
    made_from = _inputs_hash(source, base, study, dtype, options, changed=change is not None)
    if not options.force and stored_inputs_hash(options.out) == made_from:
        say(f"{options.out} is already complete; use --force to export again")
        names = (*(read_checksums(options.out) or ()), CHECKSUMS_FILE)
        files = {name: (options.out / name).stat().st_size for name in names}
        return Exported(folder=options.out, dtype=dtype, files=files, agreement=None, notes=notes)
    _check_disk_space(source, base, dtype, options)
    with replacing_folder(options.out, force=options.force) as draft:
        if options.adapter_only:
            if base != origin:
                why = "contains embeddings of item tokens, which the published base model does not have"
                if recipe.train.start is not None:
                    why = (
                        "continues from the tuned model of another run (train.start), not from the published base model"
                    )
                raise LlmrecError(
                    f"--adapter-only: this adapter {why}; drop the option to export the whole model",
                    kind="unsupported",
                    column="--adapter-only",
                )
            copy_adapter(source, base, draft)
        else:
            _write_weights(source, base, study, dtype, draft, say)
        write_bundle(source, study, draft, made_from)
        copy_index(source, draft, titles=options.with_items)
        tokenizer = load_tokenizer(base if options.adapter_only else str(draft), recipe.model)
        encoder = Encoder(tokenizer, max_length=recipe.model.max_length)
        result = None
        if not options.adapter_only:
            set_greedy_generation(draft, encoder)
            if options.check_users and study is not None:
                adapter = source.folder / "adapter"
                result = agreement.measure_agreement(
                    study, encoder, base, adapter, draft, dtype, users=options.check_users, say=say
                )
        if options.with_items and study is not None:
            write_items(study.data.dataset.items, draft / "items.parquet")
        if options.with_interactions:
            if study is None:
                raise DataError(
                    f"--with-interactions: the data of {source.folder} is missing; restore it, or drop the option",
                    kind="missing-file",
                    at=source.folder,
                    column="--with-interactions",
                )
            write_training_data(study.data, draft / "items.parquet", source.folder, draft)
        content = read_json(draft / BUNDLE_FILE, "export the run again")
        written = card_facts.build_card(
            source, options, study, content, encoder, base=origin, dtype=dtype, agreement=result, notes=notes
        )
        write_text(draft / "README.md", card.render_card(written))
        card_facts.write_licence(written, origin, draft)
        if change is not None:
            change(draft)
        safety.check_contents(
            draft, (source.folder, Path(base), Path(origin), options.out.parent), own_code=written.own_code
        )
        files = write_checksums(draft)
    return Exported(folder=options.out, dtype=dtype, files=files, agreement=result, notes=notes)


def _adapter_base(source: TrainedRun, origin: str) -> str:
    """Return the folder of the model to which the adapter belongs."""
    if source.recipe.train.start is not None:
        run = Path(source.recipe.train.start).expanduser()
        open_earlier_run(run)
        return str(run / "merged")
    if not (source.folder / "base.json").is_file():
        return origin
    if source.recipe.index is None or not (source.folder / "base" / "config.json").is_file():
        raise LlmrecError.at(
            source.folder / "base", "missing-file", ", the base of the adapter, is missing; run `llmrec train` again"
        )
    return str(source.folder / "base")


def _published_base(source: TrainedRun) -> str:
    """Return the folder of the base model as it was published."""
    try:
        return resolve_model_folder(source.recipe.model, seed=source.recipe.seed)
    except ModelError as error:
        raise error.reworded(f"the base model of {source.folder} is needed for the export: {error}") from error


def _validation_study(source: TrainedRun, options: ExportOptions) -> Study | None:
    """Build the study with validation cases; None if the data are missing and not needed."""
    try:
        return agreement.build_validation_study(source.recipe, options.check_users)
    except DataError as error:
        checked = options.check_users and not options.adapter_only
        needed = [*(["--no-items"] if options.with_items else []), *(["--check-users 0"] if checked else [])]
        if not needed:
            return None
        raise error.reworded(
            f"{error}. To export without the data of the run, use {' and '.join(needed)}; the model card then states "
            "this"
        ) from error


def _reader_notes(source: TrainedRun, base: str, study: Study | None, options: ExportOptions) -> tuple[str, ...]:
    """Return notes about missing verification and about personal data in the folder."""
    notes = []
    if study is None:
        notes.append("The data could not be read at export, so the training record could not be verified.")
    elif training_key(study, base) != source.record["key"]:
        notes.append("The recipe, data, base model, templates or llmrec version have changed since training.")
    if source.recipe.index is not None and source.recipe.index.ids == "tokens":
        notes.append("The folder index/ contains the ids and tokens of the training users.")
    if options.with_interactions:
        notes.append(
            "interactions.parquet contains the training interactions, with users as numbers; someone who knows some "
            "items of a user may identify the others."
        )
    return tuple(notes)


def _inputs_hash(
    source: TrainedRun, base: str, study: Study | None, dtype: str, options: ExportOptions, *, changed: bool
) -> str:
    """Return a hash of everything that the content of the folder depends on."""
    results = source.folder / "results.json"
    return fingerprint(
        "export",
        adapter=source.record["adapter_sha256"],
        recipe=recipe_hash(source.recipe),
        results=sha256_of(results) if results.is_file() else None,
        base=model_folder_hash(base),
        data=[table.dataset.fingerprint for table in study.tables] if study else None,
        dtype=dtype,
        users=options.check_users,
        interactions=options.with_interactions,
        changed=changed,
        card=[options.model_name, options.address, options.adapter_only, options.with_items],
        licences=[options.licence, options.base_licence],
    )


def _check_disk_space(source: TrainedRun, base: str, dtype: str, options: ExportOptions) -> None:
    if options.adapter_only:
        needed = sum(file.stat().st_size for file in (source.folder / "adapter").iterdir())
    else:
        needed = sum(count for _, count in tensor_sizes(Path(base)).values()) * _BYTES_PER_VALUE[dtype]
    folder = options.out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed + _SLACK:
        raise LlmrecError.at(
            folder,
            "exhausted",
            f" has {free / 1e9:.2f} GB free, and the export needs about {(needed + _SLACK) / 1e9:.2f} GB; free "
            "disk space, or choose another --out or a smaller --dtype",
        )


def _write_weights(
    source: TrainedRun, base: str, study: Study | None, dtype: str, draft: Path, say: Callable[[str], None]
) -> None:
    """Copy weights, configuration and tokenizer from the run; if the dtype differs, merge the adapter again."""
    merged = source.folder / "merged"
    if source.merged == dtype:
        say(f"copying the merged weights, {dtype}")
        copy_files(merged, draft, allowed_patterns(source.recipe))
    else:
        from llmrec.train import lora

        say(f"merging the adapter into the base in float32, saving {dtype}")
        section = source.recipe.model.model_copy(update={"dtype": dtype})
        if source.record["method"] == "full":
            lora.save_full_model(source.folder / "adapter", section, draft)
        else:
            lora.merge_adapter(base, section, source.folder / "adapter", draft)
        copy_rating_head(source.folder / "adapter", draft)
        copy_soft_prompt_files(source.folder / "adapter", draft)
        release_memory()
        _check_same_base(source, study, base, dtype, draft)
        if source.merged is not None:
            copy_files(merged, draft, TOKENIZER_FILES)
        else:
            tokenizer = load_tokenizer(base, source.recipe.model)
            if source.recipe.train.method in SOFT_PROMPT_METHODS:
                tokenizer = tokenizer_with_soft_tokens(tokenizer, source.recipe.train.soft.prompts)
            tokenizer.save_pretrained(draft)
        safety.remove_other_files(draft, allowed_patterns(source.recipe))
    for name in ("config.json", "tokenizer_config.json"):
        remove_machine_paths(draft / name)


def _check_same_base(source: TrainedRun, study: Study | None, base: str, dtype: str, draft: Path) -> None:
    """Reject a merge with a base model other than the one used in training.

    Raises:
        LlmrecError: If neither the run's merged weights nor its training record confirm the base.
    """
    if source.record["method"] == "full":
        return
    if source.merged is not None:
        if safety.has_same_weights(source.folder / "merged", draft):
            return
    elif study is not None and training_key(study, base) == source.record["key"]:
        return
    raise LlmrecError(
        f"the adapter in {source.folder} was trained on another model than the one in {base}, or this cannot be "
        "verified; restore the base model (model.name, model.revision), or train again with `llmrec train`",
        kind="mismatch",
        at=source.folder,
        column="model.name",
    )
