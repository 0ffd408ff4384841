"""A layer on a GPU, as vLLM drives it: eager, captured in a graph and replayed, and with a broken file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tuner.reference import Case, bulk_cache, bulk_case, synthetic_cache
from tuner.space import Problem
from tuner.vllm.defaults import build_defaults, write
from tuner.vllm.dispatch import dispatch_for
from tuner.vllm.eligible import LayerFacts
from tuner.vllm.layer import Layer
from tuner.vllm.scratch import scratch_for

pytestmark = pytest.mark.gpu
TOLERANCE = 5e-3
LENGTHS = (300, 0, 17, 1025)


@pytest.fixture(params=["turboquant_4bit_nc", "turboquant_k8v4"])
def problem(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Problem]:
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    monkeypatch.setenv("VLLM_CONFIG_ROOT", str(tmp_path / "none"))
    made = Problem("decode", 128, 4, request.param)
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    for defaults in build_defaults([made], arch):
        write(defaults, tmp_path)
    dispatch_for.cache_clear()
    scratch_for.cache_clear()
    yield made
    dispatch_for.cache_clear()


def case_of(problem: Problem, padding: int = 0, order: str = "token") -> Case:
    return synthetic_cache(
        problem.layout, LENGTHS, q_heads=4 * problem.gqa, kv_heads=4, padding=padding, order=order, stale_table=False
    )


def layer_of(problem: Problem, case: Case) -> Layer:
    layer = Layer(LayerFacts(problem.head_dim, 4 * problem.gqa, 4, problem.cache_format, case.scale))
    layer.prepare(torch.device("cuda", torch.cuda.current_device()), "test", max(LENGTHS))
    layer.reserve(8, torch.bfloat16)
    assert layer.reason is None
    return layer


def decode(layer: Layer, case: Case, context: int | None) -> torch.Tensor:
    out = layer.decode(case.query, case.kv_cache, case.block_table, case.seq_lens, case.codec.centroids, context)
    assert out is not None, layer.reason
    return out


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    size = expected.norm(dim=-1)
    assert not out[1].any()
    return float(((out.double().cpu() - expected).norm(dim=-1) / size.clamp_min(1e-30))[[0, 2, 3]].max())


@pytest.mark.parametrize(("padding", "order"), [(0, "token"), (0, "head"), (6, "token")])
def test_eager_calls_agree_with_the_reference(problem: Problem, padding: int, order: str) -> None:
    case = case_of(problem, padding, order)
    layer = layer_of(problem, case)
    for context in (None, max(LENGTHS)):
        assert error(decode(layer, case.to("cuda"), context), case.expected()) <= TOLERANCE


def test_a_captured_graph_serves_other_lengths_and_allocates_nothing(problem: Problem) -> None:
    host = case_of(problem)
    case = host.to("cuda")
    layer = layer_of(problem, host)
    case.seq_lens.fill_(1)
    decode(layer, case, None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        out = decode(layer, case, 1)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    case.seq_lens.copy_(host.seq_lens)
    for _ in range(3):
        graph.replay()
        assert error(out, host.expected()) <= TOLERANCE


def test_a_cache_that_replaces_another_is_the_one_that_is_read(problem: Problem) -> None:
    """vLLM captures graphs on a small cache first, to see what they cost, and frees it before it makes the real one."""
    host = case_of(problem)
    profiled = host.to("cuda")
    layer = layer_of(problem, host)
    decode(layer, profiled, None)
    profiled.kv_cache.fill_(0xFF)  # what freed memory may hold
    assert error(decode(layer, host.to("cuda"), None), host.expected()) <= TOLERANCE


def test_strided_queries_of_a_fused_projection(problem: Problem) -> None:
    host = case_of(problem)
    case = host.to("cuda")
    wide = torch.randn(len(LENGTHS), 3 * 4 * problem.gqa, problem.head_dim, device="cuda", dtype=torch.bfloat16)
    wide[:, : 4 * problem.gqa] = case.query
    layer = layer_of(problem, host)
    out = layer.decode(
        wide[:, : 4 * problem.gqa], case.kv_cache, case.block_table, case.seq_lens, case.codec.centroids, None
    )
    assert out is not None and error(out, host.expected()) <= TOLERANCE


def test_a_continuation_call_has_one_row_of_the_block_table(problem: Problem) -> None:
    host = case_of(problem)
    case = host.to("cuda")
    layer = layer_of(problem, host)
    rows = torch.arange(1021, 1026, dtype=torch.int32, device="cuda")
    query = torch.randn(5, 4 * problem.gqa, problem.head_dim, device="cuda", dtype=torch.bfloat16)
    table = case.block_table[3:4].expand(5, -1)
    out = layer.decode(query, case.kv_cache, table, rows, case.codec.centroids, 1025)
    assert out is not None
    expected = Case(query, case.kv_cache, table.contiguous(), rows, case.scale, case.codec).to("cpu").expected()
    assert float(((out.double().cpu() - expected).norm(dim=-1) / expected.norm(dim=-1)).max()) <= TOLERANCE


def test_a_damaged_cubin_hands_everything_back(problem: Problem, tmp_path: Path) -> None:
    problem = replace(problem, gqa=5)  # of no table that came with the package
    for defaults in build_defaults([problem], "sm_{}{}".format(*torch.cuda.get_device_capability())):
        write(defaults, tmp_path)
    for cubin in (tmp_path / "kernels").glob("*.cubin"):
        cubin.write_bytes(cubin.read_bytes()[:-1] + b"?")
    case = case_of(problem)
    layer = Layer(LayerFacts(problem.head_dim, 4 * problem.gqa, 4, problem.cache_format, case.scale))
    on_gpu = case.to("cuda")
    layer.prepare(on_gpu.query.device, "test", max(LENGTHS))
    out = layer.decode(on_gpu.query, on_gpu.kv_cache, on_gpu.block_table, on_gpu.seq_lens, on_gpu.codec.centroids, 9)
    assert out is None and "not what" in (layer.reason or "")


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("peak", [1.0, 30.0])
def test_batches_of_long_requests_flat_and_peaked(problem: Problem, batch: int, tokens: int, peak: float) -> None:
    lengths = tuple(tokens - 3 * i for i in range(batch))
    case = bulk_case(problem.layout, lengths, q_heads=4 * problem.gqa, kv_heads=4, device="cuda")
    case = replace(case, query=case.query * peak)
    expected = case.expected()
    layer = Layer(LayerFacts(problem.head_dim, 4 * problem.gqa, 4, problem.cache_format, case.scale))
    layer.prepare(case.query.device, "test", tokens)
    layer.reserve(batch, torch.bfloat16)
    for context in (None, tokens):
        out = decode(layer, case, context).double()
        assert float(((out - expected).norm(dim=-1) / expected.norm(dim=-1)).max()) <= TOLERANCE


def test_a_cache_beyond_4_gib(problem: Problem) -> None:
    """Pages from both ends of the cache and from around the offsets 2^31 and 2^32."""
    block_size, kv_heads, tokens = 16, 8, 2000
    layout = problem.layout
    block_bytes = block_size * kv_heads * layout.slot_bytes
    blocks = (9 << 29) // block_bytes  # 4.5 GiB
    case = bulk_case(layout, (tokens,) * 4, q_heads=kv_heads * problem.gqa, kv_heads=kv_heads, device="cuda")
    pages = -(-tokens // block_size)
    starts = (0, (1 << 31) // block_bytes - pages // 2, (1 << 32) // block_bytes - pages // 2, blocks - pages)
    table = torch.stack([torch.arange(start, start + pages, device="cuda", dtype=torch.int32) for start in starts])
    cache = bulk_cache(layout, blocks, block_size, kv_heads, "cuda")
    assert cache.numel() > 1 << 32
    case = replace(case, kv_cache=cache, block_table=table)
    layer = Layer(LayerFacts(problem.head_dim, kv_heads * problem.gqa, kv_heads, problem.cache_format, case.scale))
    layer.prepare(cache.device, "test", tokens)
    layer.reserve(len(starts), torch.bfloat16)
    expected, out = case.expected(), decode(layer, case, tokens).double()
    assert float(((out - expected).norm(dim=-1) / expected.norm(dim=-1)).max()) <= TOLERANCE
