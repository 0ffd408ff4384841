"""The places in vLLM's TurboQuant backend that the plugin relies on, checked in its source without importing it.

``seams.json`` records them as read in the released wheels. A backend that looks otherwise is left alone.
"""

from __future__ import annotations

import ast
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

MODULE = "vllm.v1.attention.backends.turboquant_attn"
FACTS_FILE = Path(__file__).with_name("seams.json")
BACKEND, IMPL, BUILDER = "TurboQuantAttentionBackend", "TurboQuantAttentionImpl", "TurboQuantMetadataBuilder"
CONTINUATION = "triton_turboquant_decode_attention"


@lru_cache(maxsize=1)
def facts() -> dict[str, Any]:
    """The recorded seams: ``methods`` (qualified name -> parameters), and the versions they were read in."""
    result: dict[str, Any] = json.loads(FACTS_FILE.read_text())
    return result


def signatures(source: str) -> dict[str, list[str]]:
    """Parameters of every method of every class in ``source``, by qualified name ("*name", "**name" for the rest)."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.FunctionDef):
                    found[f"{node.name}.{item.name}"] = _parameters(item.args)
    return found


def continuation_keywords(source: str) -> list[str]:
    """Keywords of the decode call that ``_prefill_attention`` makes for small chunks; empty where it makes none."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name == "_prefill_attention":
            for call in ast.walk(node):
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == CONTINUATION:
                    return [keyword.arg or "**" for keyword in call.keywords]
    return []


def objection(source: str) -> str | None:
    """Why the backend in ``source`` is not the one the plugin knows, None where it is."""
    try:
        found = signatures(source)
        keywords = continuation_keywords(source)
    except SyntaxError as error:
        return f"{MODULE} does not parse: {error.msg}"
    for name, expected in facts()["methods"].items():
        if name not in found:
            return f"{MODULE} has no {name}"
        if found[name] != expected:
            return f"{name} takes ({', '.join(found[name])}): expected ({', '.join(expected)})"
    missing = [k for k in facts()["continuation_keywords"] if k not in keywords]
    if missing:
        return f"the continuation call of {MODULE} passes no {', '.join(missing)}"
    return None


def _parameters(args: ast.arguments) -> list[str]:
    names = [a.arg for a in (*args.posonlyargs, *args.args)]
    if args.vararg:
        names.append(f"*{args.vararg.arg}")
    names += [a.arg for a in args.kwonlyargs]
    if args.kwarg:
        names.append(f"**{args.kwarg.arg}")
    return names
