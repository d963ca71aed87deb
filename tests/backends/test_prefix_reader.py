"""Prompts that begin alike: what they share is read once, and no score depends on what was read before."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmrec.backends.encode import Encoder
from llmrec.backends.hf.backend import HFBackend
from llmrec.backends.hf.tree import BLOCK, PrefixReader
from llmrec.types import Message, Prompt, Segment
from tests.conftest import make_model


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = make_model(tmp_path_factory.mktemp("prefix"), request.param)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def prompts(count: int = 24) -> list[list[int]]:
    """Prompts of one history and of others, of every length around a block's end."""
    rng = random.Random(0)
    history = [rng.randrange(3, 250) for _ in range(3 * BLOCK)]
    found = [
        history[: rng.randrange(1, len(history))] + [rng.randrange(3, 250)] * rng.randrange(0, 30) for _ in range(count)
    ]
    return [*found, history[:BLOCK], history[: BLOCK + 1], history[:BLOCK], history[: BLOCK - 1], [7], [7]]


def test_equal_to_a_forward_of_the_whole_prompt(model: Any) -> None:
    reader = PrefixReader(model)
    for ids in prompts():
        with torch.inference_mode():
            whole = model.get_decoder()(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1:]
        assert torch.allclose(reader.last(ids), whole, atol=1e-4)


def test_nothing_depends_on_what_was_read_before(model: Any) -> None:
    asked = prompts()
    alone = [PrefixReader(model).last(ids).clone() for ids in asked]
    for order in (list(range(len(asked))), sorted(range(len(asked)), key=lambda i: asked[i])):
        reader = PrefixReader(model)
        for i in order:
            assert torch.equal(reader.last(asked[i]), alone[i])


def test_shared_blocks_are_read_once(model: Any) -> None:
    reader, history = PrefixReader(model), list(range(3, 3 + 2 * BLOCK))
    for tail in range(10):
        reader.last([*history, 200 + tail])
    assert reader.read == 2 * BLOCK + 10
    reader.drop()
    reader.last([*history, 200])
    assert reader.read == 4 * BLOCK + 11
    # The last token is always read: its state is what is asked for.
    reader.last(history)
    assert reader.read == 5 * BLOCK + 11


def test_questions_of_many_users_in_turn_keep_each_others_histories(model: Any) -> None:
    reader = PrefixReader(model)
    frame = [5] * 10
    histories = [[*frame, *[20 + user] * (2 * BLOCK - 10)] for user in range(6)]
    for turn in range(4):
        for history in histories:
            reader.last([*history, 200 + turn])
    assert reader.read == 6 * 2 * BLOCK + 24


def test_what_is_kept_is_bounded(model: Any) -> None:
    reader = PrefixReader(model)
    reader._room = 3 * BLOCK
    for user in range(5):
        reader.last([20 + user] * BLOCK)
    assert [read.ids[0] for read in reader._known] == [22, 23, 24]


def test_a_tree_behind_a_prompt_equals_plain_rows(model: Any) -> None:
    reader, ids = PrefixReader(model), [*range(3, 3 + BLOCK), 9, 8]
    tokens, depths = [11, 12, 13], np.array([0, 1, 0])
    sees = np.array([[True, False, False], [True, True, False], [False, False, True]])
    for _ in range(2):  # the second time from what is known, which the tree must have left as it was
        found = reader.tree(ids, tokens, sees, depths)
        with torch.inference_mode():
            first = model.get_decoder()(input_ids=torch.tensor([[*ids, 11, 12]])).last_hidden_state[0]
            other = model.get_decoder()(input_ids=torch.tensor([[*ids, 13]])).last_hidden_state[0]
        assert torch.allclose(found, torch.stack([first[-3], first[-2], first[-1], other[-1]]), atol=1e-4)
    assert reader.read == len(ids) + 3 + (len(ids) - BLOCK) + 3


def test_scores_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    encoder = Encoder(AutoTokenizer.from_pretrained(folder), max_length=1024)
    backend = HFBackend(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), encoder)
    words = "Toy Story Heat Fargo Casino Alien Brazil Jaws Rocky " * 4
    asked = [Prompt(messages=(Message("user", (Segment("text", f"{words} {n % 5} then {n}?"),)),)) for n in range(15)]
    labels = [tuple("ABCDE")] * len(asked)
    together = backend.score(asked, labels, closed=False)
    backwards = backend.score(asked[::-1], labels, closed=False)[::-1]
    alone = [backend.score([one], labels[:1], closed=False)[0] for one in asked]
    assert [s.logprobs for s in together] == [s.logprobs for s in alone] == [s.logprobs for s in backwards]
    backend.close()
    backend.close()
