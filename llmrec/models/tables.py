"""Which modules of a model hold rows of its vocabulary, and which of these are one table.

What a configuration says of tied embeddings does not decide it: T5-v1.1, mT5 and umT5 are said to be tied, and their
checkpoints hold a head of their own. Modules hold one table where their weights are one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llmrec.models.traits import is_paired


def named_tables(model: Any) -> list[tuple[str, Any]]:
    """Return a module for each table of vocabulary rows with its name, the input embeddings first."""
    return [modules[0] for modules in _groups(model)]


@contextmanager
def told_as_tied(model: Any) -> Iterator[None]:
    """Have a model say of itself, for as long as PEFT asks, which modules share the table of its input embeddings."""
    (source, _), *others = _groups(model)[0]
    config, keys = model.config.get_text_config(), model._tied_weights_keys
    said = config.tie_word_embeddings
    config.tie_word_embeddings = bool(others)
    model._tied_weights_keys = {f"{name}.weight": f"{source}.weight" for name, _ in others}
    try:
        yield
    finally:
        config.tie_word_embeddings, model._tied_weights_keys = said, keys


def _groups(model: Any) -> list[list[tuple[str, Any]]]:
    """Return the named modules that hold vocabulary rows, those that share a weight together."""
    first = model.get_input_embeddings()
    holders = [first, model.get_output_embeddings()]
    if is_paired(model.config):
        holders += [half.get_input_embeddings() for half in (model.get_encoder(), model.get_decoder())]
    groups: dict[int, list[tuple[str, Any]]] = {id(first.weight): []}
    for name, module in model.named_modules():
        if any(module is holder for holder in holders):
            groups.setdefault(id(module.weight), []).append((name, module))
    groups[id(first.weight)].sort(key=lambda pair: pair[1] is not first)
    return list(groups.values())
