"""The points of the grid: shapes, batches and contexts, and what else the targets speak of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tuner.errors import UsageError
from tuner.formats import slot_layout
from tuner.workload import Bucket, Shape, bf16_bytes, cache_bytes

FORMAT = "turboquant_4bit_nc"
OTHER_FORMATS = ("turboquant_k8v4", "turboquant_k3v4_nc", "turboquant_3bit_nc")
SHAPES = (
    Shape(128, 32, 8),
    Shape(128, 64, 8),
    Shape(128, 32, 32),
    Shape(256, 32, 2),
    Shape(256, 16, 2),
    Shape(256, 24, 4),
    Shape(512, 32, 4),
)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXTS = (1024, 4096, 16384, 65536, 131072)
BF16_LIMIT = 64 << 30
"""Bytes that the uncompressed cache of a point may have."""
LARGE_CACHE = 128_000_000
"""Compressed bytes from which the share of the limit is judged."""
_RAGGED_CONTEXT = 65536
_RAGGED_LEAST_BATCH = 4
_LATENCY = {(128, 32, 8): Bucket(1, 8192), (256, 16, 2): Bucket(1, 8192)}
_FORMAT_BUCKETS = tuple(Bucket(b, c) for b in (8, 32, 128) for c in (4096, 16384, 65536))
_DEQUANT_BUCKETS = (Bucket(1, 65536), Bucket(8, 16384), Bucket(32, 8192), Bucket(128, 4096))


@dataclass(frozen=True)
class Point:
    """One race. ``section``: grid, ragged, twin (a uniform batch with as many tokens as a ragged one), latency, format
    or dequant; all but grid and ragged are raced without attention over an uncompressed cache."""

    section: str
    shape: Shape
    cache_format: str
    bucket: Bucket

    @property
    def op(self) -> str:
        return "dequant" if self.section == "dequant" else "decode"

    @property
    def key(self) -> str:
        return f"{self.section} {shape_name(self.shape)} {self.cache_format} {self.bucket.key}"

    @property
    def compressed_bytes(self) -> int:
        return cache_bytes(self.shape, slot_layout(self.cache_format, self.shape.head_dim), self.bucket)

    @property
    def bf16_bytes(self) -> int:
        return bf16_bytes(self.shape, self.bucket)

    def facts(self) -> dict[str, Any]:
        """What a result says of its point, as JSON."""
        s, b = self.shape, self.bucket
        return {
            "key": self.key,
            "section": self.section,
            "op": self.op,
            "head_dim": s.head_dim,
            "q_heads": s.q_heads,
            "kv_heads": s.kv_heads,
            "cache_format": self.cache_format,
            "batch": b.batch,
            "context": b.context,
            "ragged": b.ragged,
            "tokens": b.tokens,
            "compressed_bytes": self.compressed_bytes,
            "bf16_bytes": self.bf16_bytes,
        }


def shape_name(shape: Shape) -> str:
    return f"{shape.head_dim}:{shape.q_heads}:{shape.kv_heads}"


def parse_shape(text: str) -> Shape:
    """A shape from "head dim:query heads:KV heads". Raises UsageError."""
    try:
        head_dim, q_heads, kv_heads = map(int, text.split(":"))
    except ValueError:
        raise UsageError(f"cannot read shape {text!r}: expected head dim:query heads:KV heads, as 128:32:8") from None
    return Shape(head_dim, q_heads, kv_heads)


def points(
    shapes: Sequence[Shape],
    batches: Sequence[int],
    contexts: Sequence[int],
    formats: Sequence[str] = (),
    *,
    dequant: bool = False,
) -> list[Point]:
    """All points, those that share a cache one after another.

    The grid and what belongs to it is of ``FORMAT``; ``formats`` are compared with it where the cache is large.
    """
    found: list[Point] = []
    for shape in shapes:
        found += _grid(shape, batches, contexts)
        for cache_format in (FORMAT, *formats) if formats else ():
            found += [Point("format", shape, cache_format, b) for b in _FORMAT_BUCKETS if _is_large(shape, b)]
    if dequant:
        for head_dim, kv_heads in dict.fromkeys((s.head_dim, s.kv_heads) for s in shapes):
            shape = Shape(head_dim, kv_heads, kv_heads)
            found += [Point("dequant", shape, FORMAT, b) for b in _DEQUANT_BUCKETS]
    return found


def _is_large(shape: Shape, bucket: Bucket) -> bool:
    compressed = cache_bytes(shape, slot_layout(FORMAT, shape.head_dim), bucket)
    return compressed >= LARGE_CACHE and bf16_bytes(shape, bucket) <= BF16_LIMIT


def _grid(shape: Shape, batches: Sequence[int], contexts: Sequence[int]) -> list[Point]:
    found = []
    for batch in batches:
        buckets = [Bucket(batch, c) for c in contexts]
        found += [Point("grid", shape, FORMAT, b) for b in buckets if bf16_bytes(shape, b) <= BF16_LIMIT]
        ragged = Bucket(batch, _RAGGED_CONTEXT, ragged=True)
        if batch >= _RAGGED_LEAST_BATCH and bf16_bytes(shape, ragged) <= BF16_LIMIT:
            twin = Bucket(batch, round(ragged.tokens / batch))
            found += [Point("ragged", shape, FORMAT, ragged), Point("twin", shape, FORMAT, twin)]
    latency = _LATENCY.get((shape.head_dim, shape.q_heads, shape.kv_heads))
    if latency and 1 in batches:
        found.append(Point("latency", shape, FORMAT, latency))
    return found
