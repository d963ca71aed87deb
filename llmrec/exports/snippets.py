"""What a model card tells a reader to type: transformers, a server, a request to it.

The words of templates are untrusted here. They enter as literals that can end neither a code fence nor a quote.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass

from llmrec.durable import Json

# What could end a fence or a shell quote, or start HTML.
_UNSAFE = frozenset("<>&`'")
# The ranks that vLLM knows as a limit.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A prompt with invented titles, for the snippets.

    Attributes:
        family: The family that it belongs to.
        messages: Chat turns as role and content; empty if the model has no chat template that takes them.
        given: The part of the answer that already stands, such as the history in a list.
        text: The whole prompt as the model reads it.
        stop: What ends the answer, besides the end of turn.
        max_tokens: Longest answer.
        thinking: Whether the chat template has a switch for thinking, which must be off.
        history: Titles of the past, oldest first.
        candidates: Titles to choose from; empty if the model was not tuned to choose.
    """

    family: str
    messages: tuple[tuple[str, str], ...]
    given: str
    text: str
    stop: str | None
    max_tokens: int
    thinking: bool = False
    history: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """What the snippets are about.

    Attributes:
        example: What is asked.
        address: The exported folder, or its name on a hub.
        base: The base model.
        adapter_only: Whether the folder is an adapter that needs its base.
        rank: Of that adapter.
        max_length: Longest prompt with its answer, in tokens.
    """

    example: Example
    address: str
    base: str
    adapter_only: bool
    rank: int
    max_length: int


def literal(value: object) -> str:
    """Return strings, alone or in lists and mappings, as JSON that is a Python literal too, and safe in a fence."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(f"\\u{ord(each):04x}" if each in _UNSAFE or _hidden(each) else each for each in text)


def _hidden(character: str) -> bool:
    # Beyond this plane JSON and Python write escapes differently.
    return not character.isprintable() and ord(character) < 0x10000


def rank(asked: Asking) -> str:
    """Return the commands that rank the example's candidates with llmrec; nothing if it was not tuned to rank."""
    example = asked.example
    if asked.adapter_only or not example.candidates:
        return ""
    request = {
        "history": [{"title": title} for title in example.history],
        "candidates": [{"title": title} for title in example.candidates],
    }
    command = f"llmrec rank --model {shlex.quote(asked.address)} --in requests.jsonl --out ranked.jsonl"
    return f"echo '{literal(request)}' > requests.jsonl\n{command}"


def python(asked: Asking) -> str:
    """Return a script that asks the example with transformers and prints the answer."""
    example, name = asked.example, literal(asked.address)
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if asked.adapter_only:
        base = literal(asked.base)
        lines[0:1] = ["from peft import PeftModel", lines[0]]
        lines += [f"tokenizer = AutoTokenizer.from_pretrained({base})"]
        lines += [
            f"base = AutoModelForCausalLM.from_pretrained({base})",
            f"model = PeftModel.from_pretrained(base, {name})",
        ]
    else:
        lines += [f"tokenizer = AutoTokenizer.from_pretrained({name})"]
        lines += [f"model = AutoModelForCausalLM.from_pretrained({name})"]
    if example.messages:
        thinking = ", enable_thinking=False" if example.thinking else ""
        lines += ["messages = ["]
        lines += [f"    {literal({'role': role, 'content': content})}," for role, content in example.messages]
        lines += ["]"]
        lines += [
            f"text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True{thinking})"
        ]
        if example.given:
            lines += [f"text += {literal(example.given)}"]
    else:
        lines += [f"text = {literal(example.text)}"]
    stop = f", stop_strings=[{literal(example.stop)}], tokenizer=tokenizer" if example.stop else ""
    lines += [
        'inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)',
        f"output = model.generate(**inputs, max_new_tokens={example.max_tokens}, do_sample=False{stop})",
        'answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)',
        f"print(answer{f'.split({literal(example.stop)})[0]' if example.stop else ''})",
    ]
    return "\n".join(lines)


def serve(asked: Asking) -> str:
    """Return the command that serves the folder."""
    place = shlex.quote(asked.address)
    if asked.adapter_only:
        base = shlex.quote(asked.base)
        rank = next((known for known in _RANKS if known >= asked.rank), asked.rank)
        return f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules tuned={place}"
    return f"vllm serve {place} --max-model-len {asked.max_length}"


def request(asked: Asking) -> str:
    """Return the command that asks a server the example."""
    path, body = body_of(asked)
    return f"curl http://localhost:8000{path} -H 'Content-Type: application/json' \\\n  -d '{literal(body)}'"


def body_of(asked: Asking) -> tuple[str, dict[str, Json]]:
    """Return path and body of the request that asks a server the example."""
    example = asked.example
    body: dict[str, Json] = {"model": "tuned" if asked.adapter_only else asked.address, "temperature": 0}
    body["max_tokens"] = example.max_tokens
    if example.stop:
        body["stop"] = [example.stop]
    if not example.messages or example.given:
        # A server may trim the end of a turn that it is to continue, so a list goes as plain text.
        return "/v1/completions", body | {"prompt": example.text, "add_special_tokens": False}
    body["messages"] = [{"role": role, "content": content} for role, content in example.messages]
    if example.thinking:
        body["chat_template_kwargs"] = {"enable_thinking": False}
    return "/v1/chat/completions", body
