"""A list of all labels fits what the strategy lets a model write, however many candidates there are."""

from __future__ import annotations

import pytest

from llmrec.strategies.rounds import list_room
from llmrec.tasks.direct import candidate_labels
from tests.conftest import make_tokenizer


@pytest.mark.parametrize("count", [1, 5, 20, 26, 27, 100, 150, 200, 1000])
def test_every_label_fits_with_its_comma(count: int) -> None:
    """The tokenizer writes each digit by itself, as SmolLM2's and Llama's do."""
    written = make_tokenizer().encode(", ".join(candidate_labels(count)), add_special_tokens=False)
    assert len(written) < list_room(count)
