"""The HTTP interface as other languages see it: what is committed is what the application says, and it is whole."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")
pytest.importorskip("prometheus_client", reason="the serve extra is not installed")

from llmrec.serve.typescript import OPENAPI, TYPES, files, main, openapi, type_of, typescript

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize("name", [OPENAPI, TYPES])
def test_what_is_committed_is_up_to_date(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == files()[name], "make openapi"


def test_both_files_are_written(tmp_path: Path) -> None:
    main(tmp_path)
    assert {name: (tmp_path / name).read_text(encoding="utf-8") for name in files()} == files()


def test_every_endpoint_and_component_is_there() -> None:
    document = openapi()
    text = typescript(document)
    declared = re.findall(r"^export (?:interface|type) (\w+)", text, re.MULTILINE)
    assert declared == [*sorted(document["components"]["schemas"]), "paths"]
    endpoints = {f"{method.upper()} {path}" for path, each in document["paths"].items() for method in each}
    assert set(re.findall(r'^  "([A-Z]+ /[^"]*)": \{', text, re.MULTILINE)) == endpoints
    used = set(re.findall(r"\b[A-Z]\w+", re.sub(r'/\*.*?\*/|//.*|"[^"]*"', "", text, flags=re.DOTALL)))
    assert used - {"Record"} <= set(declared)


def ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "string", "maxLength": 3}, "string"),
        ({"type": "integer"}, "number"),
        ({"anyOf": [{"type": "number"}, {"type": "integer"}, {"type": "null"}]}, "number | null"),
        ({"enum": ["a b", "c"], "type": "string"}, '"a b" | "c"'),
        ({"const": "ok", "type": "string"}, '"ok"'),
        ({"allOf": [ref("A"), ref("B-Input")]}, "A & B_Input"),
        ({"type": "array", "items": ref("A")}, "A[]"),
        ({"type": "array", "items": {"anyOf": [{"type": "string"}, ref("A")]}}, "(string | A)[]"),
        ({"type": "array"}, "unknown[]"),
        ({"type": "array", "prefixItems": [{"type": "number"}, {"type": "string"}]}, "[number, string]"),
        ({"type": "object"}, "Record<string, unknown>"),
        ({"type": "object", "additionalProperties": {"type": "boolean"}}, "Record<string, boolean>"),
        ({"type": "object", "patternProperties": {"^x": {"type": "array", "items": ref("A")}}}, "Record<string, A[]>"),
        ({}, "unknown"),
    ],
)
def test_schemas_become_types(schema: dict[str, Any], expected: str) -> None:
    assert type_of(schema) == expected


def test_what_is_sent_may_lack_what_has_a_default_and_answers_do_not() -> None:
    same = {"type": "object", "properties": {"n": {"type": "integer", "default": 1}, "x-y": {}}, "required": ["x-y"]}
    document = {
        "components": {
            "schemas": {
                "Asked": {"type": "object", "properties": {"all": {"type": "array", "items": ref("Part")}}},
                "Part": {**same, "description": "One */ two.\n\nThree."},
                "Told": {**same, "description": "Back."},
            }
        },
        "paths": {
            "/one/{id}": {
                "post": {
                    "parameters": [
                        {"in": "path", "name": "id", "required": True, "schema": {"type": "string"}},
                        {"in": "query", "name": "q", "schema": {"type": "string"}},
                    ],
                    "requestBody": {"content": {"application/json": {"schema": ref("Asked")}}},
                    "responses": {"422": {}, "201": {"content": {"application/json": {"schema": ref("Told")}}}},
                },
                "get": {"responses": {"200": {"content": {"text/plain": {}}}}},
            }
        },
    }
    text = typescript(document)
    assert 'Part {\n  n?: number;\n  "x-y": unknown;\n}' in text
    assert '/** Back. */\nexport interface Told {\n  n: number;\n  "x-y": unknown;\n}' in text
    assert "/**\n * One * / two.\n *\n * Three.\n */\nexport interface Part" in text
    assert '"POST /one/{id}": { path: { id: string }; query: { q?: string }; body: Asked; answer: Told };' in text
    assert '"GET /one/{id}": { body: undefined; answer: string };' in text
