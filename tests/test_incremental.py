"""Incremental dequantisation: an image of the cache that only dirty slots bring up to date. Emulator, then GPU."""

from __future__ import annotations

import random

import pytest
import torch
from emulated import emulate_dequant, needs_gxx
from serving import CAPTURED, HEADS, UNTOUCHED, Server, full_image, padded, serve

import tuner
from tuner.arguments import dequant_params
from tuner.errors import UsageError
from tuner.formats import FORMATS, slot_layout
from tuner.launch import dequant_launches
from tuner.reference import Codec, dequantize, make_cache
from tuner.space import Config, Problem, default_config


def config_of(cache_format: str = "turboquant_4bit_nc", head_dim: int = 64, **changes: int | str) -> Config:
    return default_config(Problem("dequant", head_dim, 1, cache_format)).with_(**changes)


CONFIGS = (
    config_of(),
    config_of(divide="tokens"),
    config_of("turboquant_seed", divide="planes"),
    config_of("turboquant_outlier", load="staged", load_bytes=16),
    config_of("turboquant_k8v4", divide="tokens", rows=1, steps=1),
    config_of("turboquant_3bit_nc", load="bulk", rows=2, steps=4),
    config_of("turboquant_seed", load="bulk", divide="planes", rows=2),
)


@needs_gxx
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.problem.cache_format}-{c['divide']}-{c['load']}")
def test_an_image_follows_a_serving_run(config: Config) -> None:
    """Batch > 1, live last blocks, reused blocks, padded batches: after every step the image is a full decode's."""
    codec = Codec.for_layout(config.problem.layout, seed=3)
    server = Server(codec, blocks=9, block_size=16)
    for dirty in serve(server):
        emulate_dequant(config, codec, server.cache, *server.outputs, dirty=dirty)
        table, lengths = server.table()
        full = torch.full_like(server.image, UNTOUCHED)
        key, value = full.view(torch.bfloat16)
        emulate_dequant(config, codec, server.cache, key, value, block_table=table, seq_lens=lengths, by_block_id=True)
        server.assert_image_of_live_rows(full)


def touched(
    config: Config, dirty: torch.Tensor, blocks: int, block_size: int, padding: int = 18, **order: int
) -> list[int]:
    """Slots of the image that one launch writes; each must be whole and right, on both sides.

    Bytes lie between the cache's blocks, so that a run which goes beyond its block meets them.
    """
    codec = Codec.for_layout(config.problem.layout)
    server = Server(codec, blocks, block_size, padding=padding)
    server.write(torch.arange(blocks * block_size))
    emulate_dequant(config, codec, server.cache, *server.outputs, dirty=dirty, **order)
    written = (server.image != UNTOUCHED).flatten(1, 2)
    rows = written.flatten(2)
    assert torch.equal(rows.any(-1), rows.all(-1))
    assert torch.equal(rows[0], rows[1])
    for got, want in zip(server.outputs, dequantize(server.cache, codec), strict=True):
        got, want = (x.flatten(0, 1)[rows[0].all(-1)].double() for x in (got, want))
        assert bool(((got - want).norm(dim=-1) <= 4e-3 * want.norm(dim=-1)).all())
    return rows[0].all(-1).nonzero().flatten().tolist()


ORDERS = {
    "nothing": [],
    "only padding": [-1, -1, -1],
    "one": [37],
    "block 0": [0],
    "a run over two blocks": list(range(20, 45)),
    "backwards": [21, 20, 19, 18],
    "twice": [7, 8, 7, 8],
    "holes": [3, -1, 4, 5, 7, -1, 8],
    "a row alone between runs": [1, 2, 40, 3, 4, 15, 16, 17],
    "last slot": [94, 95],
}


@needs_gxx
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("divide", ["heads", "tokens"])
@pytest.mark.parametrize("order", ORDERS)
def test_exactly_the_dirty_rows_are_written(order: str, divide: str, index_dtype: torch.dtype) -> None:
    slots = ORDERS[order]
    dirty = torch.tensor(slots, dtype=index_dtype)
    assert touched(config_of(divide=divide), dirty, blocks=3, block_size=32) == sorted({s for s in slots if s >= 0})


@needs_gxx
@pytest.mark.parametrize("cache_format", ["turboquant_seed", "turboquant_4bit_nc"])
@pytest.mark.parametrize("block_size", [1, 5, 16])
def test_a_bulk_copy_ends_with_the_block(cache_format: str, block_size: int) -> None:
    """Eight slots make it whole, but not behind the last: there the storage ends."""
    config = config_of(cache_format, load="bulk", rows=2, steps=4)
    last = 3 * block_size - 1
    assert touched(config, torch.tensor([last]), blocks=3, block_size=block_size, padding=0) == [last]


@needs_gxx
@pytest.mark.parametrize("load", ["direct", "bulk"])
def test_random_lists(load: str) -> None:
    """CTAs in any order: none may leave to another what it got wrong itself."""
    config = config_of(load=load, rows=2, steps=4)
    rng = random.Random(0)
    for block_size in (1, 5, 16, 24, 40):
        total = 4 * block_size
        slots: list[int] = []
        for _ in range(6):
            start = rng.randrange(total)
            slots += [-1] * rng.randrange(2) + list(range(start, min(total, start + rng.randrange(1, 30))))
        written = touched(
            config, torch.tensor(slots), blocks=4, block_size=block_size, seed=block_size, concurrent_ctas=64
        )
        assert written == sorted({s for s in slots if s >= 0}), block_size


@needs_gxx
@pytest.mark.parametrize("block_size", [4176, 8320])
def test_blocks_of_thousands_of_tokens(block_size: int) -> None:
    """A hybrid model's pool: one new row costs one CTA, not a block's worth of them."""
    config = config_of()
    slots = [5, block_size - 3, block_size - 2, block_size - 1, block_size, block_size + 1, 2 * block_size - 1]
    assert touched(config, torch.tensor(slots), blocks=2, block_size=block_size) == slots
    cache = make_cache(config.problem.layout, 2, block_size, HEADS)
    ((_, geometry),) = dequant_launches(config, cache, None, torch.tensor(slots))
    assert geometry.grid[0] * geometry.grid[1] * geometry.grid[2] <= 2 * len(slots)


@needs_gxx
def test_more_slots_than_a_grid_dimension_holds() -> None:
    dirty = torch.full((65540,), -1)
    dirty[-2:] = torch.tensor([17, 18])
    assert touched(config_of(warps=1, rows=1, steps=1), dirty, blocks=2, block_size=16) == [17, 18]


def test_what_is_refused() -> None:
    codec = Codec.for_layout(slot_layout("turboquant_4bit_nc", 64))
    server = Server(codec, blocks=2, block_size=16)
    slots, table, lengths = torch.arange(3), torch.zeros(1, 2, dtype=torch.int32), torch.ones(1, dtype=torch.int32)

    def params(block_table: torch.Tensor | None, seq_lens: torch.Tensor | None, dirty: torch.Tensor | None) -> None:
        dequant_params(
            server.cache,
            block_table,
            seq_lens,
            *server.outputs,
            cache_format="turboquant_4bit_nc",
            head_dim=64,
            centroids=codec.centroids,
            dirty=dirty,
        )

    params(None, None, slots)
    with pytest.raises(UsageError, match="dirty is given with block_table or seq_lens"):
        params(table, lengths, slots)
    with pytest.raises(UsageError, match="block_table or seq_lens is None"):
        params(table, None, None)
    with pytest.raises(UsageError, match="dirty is float32: expected int32 or int64"):
        params(None, None, slots.float())
    with pytest.raises(UsageError, match="dirty has shape"):
        params(None, None, slots[None])
    with pytest.raises(UsageError, match="last stride 2"):
        params(None, None, torch.arange(6)[::2])
    many = server.cache[:1].expand(1 << 28, -1, -1, -1)
    with pytest.raises(UsageError, match=r"4294967296 slots: expected less than 2\^32"):
        dequant_params(
            many,
            None,
            None,
            *server.outputs,
            cache_format="turboquant_4bit_nc",
            head_dim=64,
            centroids=codec.centroids,
            dirty=slots,
        )


# From here on a GPU is needed.


def gpu_server(cache_format: str = "turboquant_4bit_nc", head_dim: int = 128, **sizes: int) -> Server:
    codec = Codec.for_layout(slot_layout(cache_format, head_dim), seed=0).to("cuda")
    return Server(codec, **{"blocks": 9, "block_size": 16} | sizes, device="cuda")


def bring_up_to_date(server: Server, dirty: torch.Tensor) -> None:
    layout = server.codec.layout
    tuner.dequantize(
        server.cache, cache_format=layout.format.name, head_dim=layout.head_dim, dirty=dirty, out=server.outputs
    )


@pytest.mark.gpu
@pytest.mark.parametrize("cache_format", FORMATS)
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_a_captured_graph_follows_a_serving_run(cache_format: str, head_dim: int) -> None:
    """Captured on nothing but padding, without allocating; replayed with each step's slots, lengths and requests."""
    server = gpu_server(cache_format, head_dim)
    dirty = torch.full((CAPTURED,), -1, device="cuda")
    bring_up_to_date(server, dirty)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        bring_up_to_date(server, dirty)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert (server.image == UNTOUCHED).all()
    for slots in serve(server):
        dirty.copy_(slots)
        graph.replay()
        server.assert_image_of_live_rows(full_image(server))


@pytest.mark.gpu
def test_graphs_of_several_sizes_share_an_image() -> None:
    """A graph per batch size, all alive, replayed in any order: what vLLM does."""
    server = gpu_server(blocks=40)
    graphs = {}
    for size in (1, 8, 2, 4):
        dirty = torch.full((size,), -1, device="cuda")
        bring_up_to_date(server, dirty)
        graphs[size] = (dirty, torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[size][1]):
            bring_up_to_date(server, dirty)
    rng = random.Random(1)
    for _ in range(60):
        live = rng.sample(range(8), rng.randrange(1, 9))
        size = min(s for s in graphs if s >= len(live))
        slots = [slot for request in live for slot in server.append(request, 1)]
        dirty, graph = graphs[size]
        dirty.copy_(padded(slots, size))
        server.write(dirty)
        graph.replay()
        server.assert_image_of_live_rows(full_image(server))


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [4176, 8320])
def test_blocks_of_thousands_of_tokens_on_a_gpu(block_size: int) -> None:
    server = gpu_server("turboquant_seed", 256, blocks=5, block_size=block_size)
    for tokens in ({1: block_size + 7, 2: 40}, {1: 1, 2: 1}, {1: 33, 2: 1}):
        dirty = torch.tensor([s for r, n in tokens.items() for s in server.append(r, n)], device="cuda")
        server.write(dirty)
        bring_up_to_date(server, dirty)
        server.assert_image_of_live_rows(full_image(server))


@pytest.mark.gpu
def test_an_image_is_needed() -> None:
    server = gpu_server()
    with pytest.raises(UsageError, match="dirty is given without out"):
        tuner.dequantize(
            server.cache, cache_format="turboquant_4bit_nc", head_dim=128, dirty=torch.zeros(1, device="cuda")
        )
