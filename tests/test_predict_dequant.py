"""The static model of dequantisation: its bounds, what makes it slower, and its Triton twin."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tuner import sass
from tuner.build import Built, build
from tuner.errors import UsageError
from tuner.predict_dequant import predict_dequant, predict_triton_dequant, row_loops, usual
from tuner.render import render
from tuner.search.evaluate import limit_us
from tuner.search.predicted import PredictedEvaluator
from tuner.search.request import Failure, TuneRequest
from tuner.space import Config, Problem, default_config, seed_config
from tuner.targets import get_target
from tuner.workload import Bucket, Shape, bf16_bytes

PROBLEM = Problem("dequant", 256, 1, "turboquant_4bit_nc")
DEFAULT, SEED = default_config(PROBLEM), seed_config(PROBLEM)
PLANES = default_config(Problem("dequant", 128, 1, "turboquant_outlier"))
BULK = DEFAULT.with_(load="bulk", rows=2, steps=4, lookup="table")
ONE_STEP = BULK.with_(rows=4, steps=1, warps=8)
DIRECT = (DEFAULT, SEED, DEFAULT.with_(steps=1), DEFAULT.with_(divide="planes"), DEFAULT.with_(warps=16), PLANES)
CONFIGS = (*DIRECT, BULK, ONE_STEP)
SHAPE = Shape(256, 16, 2)
H200 = get_target("sm_90")
Kernels = dict[tuple[Config, str], tuple[Built, sass.SassFacts]]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    sources = [render(c) for c in CONFIGS]
    results = build(sources, ["sm_90", "sm_121"], root=tmp_path_factory.mktemp("predict"))
    places = [(s, arch) for s in sources for arch in ("sm_90", "sm_121")]
    builts = [results[s.digest, arch] for s, arch in places]
    assert all(isinstance(b, Built) for b in builts), builts
    facts = sass.facts_of(builts)  # type: ignore[arg-type]
    return {(s.config, a): (b, f) for (s, a), b, f in zip(places, builts, facts, strict=True)}  # type: ignore[misc]


@pytest.mark.parametrize("arch", ["sm_90", "sm_121"])
def test_bounds_and_terms(kernels: Kernels, arch: str) -> None:
    """No prediction beats reading the slots and writing the rows; the terms add up; more tokens take longer."""
    target = get_target(arch)
    for config in CONFIGS:
        shape = SHAPE if config.problem.head_dim == 256 else Shape(128, 32, 8)
        previous = 0.0
        for bucket in (Bucket(1, 1024), Bucket(1, 32768), Bucket(8, 16384), Bucket(32, 65536, ragged=True)):
            p = predict_dequant(config, *kernels[config, arch], target, shape, bucket)
            assert p.evidence == "predicted"
            assert p.memory_us >= limit_us(config.problem, shape, bucket, target) * (1 - 1e-9)
            read_only = limit_us(dataclasses.replace(config.problem, op="decode"), shape, bucket, target)
            assert p.memory_us > read_only + bf16_bytes(shape, bucket) / target.bandwidth_gbps / 1e3 * 0.99
            terms = [p.memory_us, p.issue_us, p.shared_us, p.matrix_us, p.latency_us]
            assert max(terms) <= p.time_us - p.overhead_us <= 1.3 * max(terms)
            assert (p.matrix_us > 0) == (config["transform"] == "mma") and p.reduction_us == 0
            assert p.time_us > previous
            previous = p.time_us


def test_loops_over_rows_are_found_for_either_kind_of_cache(kernels: Kernels) -> None:
    assert len(row_loops(kernels[DEFAULT, "sm_90"][1])) == 2  # keys, then values
    assert len(row_loops(kernels[PLANES, "sm_90"][1])) == 1  # both planes go through the same
    assert row_loops(kernels[DEFAULT.with_(steps=1), "sm_90"][1]) == []  # a single step is no loop
    loops = row_loops(kernels[BULK, "sm_90"][1])  # with branches for every output, and without
    assert len(loops) == 4 and len(usual(loops)) == 2 and row_loops(kernels[ONE_STEP, "sm_90"][1]) == []
    shorter, longer = (sum(sum(x.opcodes.values()) for x in loops if (x in usual(loops)) == u) for u in (True, False))
    assert 1.5 * shorter < longer
    keys = max(row_loops(kernels[DEFAULT, "sm_90"][1]), key=lambda x: sass.count(x.opcodes, "HMMA"))
    assert sass.count(keys.opcodes, "HMMA") >= DEFAULT["rows"]


def test_what_is_known_to_be_slow_is_predicted_slow(kernels: Kernels) -> None:
    """A shuffle butterfly per row is where the seed's time goes; idle warps hold their places."""
    bucket = Bucket(32, 8192)
    times = {c: predict_dequant(c, *kernels[c, "sm_90"], H200, SHAPE, bucket).time_us for c in CONFIGS if c != PLANES}
    assert times[DEFAULT] > 1.2 * max(times[BULK], times[ONE_STEP])  # measured: 249 and 175 us
    assert times[SEED] > 1.5 * times[DEFAULT]
    assert times[DEFAULT.with_(warps=16)] > 1.5 * times[DEFAULT]  # 16 tokens x 2 heads fill a quarter of its rows


def test_the_gb10_is_limited_by_memory(kernels: Kernels) -> None:
    for config in CONFIGS[:4]:
        p = predict_dequant(config, *kernels[config, "sm_121"], get_target("sm_121"), SHAPE, Bucket(32, 8192))
        assert p.bottleneck == "memory"


def test_refusals(kernels: Kernels) -> None:
    built, facts = kernels[DEFAULT, "sm_90"]
    with pytest.raises(UsageError, match=r"cubin is for sm_90, the target is sm_121"):
        predict_dequant(DEFAULT, built, facts, get_target("sm_121"), SHAPE, Bucket(1, 1024))
    with pytest.raises(UsageError, match="does not fit on sm_90"):
        large = dataclasses.replace(built, shared_bytes=300_000)
        predict_dequant(DEFAULT, large, facts, H200, SHAPE, Bucket(1, 1024))


def test_the_triton_twin_goes_through_the_same_model(kernels: Kernels) -> None:
    facts = kernels[SEED, "sm_90"][1]
    one, two = (
        predict_triton_dequant(
            [(facts, 0)] * n, H200, SHAPE, PROBLEM.layout, Bucket(8, 16384), rows=1, warps=4
        )
        for n in (1, 2)
    )  # fmt: skip
    limit = limit_us(PROBLEM, SHAPE, Bucket(8, 16384), H200)
    assert limit < one < two  # twice the instructions, the same bytes


def test_the_search_predicts_dequantisation_and_its_baseline(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be compiled")
    problem, buckets = Problem("dequant", 64, 1, "turboquant_k8v4"), (Bucket(1, 4096), Bucket(32, 8192))
    request = TuneRequest(
        problem, Shape(64, 8, 8), buckets, get_target("sm_121"), "predicted", root=tmp_path, workers=2
    )
    evaluator = PredictedEvaluator(request)
    (candidate,) = evaluator.build([default_config(problem)])
    scored = evaluator.score(candidate, None)  # type: ignore[arg-type]
    assert set(scored.timings) == {b.key for b in buckets}  # type: ignore[union-attr]
    spilled = evaluator.score(dataclasses.replace(candidate, spill_bytes=8), None)  # type: ignore[type-var]
    assert spilled == Failure("resource", "8 bytes of spills, whose cost the model cannot tell")
    final = evaluator.final([(candidate, 1)], buckets[1], (), 1.0)  # type: ignore[list-item]
    assert final.times[0].median_us == scored.timings[buckets[1].key][1].median_us  # type: ignore[union-attr]
    twin = final.baselines_us["triton_dequant"]  # type: ignore[union-attr]
    assert twin is not None and twin > limit_us(problem, request.shape, buckets[1], request.target)
