"""Whole decode steps in CUDA graphs: several captured sizes alive at once, replayed with other requests and lengths."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from emulated import worst_head_error
from serving import HEADS, UNTOUCHED, Server, full_image

import tuner
from tuner.check import TOLERANCE
from tuner.formats import slot_layout
from tuner.reference import Codec, attend

pytestmark = pytest.mark.gpu

GQA = 4
SIZES = (1, 2, 4, 8)


@dataclass
class Buffers:
    """What a server keeps for its largest batch; a graph of a smaller one has views of the first rows."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor
    slots: torch.Tensor
    out: torch.Tensor

    @staticmethod
    def of(batch: int, columns: int, head_dim: int, index_dtype: torch.dtype) -> Buffers:
        query = torch.zeros(batch, GQA * HEADS, head_dim, dtype=torch.bfloat16, device="cuda")
        rows = torch.zeros(2, batch, HEADS, head_dim, dtype=torch.bfloat16, device="cuda")
        table = torch.full((batch, columns), -1, dtype=index_dtype, device="cuda")
        lengths = torch.zeros(batch, dtype=torch.int32, device="cuda")
        slots = torch.full((batch,), -1, device="cuda")
        return Buffers(query, rows[0], rows[1], table, lengths, slots, torch.full_like(query, torch.nan))

    def first(self, n: int) -> Buffers:
        return Buffers(*(getattr(self, name)[:n] for name in self.__dataclass_fields__))


def step(server: Server, b: Buffers) -> None:
    """New rows into the cache, attention over it, and the image brought up to date."""
    layout, codec = server.codec.layout, server.codec
    name = layout.format.name
    constants = {"centroids": codec.centroids, "signs": codec.signs, "channels": codec.channels}
    tuner.store(server.cache, b.key, b.value, b.slots, cache_format=name, **constants)
    scale = layout.head_dim**-0.5
    tuner.decode_attention(
        b.query, server.cache, b.table, b.lengths, scale=scale, cache_format=name, out=b.out, **constants
    )
    tuner.dequantize(
        server.cache, cache_format=name, head_dim=layout.head_dim, dirty=b.slots, out=server.outputs, **constants
    )


def load(server: Server, b: Buffers, live: list[int], rng: torch.Generator) -> None:
    """The next token of each of the ``live`` requests; the other rows of the batch are padding."""
    slots = [slot for request in live for slot in server.append(request, 1)]
    b.slots.fill_(-1)
    b.lengths.zero_()
    b.table.fill_(2**31 - 1)  # stale entries
    for row, request in enumerate(live):
        pages = server.pages[request]
        b.table[row, : len(pages)] = torch.tensor(pages)
        b.lengths[row] = server.lengths[request]
    b.slots[: len(slots)] = torch.tensor(slots)
    for tensor in (b.query, b.key, b.value):
        tensor.copy_(torch.randn(tensor.shape, generator=rng))
    b.out.fill_(torch.nan)


@pytest.mark.parametrize(
    ("cache_format", "head_dim", "block_size", "index_dtype"),
    [
        ("turboquant_4bit_nc", 128, 16, torch.int32),
        ("turboquant_k8v4", 64, 32, torch.int64),
        ("turboquant_outlier", 512, 16, torch.int32),
        ("turboquant_4bit_nc", 256, 4176, torch.int32),
        ("turboquant_seed", 256, 4176, torch.int32),
        ("turboquant_seed", 128, 8320, torch.int64),
        ("turboquant_3bit_nc", 128, 8320, torch.int32),
    ],
)
def test_decode_steps_of_several_captured_sizes(
    cache_format: str, head_dim: int, block_size: int, index_dtype: torch.dtype
) -> None:
    """Captured on padding alone; replayed with one to eight requests of lengths that a capture never saw."""
    codec = Codec.for_layout(slot_layout(cache_format, head_dim), seed=0).to("cuda")
    constants = {"centroids": codec.centroids, "signs": codec.signs, "channels": codec.channels}
    server = Server(codec, blocks=max(2 * SIZES[-1] + 2, 6400 // block_size), block_size=block_size, device="cuda")
    buffers = Buffers.of(SIZES[-1], columns=max(3, 640 // block_size), head_dim=head_dim, index_dtype=index_dtype)
    graphs = {}
    for size in SIZES:  # scratch grows while graphs that hold the old one live
        b = buffers.first(size)
        step(server, b)
        graphs[size] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[size]):
            before = torch.cuda.memory_stats()["allocation.all.allocated"]
            step(server, b)
            assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert (server.image == UNTOUCHED).all()

    rng, choice = torch.Generator().manual_seed(1), random.Random(block_size)
    lengths = (1, 15, 16, 17, 500, block_size - 1 if block_size > 500 else 100, 33, 64)
    for request, length in enumerate(lengths):  # prefill, outside of the graphs
        dirty = torch.tensor(server.append(request, length), device="cuda")
        server.write(dirty)
        tuner.dequantize(
            server.cache,
            cache_format=cache_format,
            head_dim=head_dim,
            dirty=dirty,
            out=server.outputs,
            **constants,
        )
    for turn in range(12):
        if turn == 6:  # a request ends, and a new one takes its blocks
            server.finish(4)
            server.append(4, 0)
        live = choice.sample(range(len(lengths)), choice.randrange(1, len(lengths) + 1))
        size = min(s for s in SIZES if s >= len(live))
        b = buffers.first(size)
        load(server, b, live, rng)
        graphs[size].replay()
        expected = attend(b.query, server.cache, b.table, b.lengths, head_dim**-0.5, codec)
        assert worst_head_error(b.out, expected) <= TOLERANCE[torch.bfloat16]
        server.assert_image_of_live_rows(full_image(server, **constants))
