"""Attention shapes, buckets of batch and context, and workloads made of them."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from tuner.errors import UsageError
from tuner.formats import SlotLayout, check_head_dim

SHORTEST_RAGGED = 128
"""Tokens of the shortest request in a ragged batch."""

_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
_CONTEXTS = (1024, 4096, 16384, 65536, 131072)
_STORE_CHUNKS = (512, 1024, 2048, 4096, 8192)
_RAGGED_CONTEXT = 65536
_RAGGED_BATCH = 4  # smaller batches have too few lengths to differ
_DEFAULT_HEADS = {64: (32, 8), 128: (32, 8), 256: (16, 2), 512: (32, 4)}  # head dim -> query heads, KV heads


@dataclass(frozen=True)
class Shape:
    """One layer's attention.

    ``wants``: what it asks for beyond plain causal attention, in words ("a sliding window"); vLLM's own kernel then
    runs it. Empty where ours may.
    """

    head_dim: int
    q_heads: int
    kv_heads: int
    wants: str = ""

    def __post_init__(self) -> None:
        check_head_dim(self.head_dim)
        if self.q_heads < 1 or self.kv_heads < 1 or self.q_heads % self.kv_heads:
            raise UsageError(
                f"{self.q_heads} query heads cannot share {self.kv_heads} KV heads: expected a positive multiple"
            )

    @property
    def gqa(self) -> int:
        """Query heads per KV head."""
        return self.q_heads // self.kv_heads

    def shard(self, ranks: int) -> Shape:
        """The part of one of ``ranks`` GPUs under tensor parallelism, as vLLM divides heads. Raises UsageError."""
        if ranks < 1 or self.q_heads % ranks or (self.kv_heads % ranks and ranks % self.kv_heads):
            heads = f"{self.q_heads} query and {self.kv_heads} KV heads"
            raise UsageError(f"{heads} cannot be divided among {ranks} GPUs: expected a divisor")
        return replace(self, q_heads=self.q_heads // ranks, kv_heads=max(1, self.kv_heads // ranks))


def ragged_length(context: int, quantile: float) -> int:
    """Tokens at ``quantile`` (0 to 1) of a log-uniform distribution over SHORTEST_RAGGED..``context``."""
    return round(SHORTEST_RAGGED * (context / SHORTEST_RAGGED) ** quantile)


def longest_request(batch: int, context: int, ragged: bool) -> int:
    """Tokens of the longest request of a bucket: the last of its quantiles where it is ragged."""
    return ragged_length(context, (batch - 0.5) / batch) if ragged else context


@dataclass(frozen=True)
class Bucket:
    """One point of the timing grid: ``batch`` requests of ``context`` tokens, or ragged ones of up to ``context``."""

    batch: int
    context: int
    ragged: bool = False

    def __post_init__(self) -> None:
        if self.batch < 1 or self.context < 1:
            raise UsageError(f"bucket of {self.batch} requests x {self.context} tokens: expected both at least 1")
        if self.ragged and self.context < SHORTEST_RAGGED:
            raise UsageError(f"ragged bucket of {self.context} tokens: expected at least {SHORTEST_RAGGED}")

    @property
    def key(self) -> str:
        """Name in tables and databases: "b8_c4096", "b8_ragged65536"."""
        return f"b{self.batch}_{'ragged' if self.ragged else 'c'}{self.context}"

    def lengths(self, seed: int = 0) -> list[int]:
        """Tokens of each request.

        Ragged: the quantiles of a log-uniform distribution over SHORTEST_RAGGED..context, in an order that ``seed``
        determines, so that every seed holds the same tokens in total.
        """
        if not self.ragged:
            return [self.context] * self.batch
        lengths = [ragged_length(self.context, (i + 0.5) / self.batch) for i in range(self.batch)]
        random.Random(seed).shuffle(lengths)
        return lengths

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return longest_request(self.batch, self.context, self.ragged)

    @property
    def tokens(self) -> int:
        """Tokens of all requests together."""
        return sum(self.lengths())


@dataclass(frozen=True)
class Workload:
    """A model: its distinct attention shapes, each with the number of layers that have it, and the timing grid."""

    name: str
    shapes: tuple[tuple[Shape, int], ...]
    buckets: tuple[Bucket, ...]

    def shard(self, ranks: int) -> Workload:
        """What one of ``ranks`` GPUs runs. Raises UsageError where the heads cannot be divided."""
        return replace(self, shapes=tuple((shape.shard(ranks), layers) for shape, layers in self.shapes))


def default_shape(head_dim: int, gqa: int | None = None, kv_heads: int | None = None) -> Shape:
    """The shape tuned for where only the head dim is given, or also ``gqa`` query heads per KV head, or ``kv_heads``.

    Raises UsageError for an unsupported head dim, a group size or a number of heads below 1.
    """
    usual = Shape(head_dim, *_DEFAULT_HEADS[check_head_dim(head_dim)])
    gqa = usual.gqa if gqa is None else gqa
    kv_heads = usual.kv_heads if kv_heads is None else kv_heads
    if gqa < 1:
        raise UsageError(f"unsupported group size {gqa}: expected at least 1 query head per KV head")
    if kv_heads < 1:
        raise UsageError(f"{kv_heads} KV heads: expected at least 1")
    return Shape(head_dim, kv_heads * gqa, kv_heads)


def default_buckets() -> tuple[Bucket, ...]:
    """Every batch size with every context length, and a ragged batch of each size that is large enough."""
    even = tuple(Bucket(batch, context) for batch in _BATCHES for context in _CONTEXTS)
    ragged = tuple(Bucket(batch, _RAGGED_CONTEXT, ragged=True) for batch in _BATCHES if batch >= _RAGGED_BATCH)
    return even + ragged


def store_buckets() -> tuple[Bucket, ...]:
    """A store's bucket is a call of ``batch`` tokens: decode steps of one token per request, and prefill chunks."""
    return tuple(Bucket(tokens, 1) for tokens in (*_BATCHES, *_STORE_CHUNKS))


def default_workload(head_dim: int, gqa: int | None = None, kv_heads: int | None = None) -> Workload:
    """The workload of a head dim without a model: default_shape() over default_buckets()."""
    shape = default_shape(head_dim, gqa, kv_heads)
    return Workload(f"head_dim={head_dim}", ((shape, 1),), default_buckets())


def cache_bytes(shape: Shape, layout: SlotLayout, bucket: Bucket) -> int:
    """Bytes of compressed cache that one layer holds, and one decode call reads, at ``bucket``."""
    return bucket.tokens * shape.kv_heads * layout.token_bytes


def bf16_bytes(shape: Shape, bucket: Bucket) -> int:
    """Bytes of the same keys and values in bf16: an uncompressed cache, or what a dequantisation writes."""
    return bucket.tokens * shape.kv_heads * 4 * shape.head_dim
