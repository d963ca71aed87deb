"""Prompts with a common prefix: it is read once, and no score depends on earlier prompts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmrec.backends.hf.backend import HFBackend
from llmrec.backends.hf.tree import BLOCK_TOKENS, PrefixReader
from tests.conftest import encoder_of, opened
from tests.servers.client import question


@pytest.fixture(scope="module")
def model(qwen_folder: Path) -> Any:
    return opened(qwen_folder)[0].eval()


def prompts(count: int = 24) -> list[list[int]]:
    """Return prompts with a common history and with lengths near block boundaries."""
    rng = random.Random(0)
    history = [rng.randrange(3, 250) for _ in range(3 * BLOCK_TOKENS)]
    rows = [
        history[: rng.randrange(1, len(history))] + [rng.randrange(3, 250)] * rng.randrange(0, 30) for _ in range(count)
    ]
    return [
        *rows,
        history[:BLOCK_TOKENS],
        history[: BLOCK_TOKENS + 1],
        history[:BLOCK_TOKENS],
        history[: BLOCK_TOKENS - 1],
        [7],
        [7],
    ]


def test_equals_a_forward_pass_of_the_prompt(model: Any) -> None:
    reader = PrefixReader(model)
    for ids in prompts():
        with torch.inference_mode():
            full = model.get_decoder()(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1:]
        assert torch.allclose(reader.last(ids), full, atol=1e-4)


def test_states_do_not_depend_on_earlier_prompts(model: Any) -> None:
    rows = prompts()
    alone = [PrefixReader(model).last(ids).clone() for ids in rows]
    for order in (list(range(len(rows))), sorted(range(len(rows)), key=lambda i: rows[i])):
        reader = PrefixReader(model)
        for i in order:
            assert torch.equal(reader.last(rows[i]), alone[i])


def test_shared_blocks_are_read_once(model: Any) -> None:
    reader, history = PrefixReader(model), list(range(3, 3 + 2 * BLOCK_TOKENS))
    for tail in range(10):
        reader.last([*history, 200 + tail])
    assert reader.read == 2 * BLOCK_TOKENS + 10
    # The last token is always read, since its state is returned.
    reader.last(history)
    assert reader.read == 3 * BLOCK_TOKENS + 10


def test_histories_of_several_users_stay_cached(model: Any) -> None:
    reader = PrefixReader(model)
    frame = [5] * 10
    histories = [[*frame, *[20 + user] * (2 * BLOCK_TOKENS - 10)] for user in range(6)]
    for turn in range(4):
        for history in histories:
            reader.last([*history, 200 + turn])
    assert reader.read == 6 * 2 * BLOCK_TOKENS + 24


def test_cache_is_bounded(model: Any) -> None:
    reader = PrefixReader(model)
    reader._room = 3 * BLOCK_TOKENS
    for user in range(5):
        reader.last([20 + user] * BLOCK_TOKENS)
    assert [read.ids[0] for read in reader._known] == [22, 23, 24]


def test_tree_after_a_prompt_equals_plain_rows(model: Any) -> None:
    reader, ids = PrefixReader(model), [*range(3, 3 + BLOCK_TOKENS), 9, 8]
    tokens, depths = [11, 12, 13], np.array([0, 1, 0])
    sees = np.array([[True, False, False], [True, True, False], [False, False, True]])
    for _ in range(2):  # the second time from the cache, which the tree must not change
        states = reader.tree(ids, tokens, sees, depths)
        with torch.inference_mode():
            first = model.get_decoder()(input_ids=torch.tensor([[*ids, 11, 12]])).last_hidden_state[0]
            other = model.get_decoder()(input_ids=torch.tensor([[*ids, 13]])).last_hidden_state[0]
        assert torch.allclose(states, torch.stack([first[-3], first[-2], first[-1], other[-1]]), atol=1e-4)
    assert reader.read == len(ids) + 3 + (len(ids) - BLOCK_TOKENS) + 3


def test_scores_do_not_depend_on_the_batch(llama_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.bfloat16)
    backend = HFBackend(model, encoder_of(llama_folder, 1024))
    words = "Toy Story Heat Fargo Casino Alien Brazil Jaws Rocky " * 4
    requests = [question(f"{words} {n % 5} then {n}?") for n in range(15)]
    labels = [tuple("ABCDE")] * len(requests)
    together = backend.score(requests, labels, closed=False)
    backwards = backend.score(requests[::-1], labels, closed=False)[::-1]
    alone = [backend.score([one], labels[:1], closed=False)[0] for one in requests]
    assert [s.logprobs for s in together] == [s.logprobs for s in alone] == [s.logprobs for s in backwards]
    backend.close()
    backend.close()
