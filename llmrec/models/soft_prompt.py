"""Soft prompts: trained vectors in front of every prompt (Lester et al., EMNLP 2021), stored as new tokens.

The tokenizer gets a token for each, which its chat template writes first, and the model an embedding row. So a folder
with soft prompts is an ordinary model for every engine. With option tuning (M6-Rec, arXiv 2205.08084) the last soft
prompts are also the class vectors of the labels. A separate head then has these vectors in the rows of the label
tokens, so that their logits are ``h . p``, with the same odds as the classes in training.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.durable import parse_json, write_json
from llmrec.errors import ModelError, require
from llmrec.models.bottleneck import BOTTLENECKS_FILE
from llmrec.models.item_tokens import resize_vocabulary
from llmrec.models.tensors import vocabulary_tables
from llmrec.models.traits import is_encoder_decoder, is_plain_head
from llmrec.recipe.schema import SOFT_PROMPT_METHODS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

TIED_METHODS = SOFT_PROMPT_METHODS[1:]
"""Methods in which the last soft prompts are also the class vectors of the labels."""
SOFT_PROMPT_FILE = "soft_prompt.json"
"""The file in an adapter or model folder that describes its soft prompts."""

_PLAIN_TEMPLATE = "{{ bos_token or '' }}{% for m in messages %}{{ m['content'] }}\n\n{% endfor %}"


@dataclass(frozen=True, slots=True)
class SoftPrompt:
    """Describes the soft prompts of a model.

    Attributes:
        count: The number of soft prompts.
        labels: Token ids of the labels that the last soft prompts are initialised from, in order; empty if answers are
            not labels.
        tied: Whether the last soft prompts are also the labels' class vectors.
        seed: The seed of their initialisation.
    """

    count: int
    labels: tuple[int, ...] = ()
    tied: bool = False
    seed: int = 0

    def save(self, folder: Path) -> None:
        """Save the description to a folder."""
        write_json(folder / SOFT_PROMPT_FILE, asdict(self))


def read_soft_prompt(folder: Path) -> SoftPrompt | None:
    """Read the description of soft prompts from a folder; None if it has none.

    Raises:
        ModelError: If its file is damaged.
    """
    if not (folder / SOFT_PROMPT_FILE).is_file():
        return None
    try:
        config = parse_json((folder / SOFT_PROMPT_FILE).read_text(encoding="utf-8"))
        labels = tuple(int(label) for label in config["labels"])
        return SoftPrompt(int(config["count"]), labels, bool(config["tied"]), int(config["seed"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder / SOFT_PROMPT_FILE} cannot be read ({type(error).__name__}); train again with `llmrec train`",
            kind="damaged",
            at=folder / SOFT_PROMPT_FILE,
        ) from error


def copy_soft_prompt_files(source: Path, target: Path) -> None:
    """Copy the soft-prompt description and the bottleneck adapters of a folder, if there are any."""
    for name in (SOFT_PROMPT_FILE, BOTTLENECKS_FILE):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def soft_token_names(count: int) -> list[str]:
    """Return the soft-prompt tokens in order."""
    return [f"<|soft_{number}|>" for number in range(count)]


def tokenizer_with_soft_tokens(tokenizer: PreTrainedTokenizerBase, count: int) -> Any:
    """Return a copy of a tokenizer whose chat template begins with the soft-prompt tokens.

    They are special tokens, so titles cannot contain them and answers do not show them.

    Raises:
        ModelError: If the tokenizer has several chat templates.
    """
    transformers, copied = require("transformers", "train"), copy.deepcopy(tokenizer)
    template = copied.chat_template or _PLAIN_TEMPLATE
    if not isinstance(template, str):
        raise ModelError(
            "train.method: this tokenizer has several chat templates, and soft prompts support one; choose another "
            "model, or train.method=lora",
            kind="unsupported",
            column="train.method",
        )
    new = [transformers.AddedToken(name, special=True, normalized=False) for name in soft_token_names(count)]
    copied.add_tokens(new, special_tokens=True)
    copied.chat_template = "".join(soft_token_names(count)) + template
    return copied


def add_soft_prompts(model: torch.nn.Module, prompt: SoftPrompt, ids: Sequence[int]) -> None:
    """Add an embedding for every soft prompt, and an output head that is not tied to the embeddings.

    So a soft prompt's logit is the mean of all logits and never the largest; with rows of 0 it would be in models whose
    logits are all negative (GPT-2).

    The last rows start as the head's vectors of the labels, so classes start with the odds of their words; the others
    start as rows of tokens sampled from the vocabulary.

    Args:
        model: A causal language model.
        prompt: Number of soft prompts, and the labels.
        ids: The tokens' ids.

    Raises:
        ModelError: If its logits are more than one matrix product, or it is an encoder-decoder.
    """
    torch = require("torch", "train")
    if is_encoder_decoder(model.config) or not is_plain_head(model.config, model.get_output_embeddings()):
        raise ModelError(
            f"train.method: soft prompts need a decoder with a linear output layer, unlike {model.config.model_type}; "
            "set train.method=lora",
            kind="unsupported",
            column="train.method",
        )
    _untie_head(model)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    known = min(table.weight.shape[0], *ids)
    drawn = torch.randint(known, (prompt.count,), generator=torch.Generator().manual_seed(prompt.seed))
    rows = table.weight.detach()[drawn.to(table.weight.device)].clone()
    if prompt.labels:
        rows[-len(prompt.labels) :] = head.weight.detach()[list(prompt.labels)]
    mean = head.weight.detach()[:known].float().mean(0)
    resize_vocabulary(model, max(table.weight.shape[0], max(ids) + 1))
    with torch.no_grad():
        model.get_input_embeddings().weight[list(ids)] = rows
        weight = model.get_output_embeddings().weight
        weight[list(ids)] = mean.to(weight.dtype)


def set_label_vectors(model: torch.nn.Module, prompt: SoftPrompt, ids: Sequence[int]) -> None:
    """Copy the last soft prompts to the head rows of the label tokens, if the two are tied."""
    if prompt.tied:
        with require("torch", "train").no_grad():
            vectors = model.get_input_embeddings().weight[list(ids)[-len(prompt.labels) :]]
            model.get_output_embeddings().weight[list(prompt.labels)] = vectors


def _untie_head(model: torch.nn.Module) -> None:
    """Untie the head of a model from its input embeddings by copying the table."""
    torch = require("torch", "train")
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    if len(vocabulary_tables(model)) == 1:
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
