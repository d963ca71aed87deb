"""`init` and `check` import neither torch nor transformers, and find the same errors without them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmrec.backends.encode import Encoder
from llmrec.errors import LlmrecError
from llmrec.models.item_tokens import add_item_tokens
from llmrec.models.load import load_tokenizer
from llmrec.models.plain import is_plain_decoder, plain_tokenizer
from llmrec.pipeline import preflight
from llmrec.recipe.load import as_recipe
from llmrec.types import Message, Prompt, Segment
from tests import shop
from tests.conftest import section

# Runs commands and prints the modules that none of them may import.
SCRIPT = """
import json, sys
from llmrec.cli.main import app
for words in json.loads(sys.argv[1]):
    app(words, standalone_mode=False)
print("imported:", sorted({"torch", "transformers"} & set(sys.modules)))
"""


def run(folder: Path, *commands: list[str]) -> str:
    """Run commands in a new process without a GPU, and return what they print."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands)],
        cwd=folder,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "-1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_init_and_check_import_neither_torch_nor_transformers(tmp_path: Path, llama_folder: Path) -> None:
    shop.write_all(tmp_path)
    model = [f"model.name={llama_folder}", "eval.backend=hf"]
    tokens = [*model, "index={scheme: random}", "tasks.sequential.templates=[codes]"]
    output = run(
        tmp_path,
        ["init", "orders.csv"],
        ["check", "orders.yaml", *model],
        ["check", "orders.yaml", *tokens, "tasks={sequential: {}}"],
    )
    assert "wrote orders.yaml" in output and output.count("recipe orders is valid") == 2
    assert output.endswith("imported: []\n")


def both(folder: Path) -> tuple[Encoder, Encoder]:
    result = plain_tokenizer(str(folder), section(folder))
    assert result is not None
    return Encoder(result, max_length=512), Encoder(load_tokenizer(str(folder), section(folder)), max_length=512)


def test_plain_tokenizer_encodes_as_transformers(llama_folder: Path) -> None:
    plain, full = both(llama_folder)
    assert is_plain_decoder(str(llama_folder), section(llama_folder))
    assert (plain.end_id, plain.stop_ids, plain.control) == (full.end_id, full.stop_ids, full.control)
    roles = ("system", "user")
    turns = tuple(Message(role, (Segment("text", f"Toy Story for the {role}"),)) for role in roles)  # type: ignore[arg-type]
    prompt = Prompt(messages=turns, answer_prefix=(Segment("text", "1. Heat\n"),))
    assert plain.prompt(prompt) == full.prompt(prompt) and plain.text(prompt) == full.text(prompt)
    assert plain.piece("Fargo ünd\n") == full.piece("Fargo ünd\n")
    output = list(plain.piece("Fargo ünd\n"))
    assert plain.tokenizer.decode(output) == full.tokenizer.decode(output)
    names = ["<a_0>", "<a_1>", "<b_0>"]
    assert add_item_tokens(plain.tokenizer, names) == add_item_tokens(full.tokenizer, names)
    assert plain.tokenizer.get_vocab() == full.tokenizer.get_vocab()


def changed(name: str, **keys: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        values = json.loads((folder / name).read_text(encoding="utf-8")) | keys
        kept = {key: value for key, value in values.items() if value is not None}
        (folder / name).write_text(json.dumps(kept), encoding="utf-8")

    return change


def written(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text, encoding="utf-8") and None


DAMAGES = {
    "no configuration": written("config.json", "{"),
    "no layers": changed("config.json", num_hidden_layers=0),
    "an unknown architecture": changed("config.json", model_type="nosuch"),
    "a torn tokenizer": written("tokenizer.json", '{"model": '),
    "a template that refuses": written("chat_template.jinja", "{{ raise_exception('not this one') }}"),
    "no end": lambda folder: [
        (folder / "chat_template.jinja").unlink(),
        changed("tokenizer_config.json", eos_token=None, pad_token=None)(folder),
    ],
}


@pytest.mark.parametrize("name", DAMAGES)
def test_model_errors_are_the_same_without_transformers(
    name: str, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(llama_folder, tmp_path / "model"))
    DAMAGES[name](folder)
    shop.write_orders(tmp_path / "orders.csv")
    recipe = as_recipe(
        {
            "name": "r",
            "model": {"name": str(folder)},
            "data": {
                "source": "table",
                "path": str(tmp_path / "orders.csv"),
                "columns": {"user": "customer_id", "item": "product_id"},
                "duplicates": "keep_last",
            },
            "tasks": {"sequential": {}},
            "eval": {"backend": "hf", "users": 4, "candidates": {"count": 3}},
        }
    )
    output = []
    for plain in (True, False):
        if not plain:
            monkeypatch.setattr(preflight, "is_plain_decoder", lambda *_: False)
        with pytest.raises(LlmrecError) as error:
            preflight.build_checked_study(recipe)
        output.append((type(error.value), error.value.kind, str(error.value)))
    assert output[0] == output[1]
