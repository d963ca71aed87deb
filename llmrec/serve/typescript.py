"""The HTTP interface for other languages: its OpenAPI document, and TypeScript types made of that.

``python -m llmrec.serve.typescript docs`` writes both anew.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

OPENAPI, TYPES = "openapi.json", "clients/llmrec.d.ts"
"""Where both stand, from docs/ on."""
_REF = "#/components/schemas/"
_METHODS = ("get", "put", "post", "delete", "patch")
_HEAD = """\
// Types of llmrec's HTTP interface, for TypeScript. Written by `make openapi`; do not edit.
// Every answer that is not a success has the body `Failed`. Send an API key as `Authorization: Bearer ...`.
"""
_PLAIN = {"string": "string", "integer": "number", "number": "number", "boolean": "boolean", "null": "null"}


def openapi() -> Mapping[str, Any]:
    """Return the OpenAPI document of the application."""
    from llmrec.serve.app import make_app
    from llmrec.serve.gates import Auth
    from llmrec.serve.keys import Keys
    from llmrec.serve.service import Service

    # Nothing is asked, so that nothing has to answer. With keys, so that it says how one is sent.
    keys = Keys(Path("keys.json"), (0, 0, 0, 0), ())
    return make_app(cast(Service, object()), Auth(keys)).openapi()


def typescript(document: Mapping[str, Any]) -> str:
    """Return TypeScript declarations: one for each component, and ``paths``, from endpoints to bodies and answers.

    Args:
        document: An OpenAPI document, version 3.1.
    """
    components: Mapping[str, Any] = document["components"]["schemas"]
    asked = _reached([body for _, each in _endpoints(document) if (body := _body(each))], components)
    parts = [_HEAD]
    for name, schema in sorted(components.items()):
        parts.append(_declared(name, schema, whole=name not in asked))
    parts.append("export interface paths {")
    for endpoint, each in _endpoints(document):
        parts.append(_indented(_comment(each.get("description", ""))) + f'  "{endpoint}": {_endpoint(each)};')
    return "\n".join([*parts, "}", ""])


def _endpoints(document: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for path, methods in document["paths"].items():
        for method in _METHODS:
            if method in methods:
                yield f"{method.upper()} {path}", methods[method]


def _endpoint(each: Mapping[str, Any]) -> str:
    """Return the type of what is sent to an endpoint and of what comes back."""
    body = _body(each)
    parts = [
        f"{place}: {{ {'; '.join(found)} }}"
        for place in ("path", "query")
        if (found := [_key(one) for one in each.get("parameters", ()) if one["in"] == place])
    ]
    parts.append(f"body: {type_of(body) if body else 'undefined'}")
    success = min(status for status in each["responses"] if status.startswith("2"))
    content = each["responses"][success].get("content", {})
    # Where a stream can be had too, the types are those of the answer in one piece.
    json_answer = content.get("application/json")
    parts.append(f"answer: {type_of(json_answer['schema']) if json_answer else 'string'}")
    return f"{{ {'; '.join(parts)} }}"


def _key(parameter: Mapping[str, Any]) -> str:
    return f"{parameter['name']}{'' if parameter.get('required') else '?'}: {type_of(parameter['schema'])}"


def _body(each: Mapping[str, Any]) -> Mapping[str, Any]:
    content: Mapping[str, Any] = each.get("requestBody", {}).get("content", {})
    found: Mapping[str, Any] = content.get("application/json", {}).get("schema", {})
    return found


def _reached(schemas: Sequence[Any], components: Mapping[str, Any]) -> set[str]:
    """Return the names of all components that schemas refer to, however far away."""
    found: set[str] = set()
    waiting = list(schemas)
    while waiting:
        here = waiting.pop()
        if isinstance(here, Mapping):
            name = str(here.get("$ref", "")).removeprefix(_REF)
            if name and name not in found:
                found.add(name)
                waiting.append(components[name])
            waiting.extend(here.values())
        elif isinstance(here, list):
            waiting.extend(here)
    return found


def _declared(name: str, schema: Mapping[str, Any], *, whole: bool) -> str:
    """Return one declaration; with ``whole`` all keys are there, as in answers, whatever has a default."""
    comment = _comment(schema.get("description", ""))
    if "properties" not in schema:
        return f"{comment}export type {_name(name)} = {type_of(schema)};\n"
    lines = []
    for key, each in schema["properties"].items():
        optional = "" if whole or key in schema.get("required", ()) else "?"
        known = key if key.isidentifier() else json.dumps(key)
        lines.append(_indented(_comment(each.get("description", ""))) + f"  {known}{optional}: {type_of(each)};")
    return f"{comment}export interface {_name(name)} {{\n" + "\n".join(lines) + "\n}\n"


def type_of(schema: Mapping[str, Any]) -> str:
    """Return a schema as an expression for a type."""
    if "$ref" in schema:
        return _name(str(schema["$ref"]).removeprefix(_REF))
    if "const" in schema:
        return json.dumps(schema["const"])
    if "enum" in schema:
        return " | ".join(json.dumps(value) for value in schema["enum"])
    for key, between in (("anyOf", " | "), ("oneOf", " | "), ("allOf", " & ")):
        if key in schema:
            return between.join(dict.fromkeys(type_of(each) for each in schema[key]))
    kind = schema.get("type")
    if kind == "array":
        if "prefixItems" in schema:
            return f"[{', '.join(type_of(each) for each in schema['prefixItems'])}]"
        inner = type_of(schema.get("items", {}))
        return f"({inner})[]" if " " in inner else f"{inner}[]"
    if kind == "object":
        values = [schema.get("additionalProperties"), *schema.get("patternProperties", {}).values()]
        found = dict.fromkeys(type_of(each) for each in values if isinstance(each, Mapping))
        return f"Record<string, {' | '.join(found) or 'unknown'}>"
    return _PLAIN.get(str(kind), "unknown")


def _name(component: str) -> str:
    # A body that is sent in another form than it comes back has a hyphen in its name.
    return re.sub(r"\W", "_", component)


def _comment(text: str) -> str:
    lines = text.replace("*/", "* /").strip().splitlines()
    if len(lines) < 2:
        return "".join(f"/** {line} */\n" for line in lines)
    return "\n".join(["/**", *(f" * {line}".rstrip() for line in lines), " */", ""])


def _indented(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.splitlines())


def files() -> dict[str, str]:
    """Return the texts of both files, by where they stand."""
    document = openapi()
    return {OPENAPI: json.dumps(document, indent=1, ensure_ascii=False) + "\n", TYPES: typescript(document)}


def main(folder: Path) -> None:
    """Write both files below a folder."""
    for name, text in files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
