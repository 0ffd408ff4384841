"""What the decode grid's results are judged by."""

from __future__ import annotations

import pytest
from grid_results import by_name, grid, result

from benchmarks.decode_grid import all_met, verdict_line
from benchmarks.grid.kernels import GRAPH
from benchmarks.grid.points import FORMAT, OTHER_FORMATS, SHAPES, Point
from benchmarks.grid.verdict import graph_cost, share, verdicts
from tuner.workload import Bucket, Shape


def test_verdicts_say_by_how_much_and_where() -> None:
    small, large = grid(1, 1024), grid(128, 16384)
    results = [
        result(small, 10.0, vllm_triton=80.0, fa3_bf16=9.0, **{"triton[a=1]": 60.0, "triton[b=1]": 50.0}),
        result(large, 1000.0, vllm_triton=18500.0, fa3_bf16=2200.0, fa3_fp8=1300.0, **{"triton[a=1]": 5000.0}),
    ]
    found = by_name(results)
    shipped = found["against vLLM's Triton as shipped", "mean"]
    assert shipped.reached == pytest.approx(148**0.5) and shipped.met and shipped.below == 1
    least = found["against vLLM's Triton as shipped", "worst"]
    assert least.met and least.reached == 8.0 and least.worst_at == "D=128 32/8, 1 x 1024"
    assert found["against the same Triton tuned", "mean"].reached == pytest.approx(5.0)
    bf16 = found["against FA3 bf16", "worst"]
    assert bf16.met is False and bf16.reached == pytest.approx(0.9) and "10% short" in verdict_line(bf16)
    assert "1 x 1024" in verdict_line(bf16) and verdict_line(bf16).startswith("MISSED")
    # Only the large cache counts in the means against FlashAttention-3.
    assert found["against FA3 bf16, cache >= 256 MB in bf16", "mean"].reached == pytest.approx(2.2)
    assert found["against FA3 fp8, cache >= 256 MB in bf16", "mean"].met is False
    limit = found["share of the limit, cache >= 128 MB", "worst"]
    assert limit.points == 1 and limit.reached == pytest.approx(share(results[1])) and limit.met is False
    unknown = found["share of the limit, cache >= 128 MB, D=512 or group 1", "worst"]
    assert unknown.met is None and verdict_line(unknown).startswith("not measured")


def test_hard_shapes_have_their_own_share() -> None:
    results = [result(p := grid(128, 16384, shape), p.compressed_bytes / 4.3e6 / 0.6) for shape in SHAPES[:3]]
    found = by_name(results)
    assert found["share of the limit, cache >= 128 MB", "worst"].met is False
    hard = found["share of the limit, cache >= 128 MB, D=512 or group 1", "worst"]
    assert hard.points == 1 and hard.met


def test_latency_ragged_formats_and_rows_have_verdicts() -> None:
    ragged = Point("ragged", SHAPES[0], FORMAT, Bucket(8, 65536, ragged=True))
    twin = grid(8, round(ragged.bucket.tokens / 8), section="twin")
    formats = [Point("format", SHAPES[0], f, Bucket(32, 16384)) for f in (FORMAT, *OTHER_FORMATS)]
    results = [
        result(grid(1, 8192, section="latency"), 13.0),
        result(grid(1, 8192, SHAPES[4], "latency"), 13.0),
        result(ragged, 50.0),
        result(twin, 40.0),
        *(result(p, p.compressed_bytes / 4.3e6 / s) for p, s in zip(formats, (0.7, 0.71, 0.6, 0.5), strict=True)),
        result(Point("dequant", Shape(128, 8, 8), FORMAT, Bucket(8, 16384)), 1.0),
    ]
    found = by_name(results)
    assert found["batch 1 x 8k within 14 us, D=128", "worst"].met
    assert found["batch 1 x 8k within 12 us, D=256", "worst"].met is False
    throughput = found["ragged against uniform throughput", "worst"]
    assert throughput.met is False and throughput.reached == pytest.approx(0.8, rel=1e-3)
    shares = [found[f"{f}: share of its limit against {FORMAT}'s", "mean"] for f in OTHER_FORMATS]
    assert [v.met for v in shares] == [True, True, False]
    assert shares[2].reached == pytest.approx(5 / 7)
    assert found["dequantisation: share of the limit, >= 64k rows", "worst"].met


def test_the_price_of_one_kernel_per_batch() -> None:
    results = [result(grid(1, 1024), 10.0), result(grid(1, 4096), 10.0, **{GRAPH: 12.1})]
    assert graph_cost(results) == pytest.approx(1.1)
    assert graph_cost([]) is None


def test_a_kernel_that_fails_misses_every_target() -> None:
    good, bad = result(grid(1, 1024), 10.0, vllm_triton=800.0), result(grid(1, 4096), 10.0) | {"times_us": {}}
    found = by_name([good, bad])["against vLLM's Triton as shipped", "worst"]
    assert found.met is False and (found.points, found.asked, found.failed) == (1, 2, 1)
    assert "1 of 2 points, 1 without a time of ours" in verdict_line(found)
    nothing = by_name([bad])["against vLLM's Triton as shipped", "worst"]
    assert nothing.met is False and verdict_line(nothing).startswith("MISSED")
    assert all_met([v for v in verdicts([good]) if v.met]) and not all_met(verdicts([good, bad]))
    alone = by_name([result(grid(1, 1024), 10.0)])["against FA3 bf16", "worst"]  # no peer at hand
    assert alone.met is None and not all_met([alone]) and all_met([v for v in verdicts([]) if not v.asked])


def test_graphs_have_their_own_verdicts() -> None:
    found = by_name([result(grid(1, 1024), 10.0, fa3_bf16=15.0, **{GRAPH: 20.0})])
    assert found["against FA3 bf16", "worst"].met
    graph = found["against FA3 bf16, one kernel per batch", "worst"]
    assert graph.met is False and graph.reached == pytest.approx(0.75)
