"""Launching: what can be seen without a GPU, then the public calls and CUDA graphs on one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import tuner
from tuner.arguments import decode_params
from tuner.emulate import Launch, emulate
from tuner.errors import TunerError, UsageError
from tuner.formats import FORMATS, slot_layout
from tuner.geometry import Scratch, decode_geometry, decode_scratch, split_candidates
from tuner.launch import LoadedKernel, Workspace, cache_order, decode_launches, dequant_launches, require_layout
from tuner.reference import Case, Codec, make_cache, synthetic_cache
from tuner.render import render
from tuner.space import Config, Problem, default_config, get_space
from tuner.suits import CacheOrder, comes_piecemeal, refusal, suited
from tuner.targets import get_target

TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 2e-3}


def config_of(cache_format: str = "turboquant_4bit_nc", head_dim: int = 64, gqa: int = 4, **params: Any) -> Config:
    return default_config(Problem("decode", head_dim, gqa, cache_format)).with_(**params)


def error(out: torch.Tensor, expected: torch.Tensor, seq_lens: torch.Tensor) -> float:
    """Largest relative error of a head; NaN counts as infinite."""
    assert not out[seq_lens == 0].any()
    used = seq_lens > 0
    worst = ((out.double() - expected)[used].norm(dim=-1) / expected[used].norm(dim=-1)).max()
    return math.inf if worst.isnan() else float(worst)


def test_strided_tensors_through_the_emulator() -> None:
    config = config_of()
    case = synthetic_cache(config.problem.layout, (20, 20), q_heads=8, kv_heads=2, index_dtype=torch.int64)
    query = torch.empty(2, 3, 8, 64, dtype=torch.bfloat16)[:, 1].copy_(case.query)
    out = torch.full((4, 9, 64), math.nan, dtype=torch.bfloat16)
    case = replace(case, query=query, block_table=case.block_table[:1].expand(2, -1))
    scratch = decode_scratch(config, batch=2, kv_heads=2, splits=2)
    space = Workspace("cpu")
    params, tensors = decode_params(
        case.query,
        case.kv_cache,
        case.block_table,
        case.seq_lens,
        out[1:3, :8],
        cache_format=case.layout.format.name,
        scale=case.scale,
        splits=2,
        partials=space.partials(scratch.partial_floats),
        counters=space.counters(scratch.counters),
        centroids=case.codec.centroids,
    )
    launches = [
        Launch(entry, geometry.grid, geometry.block, geometry.shared_bytes)
        for entry, geometry in decode_launches(config, case.query, case.kv_cache, 2)
    ]
    emulate(render(config), launches, params, tensors)
    assert error(out[1:3, :8], case.expected(), case.seq_lens) <= 5e-3
    assert out[0].isnan().all() and out[3].isnan().all() and out[:, 8].isnan().all()


def test_a_second_kernel_merges_where_the_configuration_says_so() -> None:
    query = torch.zeros(3, 8, 64, dtype=torch.bfloat16)
    cache = make_cache(slot_layout("turboquant_4bit_nc", 64), 4, 16, 2)
    one = decode_launches(config_of(reduction="last"), query, cache, 4)
    two = decode_launches(config_of(reduction="kernel"), query, cache, 4)
    assert [entry for entry, _ in one] == ["wph_decode"]
    assert [entry for entry, _ in two] == ["wph_decode", "wph_decode_reduce"]
    assert decode_launches(config_of(), query[:0], cache, 4) == []


@pytest.mark.parametrize(
    ("size", "splits", "clusters"), [(8, 1, 1), (8, 8, 1), (8, 9, 2), (8, 66, 9), (4, 9, 3), (2, 66, 33)]
)
def test_clusters_are_whole_and_leave_a_slot_each(size: int, splits: int, clusters: int) -> None:
    config = config_of(reduction=f"cluster{size}", warps=4, head_warps=2)
    geometry = decode_geometry(config, batch=3, kv_heads=5, splits=splits)
    assert geometry.grid == (size * clusters, 3, 3)
    scratch = decode_scratch(config, batch=3, kv_heads=5, splits=splits)
    rows = 3 * clusters * 5 * 4
    assert scratch == Scratch(2 * rows + 64 * rows, 3 * 3 * size)
    h200 = get_target("sm_90")
    held = h200.held_ctas(h200.resident_ctas(4, 128, geometry.shared_bytes), size)
    for context in (1, 1000, 100_000):
        wanted = split_candidates(config, registers=128, batch=1, kv_heads=2, max_context=context, target=h200)
        assert not any(n % size for n in wanted) and wanted[0] <= held


def test_clusters_are_refused_where_splits_are_not_per_request() -> None:
    config = config_of(reduction="cluster2")
    refused = {
        s: [c.name for c in get_space("decode").refusals(config.with_(schedule=s), get_target("sm_90"))]
        for s in ("grid", "stream", "share")
    }
    assert refused == {"grid": [], "stream": ["clustered_splits"], "share": ["clustered_splits"]}


@pytest.mark.parametrize("change", [{}, {"reduction": "kernel", "schedule": "stream"}])
def test_more_requests_than_a_grid_can_have_are_refused_in_a_line(change: dict[str, str]) -> None:
    query = torch.empty(70000, 8, 64, device="meta", dtype=torch.bfloat16)
    cache = torch.empty(1, 16, 2, 70, device="meta", dtype=torch.uint8)
    with pytest.raises(UsageError, match="70000 requests in one call: expected at most 65535"):
        decode_launches(config_of(**change), query, cache, 1)
    assert len(decode_launches(config_of(schedule="stream"), query, cache, 1)) == 1


def test_a_kernel_of_another_problem_is_refused() -> None:
    cache = make_cache(slot_layout("turboquant_4bit_nc", 64), 4, 16, 2)
    with pytest.raises(UsageError, match="2 heads per KV head: expected 64 and 4"):
        decode_launches(config_of(), torch.zeros(1, 4, 64), cache, 1)
    with pytest.raises(UsageError, match="turboquant_k8v4 at head dim 64 for a kernel of turboquant_4bit_nc"):
        require_layout(config_of(), Codec.for_layout(slot_layout("turboquant_k8v4", 64)))


def test_dequant_of_an_empty_table_launches_nothing() -> None:
    config = default_config(Problem("dequant", 64, 1, "turboquant_4bit_nc"))
    cache = make_cache(config.problem.layout, 4, 16, 2)
    assert dequant_launches(config, cache, torch.zeros(0, 3, dtype=torch.int32)) == []
    assert [entry for entry, _ in dequant_launches(config, cache, torch.zeros(2, 3, dtype=torch.int32))] == [
        "wph_dequant"
    ]


def test_workspace_grows_and_keeps_what_graphs_may_use() -> None:
    space = Workspace("cpu")
    small = space.partials(10)
    assert space.partials(small.numel()).data_ptr() == small.data_ptr()
    large = space.partials(small.numel() + 1)
    assert large.numel() >= 2 * small.numel()
    assert large.data_ptr() != small.data_ptr()
    assert not space.counters(5).any()


@pytest.mark.parametrize("cache_format", list(FORMATS))
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_default_kernel_suits_a_fresh_cache(cache_format: str, head_dim: int) -> None:
    config = config_of(cache_format, head_dim)
    cache = make_cache(config.problem.layout, 4, 16, 2)
    order = replace(cache_order(cache), address=0)
    assert order == CacheOrder.standard(config, kv_heads=2)
    assert refusal(config, order) is None
    assert suited(config, order) is config


def test_caches_that_a_kernel_cannot_read() -> None:
    config = config_of("turboquant_k8v4")
    order = CacheOrder.standard(config, kv_heads=2)
    assert "block size 24" in (refusal(config, replace(order, block_size=24)) or "")
    assert "bytes apart" in (refusal(config, replace(order, token=1 << 27)) or "")
    odd = replace(order, block=order.block + 2)
    assert "4 bytes" in (refusal(config, odd) or "")
    assert suited(config, odd)["load"] == "direct"
    assert refusal(suited(config, odd), odd) is None


def test_dequantisation_by_bulk_copies_wants_slots_side_by_side() -> None:
    for name in FORMATS:
        plain = default_config(Problem("dequant", 128, 1, name))
        config = plain.with_(load="bulk")
        order = CacheOrder.standard(config, kv_heads=2)
        slot = config.problem.layout.slot_bytes
        assert not comes_piecemeal(config, order)
        for changes in (
            {"address": 8},
            {"block": order.block + 2},
            {"head": slot + 2, "token": 2 * slot + 4},
            {"head": 16 * slot, "token": slot},
        ):
            assert comes_piecemeal(config, replace(order, **changes))
            assert not comes_piecemeal(plain, replace(order, **changes))


def test_bulk_copies_want_pages_in_one_piece() -> None:
    config = config_of(load="bulk", warps=4, head_warps=2, dim_warps=1)
    assert refusal(config, CacheOrder.standard(config, kv_heads=2)) is None
    assert "between tokens" in (refusal(config, CacheOrder.standard(config, kv_heads=4)) or "")
    assert "do not divide" in (refusal(config, CacheOrder.standard(config, kv_heads=3)) or "")
    cache = make_cache(config.problem.layout, 4, 32, 4, order="head")
    order = replace(cache_order(cache), address=0)
    assert refusal(config, order) is None
    assert "16 bytes" in (refusal(config, replace(order, block=order.block + 8)) or "")


def test_bulk_copies_of_rows_want_aligned_tokens() -> None:
    config = config_of(load="bulk_rows", warps=8, head_warps=8)
    order = CacheOrder.standard(config, kv_heads=32)
    assert refusal(config, order) is None
    assert "do not divide" in (refusal(config, CacheOrder.standard(config, kv_heads=12)) or "")
    assert "16 bytes" in (refusal(config, replace(order, token=order.token + 8)) or "")
    assert "16 bytes" in (refusal(config.with_(head_warps=4), order) or "")
    assert "side by side" in (refusal(config, replace(order, token=order.head, head=16 * order.head)) or "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: these are the messages without one")
def test_messages_without_a_gpu() -> None:
    case = synthetic_cache(slot_layout("turboquant_4bit_nc", 64), (5,), q_heads=8, kv_heads=2)
    with pytest.raises(UsageError, match="kv_cache is on cpu: expected a CUDA device"):
        tuner.decode_attention(
            case.query, case.kv_cache, case.block_table, case.seq_lens, scale=1.0, cache_format="turboquant_4bit_nc"
        )
    with pytest.raises(UsageError, match="which is 'k'"):
        tuner.dequantize(
            case.kv_cache, case.block_table, case.seq_lens, cache_format="turboquant_4bit_nc", head_dim=64, which="k"
        )
    with pytest.raises(TunerError, match="no NVIDIA GPU"):
        tuner.load_tables()
    with pytest.raises(TunerError, match="no NVIDIA GPU"):
        LoadedKernel.load(b"", config_of())


def test_store_is_the_reference() -> None:
    layout = slot_layout("turboquant_4bit_nc", 64)
    cache = make_cache(layout, 2, 16, 2)
    key, value = torch.randn(2, 3, 2, 64)
    tuner.store(cache, key, value, torch.tensor([5, -1, 31]), cache_format="turboquant_4bit_nc")
    written = (cache != 0xFF).any(-1).any(-1).flatten().nonzero().flatten()
    assert written.tolist() == [5, 31]


# From here on a GPU is needed.


def decode(case: Case, **options: Any) -> torch.Tensor:
    return tuner.decode_attention(
        case.query,
        case.kv_cache,
        case.block_table,
        case.seq_lens,
        scale=case.scale,
        cache_format=case.layout.format.name,
        centroids=case.codec.centroids,
        signs=case.codec.signs,
        channels=case.codec.channels,
        **options,
    )


def gpu_case(
    lengths: tuple[int, ...], cache_format: str = "turboquant_4bit_nc", head_dim: int = 128, **more: Any
) -> Case:
    layout = slot_layout(cache_format, head_dim)
    return synthetic_cache(layout, lengths, **{"q_heads": 8, "kv_heads": 2, "device": "cuda", **more})


@pytest.mark.gpu
@pytest.mark.parametrize("cache_format", list(FORMATS))
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_decode_attention_of_every_format(cache_format: str, head_dim: int) -> None:
    case = gpu_case((0, 1, 17, 1500), cache_format, head_dim, seed=1)
    assert error(decode(case), case.expected(), case.seq_lens) <= 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["token", "head"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decode_attention_of_strided_caches(order: str, dtype: torch.dtype) -> None:
    case = gpu_case((700, 31), order=order, padding=6, block_size=32, query_dtype=dtype, index_dtype=torch.int64)
    assert error(decode(case), case.expected(), case.seq_lens) <= TOLERANCE[dtype]


@pytest.mark.gpu
def test_dequantize_rows() -> None:
    case = gpu_case((0, 1, 17, 100), "turboquant_k8v4")
    key, value = tuner.dequantize(
        case.kv_cache, case.block_table, case.seq_lens, cache_format="turboquant_k8v4", head_dim=128
    )
    from tuner.reference import dequantize

    assert key is not None and value is not None
    want_key, want_value = dequantize(case.kv_cache, case.codec)
    columns = case.block_table.shape[1]
    for b, length in enumerate(case.seq_lens.tolist()):
        for token in range(length):
            block, at = int(case.block_table[b, token // 16]), b * columns + token // 16
            assert torch.equal(key[at, token % 16], want_key[block, token % 16].bfloat16())
            close = torch.isclose(
                value[at, token % 16].double(), want_value[block, token % 16], rtol=2.0**-7, atol=1e-5
            )
            assert bool(close.all())
    only, none = tuner.dequantize(
        case.kv_cache, case.block_table, case.seq_lens, cache_format="turboquant_k8v4", head_dim=128, which="key"
    )
    assert none is None and only is not None
    assert torch.equal(only[columns, 0], key[columns, 0])  # the one token of request 1


@pytest.mark.gpu
def test_replay_with_other_lengths_and_pages_than_at_capture() -> None:
    first = gpu_case((40, 7, 900))
    later = gpu_case((0, 1200, 33), seed=0, spare_blocks=40)
    columns = max(first.block_table.shape[1], later.block_table.shape[1])
    table = torch.zeros(3, columns, dtype=torch.int32, device="cuda")
    cache = torch.empty_like(later.kv_cache)
    case = replace(first, kv_cache=cache, block_table=table, query=first.query.clone(), seq_lens=first.seq_lens.clone())
    out = torch.full_like(case.query, math.nan)

    def load(source: Case) -> None:
        cache[: source.kv_cache.shape[0]] = source.kv_cache
        table[:, : source.block_table.shape[1]] = source.block_table
        case.query.copy_(source.query)
        case.seq_lens.copy_(source.seq_lens)

    assert first.kv_cache.shape[0] <= cache.shape[0]
    load(first)
    decode(case, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode(case, out=out)
    for source in (later, first, later):
        load(source)
        out.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert error(out, source.expected(), source.seq_lens) <= 5e-3


@pytest.mark.gpu
def test_graphs_of_several_sizes_live_side_by_side() -> None:
    captured = []
    for batch in (1, 32, 4):
        case = gpu_case(tuple(100 * i + 5 for i in range(batch)), seed=batch)
        out = torch.full_like(case.query, math.nan)
        decode(case, out=out)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            decode(case, out=out)
        captured.append((case, out, graph))
    for case, out, graph in (*captured, *reversed(captured)):
        out.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert error(out, case.expected(), case.seq_lens) <= 5e-3


@pytest.mark.gpu
def test_capture_without_scratch_says_what_to_do() -> None:
    case = gpu_case((50,) * 3)
    decode(case)  # the kernel is loaded, but this workspace is new
    with pytest.raises(TunerError, match="run the call once"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        decode(case, workspace=Workspace(case.query.device))
    assert error(decode(case), case.expected(), case.seq_lens) <= 5e-3


@pytest.mark.gpu
def test_runs_on_the_current_stream() -> None:
    case = gpu_case((300, 20))
    expected = decode(case)
    torch.cuda.synchronize()
    query = torch.zeros_like(case.query)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a tenth of a second: a launch on another stream would overtake the copy
        query.copy_(case.query)
        out = decode(replace(case, query=query))
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.gpu
def test_a_damaged_cubin_is_refused() -> None:
    with pytest.raises(TunerError, match="the driver refuses the kernel"):
        LoadedKernel.load(b"\x7fELF" + bytes(4096), config_of())
