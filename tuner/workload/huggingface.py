"""Attention shapes from a Hugging Face ``config.json``.

Field names are those of the transformers library's configurations; several families spell the same fact
differently, and what a family leaves out has the meaning that its configuration class gives it.
"""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.errors import UsageError
from tuner.workload.core import Shape

_MAX_LAYERS = 10_000  # more is a typing error, and would only cost memory
SLIDING = "a sliding window"
"""What ``Shape.wants`` says of layers that attend to a window only."""
_FULL, _SLIDING, _OTHER = "full", "sliding", "other"
_LAYER_KINDS = {
    "full_attention": _FULL,
    "attention": _FULL,
    "sliding_attention": _SLIDING,
    "chunked_attention": _SLIDING,
    "linear_attention": _OTHER,
}
_LAYER_LISTS = ("layer_types", "layers_block_type")
# Families whose configurations may leave out that only every n-th layer attends to everything.
_WINDOW_PATTERNS = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6}


def read_shapes(path: Path) -> tuple[tuple[Shape, int], ...]:
    """Distinct attention shapes with their number of layers, full attention first.

    Layers without attention over cached tokens (linear attention, Mamba, experts) do not count. Raises UsageError
    where the file cannot be read or is not a model's, or where its attention is of a kind that has no kernels.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"cannot read {path}: {reason}; expected a model's config.json") from None
    try:
        return _shapes(config)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _shapes(config: Any) -> tuple[tuple[Shape, int], ...]:
    if not isinstance(config, dict):
        raise UsageError(f"config is {reprlib.repr(config)}: expected a JSON object")
    nested = config.get("text_config")
    fields = _Fields(nested if isinstance(nested, dict) else config)
    if fields.get("kv_lora_rank") is not None:
        raise UsageError("kv_lora_rank is set: multi-head latent attention has no per-head cache to compress")
    heads = fields.integer("num_attention_heads")
    if heads is None:
        raise UsageError("no num_attention_heads: expected a model with attention")
    kinds = Counter(_layer_kinds(fields))
    by_kind = {_FULL: _full_shape, _SLIDING: _sliding_shape}
    beyond = _beyond(fields)
    shapes = tuple((make(fields, heads, beyond), kinds[kind]) for kind, make in by_kind.items() if kinds[kind])
    if not shapes:
        raise UsageError("none of the layers has attention over cached tokens: nothing to tune")
    return shapes


@dataclass(frozen=True)
class _Fields:
    """Checked access to the fields of one configuration."""

    values: Mapping[str, Any]

    def get(self, name: str) -> Any:
        return self.values.get(name)

    def integer(self, *names: str) -> int | None:
        """The first of ``names`` that is present and not null; raises UsageError unless a positive integer."""
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            if type(value) is not int or value < 1:
                raise UsageError(f"{name} is {reprlib.repr(value)}: expected a positive integer")
            return value
        return None


def _beyond(fields: _Fields) -> tuple[str, ...]:
    """What attention of every layer wants that decode kernels here do not have."""
    model_type = fields.get("model_type")
    found = {
        "a soft-cap": bool(fields.get("attn_logit_softcapping")),
        "attention sinks": model_type == "gpt_oss",
        "ALiBi": model_type == "bloom" or fields.get("alibi") is True,
    }
    return tuple(feature for feature, wanted in found.items() if wanted)


def _sliding_shape(fields: _Fields, heads: int, beyond: tuple[str, ...]) -> Shape:
    kv_heads = fields.integer("num_key_value_heads") or heads
    return Shape(_head_dim(fields, heads), heads, kv_heads, " and ".join((SLIDING, *beyond)))


def _full_shape(fields: _Fields, heads: int, beyond: tuple[str, ...]) -> Shape:
    """Gemma 4 gives its global layers larger heads, and fewer KV heads where keys serve as values too."""
    head_dim = fields.integer("global_head_dim") or _head_dim(fields, heads)
    kv_heads = fields.integer("num_key_value_heads") or heads
    if fields.get("attention_k_eq_v") is not False:
        kv_heads = fields.integer("num_global_key_value_heads") or kv_heads
    return Shape(head_dim, heads, kv_heads, " and ".join(beyond))


def _head_dim(fields: _Fields, heads: int) -> int:
    head_dim = fields.integer("head_dim", "attention_head_dim")
    if head_dim is not None:
        return head_dim
    hidden = fields.integer("hidden_size")
    if hidden is None:
        raise UsageError("neither head_dim nor hidden_size: expected one of them")
    if hidden % heads:
        raise UsageError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and no head_dim")
    return hidden // heads


def _layer_kinds(fields: _Fields) -> list[str]:
    """The kind of each layer, by the first of the ways to say so that the configuration uses."""
    count = fields.integer("num_hidden_layers")
    if count is not None and count > _MAX_LAYERS:
        raise UsageError(f"num_hidden_layers is {reprlib.repr(count)}: expected at most {_MAX_LAYERS}")
    listed = _listed_kinds(fields)
    if listed is not None:
        if count is not None and len(listed) != count:
            raise UsageError(f"num_hidden_layers is {count}, but {len(listed)} layers are listed")
        return listed
    if count is None:
        raise UsageError("no num_hidden_layers: expected a model with layers")
    interval = fields.integer("full_attention_interval")
    if interval is not None:
        return _every(interval, count, _OTHER)
    if fields.integer("sliding_window") is None or fields.get("use_sliding_window") is False:
        return [_FULL] * count
    pattern = fields.integer("sliding_window_pattern", "_sliding_window_pattern")
    model_type = fields.get("model_type")
    if pattern is None and isinstance(model_type, str):
        pattern = _WINDOW_PATTERNS.get(model_type)
    if pattern is not None:
        return _every(pattern, count, _SLIDING)
    first = fields.integer("max_window_layers") if fields.get("use_sliding_window") else None
    return [_FULL if first is not None and i < first else _SLIDING for i in range(count)]


def _every(interval: int, count: int, between: str) -> list[str]:
    """Full attention in every ``interval``-th layer, ``between`` in the others."""
    return [between if (i + 1) % interval else _FULL for i in range(count)]


def _listed_kinds(fields: _Fields) -> list[str] | None:
    """Layer kinds where the configuration names each layer's, else None."""
    pattern = fields.get("hybrid_override_pattern")
    if pattern is not None:
        if not isinstance(pattern, str):
            raise UsageError(f"hybrid_override_pattern is {reprlib.repr(pattern)}: expected a string")
        return [_FULL if letter == "*" else _OTHER for letter in pattern]
    for name in _LAYER_LISTS:
        types = fields.get(name)
        if types is None:
            continue
        if not isinstance(types, list) or not all(isinstance(t, str) for t in types):
            raise UsageError(f"{name} is {reprlib.repr(types)}: expected a list of strings")
        return [_kind(t) for t in types]
    return None


def _kind(layer_type: str) -> str:
    kind = _LAYER_KINDS.get(layer_type)
    if kind is not None:
        return kind
    if "attention" in layer_type:
        known = ", ".join(_LAYER_KINDS)
        raise UsageError(f"unknown layer type {reprlib.repr(layer_type)}: of attention, expected one of {known}")
    return _OTHER
