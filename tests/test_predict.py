"""The static model against measured times, against its own bounds, and against what it must refuse."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels_for_build import LOOPS, tiny
from tuner import sass
from tuner.build import Built, build
from tuner.errors import TunerError, UsageError
from tuner.formats import slot_layout
from tuner.geometry import split_candidates
from tuner.model import busiest
from tuner.pipes import cost
from tuner.predict import _matrix_instructions, _quotas, _reduction_us, hot_loop, predict, predict_triton
from tuner.render import render
from tuner.search.evaluate import limit_us
from tuner.space import Config, Problem, default_config
from tuner.space.plan import DecodePlan
from tuner.targets import ARCHS, get_target
from tuner.workload import Bucket, Shape

FORMAT = "turboquant_4bit_nc"
H200 = get_target("sm_90")
# vLLM's Triton kernel on an H200, CUDA graph, cold L2, median of the whole decode attention:
# head dim, query heads, KV heads, batch, context, us.
MEASURED = (
    (128, 32, 8, 1, 8192, 120),
    (128, 32, 8, 1, 131072, 1518),
    (128, 32, 8, 8, 32768, 1489),
    (128, 32, 8, 32, 8192, 1373),
    (128, 32, 8, 64, 4096, 1366),
    (128, 32, 8, 128, 8192, 5282),
    (256, 16, 2, 1, 8192, 142),
    (256, 16, 2, 1, 131072, 1867),
    (256, 16, 2, 32, 8192, 1356),
    (256, 32, 2, 32, 8192, 2606),
    (512, 32, 4, 32, 8192, 6134),
)
SHAPE = Shape(128, 32, 8)
PROBLEM = Problem("decode", 128, 4, FORMAT)
LAYOUT = PROBLEM.layout


def configs() -> list[Config]:
    default = default_config(Problem("decode", 128, 4, FORMAT))
    return [default, default.with_(math="fma"), default.with_(schedule="stream", reduction="kernel", stages=3)]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Config, str], tuple[Built, sass.SassFacts]]:
    sources = [render(c) for c in configs()]
    results = build(sources, ["sm_90", "sm_121"], root=tmp_path_factory.mktemp("predict"))
    places = [(s.config, s.digest, arch) for s in sources for arch in ("sm_90", "sm_121")]
    builts = [results[digest, arch] for _, digest, arch in places]
    assert all(isinstance(b, Built) for b in builts), builts
    facts = sass.facts_of(builts)  # type: ignore[arg-type]
    return {(c, a): (b, f) for (c, _, a), b, f in zip(places, builts, facts, strict=True)}  # type: ignore[misc]


LEAN: list[tuple[str, int, int, dict[str, Any]]] = [
    (FORMAT, 128, 4, {}),
    (FORMAT, 128, 4, {"tail": "apart", "schedule": "deal"}),
    (FORMAT, 128, 4, {"squares": 2}),
    (FORMAT, 128, 3, {"query": "paired", "tail": "apart"}),
    (FORMAT, 256, 8, {"words": "adjacent", "lookup": "woven", "tail": "apart", "tokens": 32, "dim_warps": 2}),
    (FORMAT, 128, 16, {"query": "joined", "tail": "apart", "reduction": "all"}),
    ("turboquant_outlier", 128, 4, {"query": "paired", "tail": "apart"}),
]


@pytest.mark.parametrize("index", range(len(LEAN)))
def test_the_loop_over_tokens_is_found_once(index: int, tmp_path: Path) -> None:
    """Where a step apart from it repeats all of its products, too."""
    cache_format, head_dim, gqa, values = LEAN[index]
    source = render(default_config(Problem("decode", head_dim, gqa, cache_format)).with_(**values))
    built = build([source], ["sm_90"], root=tmp_path)[source.digest, "sm_90"]
    assert isinstance(built, Built), built
    facts = sass.facts(built)
    copies = 2 if "tail" in values else 1
    work = _matrix_instructions(source.config)
    assert sass.count(hot_loop(facts).opcodes, "HMMA") == work
    assert sass.count(facts.opcodes, "HMMA") == copies * work


def ranks(values: list[float]) -> list[int]:
    return [sorted(values).index(v) for v in values]


def test_triton_times_are_near_the_measured_ones(tmp_path: Path) -> None:
    """No constant of the model was fitted to these: within 30% each, and in nearly the same order."""
    pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be compiled")
    from tuner.baselines.compile import compile_for

    binaries = {
        (d, q // k): compile_for(None, Problem("decode", d, q // k, FORMAT), "sm_90", root=tmp_path)[0]
        for d, q, k, *_ in MEASURED
    }
    found = dict(zip(binaries, sass.disassemble((b.cubin, b.kernel) for b in binaries.values()), strict=True))
    predicted = []
    for d, q, k, batch, context, _ in MEASURED:
        binary, facts = binaries[d, q // k], found[d, q // k]
        assert facts.registers == binary.registers
        p = predict_triton(
            facts, H200, Shape(d, q, k), slot_layout(FORMAT, d), Bucket(batch, context),
            block_kv=4, splits=32, warps=binary.warps, shared_bytes=binary.shared_bytes,
        )  # fmt: skip
        assert p.evidence == "predicted"
        predicted.append(p.time_us)
    measured = [float(us) for *_, us in MEASURED]
    ratios = [p / m for p, m in zip(predicted, measured, strict=True)]
    assert all(0.7 < r < 1.3 for r in ratios), ratios
    n = len(measured)
    squares = sum((a - b) ** 2 for a, b in zip(ranks(predicted), ranks(measured), strict=True))
    assert 1 - 6 * squares / (n * (n * n - 1)) > 0.9


@pytest.mark.parametrize(
    ("schedule", "reduction"),
    [
        *itertools.product(("grid", "stream", "share", "deal"), ("last", "kernel", "tree")),
        *(("grid", "cluster8"), ("grid", "all"), ("deal", "all"), ("allot", "all")),
    ],
)
@pytest.mark.parametrize("arch", ["sm_90", "sm_121"])
def test_no_shorter_context_asks_for_more_splits(arch: str, schedule: str, reduction: str) -> None:
    """Scratch is reserved for the longest context before graphs are captured."""
    config = default_config(PROBLEM).with_(schedule=schedule, reduction=reduction)
    for kv_heads, batch in itertools.product((1, 2, 8, 32), (1, 3, 16, 300)):
        first = [
            split_candidates(
                config, registers=128, batch=batch, kv_heads=kv_heads, max_context=context, target=get_target(arch)
            )[0]
            for context in (1, 100, 1000, 5000, 40_000, 130_000, 1_000_000)
        ]
        assert first == sorted(first)


def test_shares_spare_ragged_batches_a_second_beginning() -> None:
    shared, stream, dealt = (default_config(PROBLEM).with_(schedule=s, warps=1) for s in ("share", "stream", "deal"))
    ragged, uniform = Bucket(8, 65536, ragged=True), Bucket(8, 8192)
    assert _quotas(dealt, ragged, 132) == _quotas(shared, ragged, 132)
    assert _quotas(shared, uniform, 132) == _quotas(stream, uniform, 132)
    pieces, sharers = _quotas(shared, ragged, 132)
    assert sum(n for n, _ in pieces) == sum(sharers) <= 132, "every CTA has one piece of one request"
    quotas, _ = _quotas(stream, ragged, 132)
    assert max(groups for _, groups in pieces) < max(groups for _, groups in quotas)
    many, few = Bucket(64, 65536, ragged=True), 16  # more requests than CTAs: quotas
    assert _quotas(shared, many, few) == _quotas(stream, many, few)


@pytest.mark.parametrize("batch", [16, 32, 64, 128])
def test_beginnings_lie_in_the_row_that_is_divided(batch: int) -> None:
    """A CTA that begins several short requests gets fewer tokens, and takes no longer than others."""
    ragged, ctas = Bucket(batch, 65536, ragged=True), 132
    dealt = default_config(PROBLEM).with_(schedule="deal")
    plan = DecodePlan(dealt)
    longest, groups = {}, sum(-(-n // 16) for n in ragged.lengths())
    for beginning in ("ordered", "prompt"):
        work, sharers = _quotas(dealt.with_(beginning=beginning), ragged, ctas)
        assert sum(n for n, _ in work) <= ctas and len(sharers) == batch
        longest[beginning] = max(most for _, most in work)
    lead = plan.beginning_steps * plan.token_warps * plan.tiles
    assert longest["prompt"] <= -(-(groups + batch * lead) // ctas) < longest["ordered"]


@pytest.mark.parametrize("arch", ["sm_90", "sm_121"])
def test_bounds_and_terms(kernels: dict[tuple[Config, str], tuple[Built, sass.SassFacts]], arch: str) -> None:
    """No prediction beats the memory limit; the terms add up; more work takes longer."""
    target = get_target(arch)
    for config in configs():
        built, facts = kernels[config, arch]
        previous = 0.0
        for bucket in (Bucket(1, 1024), Bucket(1, 16384), Bucket(8, 16384), Bucket(64, 16384), Bucket(64, 65536, True)):
            p = min(
                (
                    predict(config, built, facts, target, SHAPE, bucket, splits)
                    for splits in split_candidates(
                        config, registers=built.registers, batch=bucket.batch, kv_heads=8,
                        max_context=bucket.context, target=target,
                    )
                ),
                key=lambda p: p.time_us,
            )  # fmt: skip
            terms = [p.memory_us, p.issue_us, p.shared_us, p.matrix_us, p.latency_us]
            assert p.memory_us >= limit_us(PROBLEM, SHAPE, bucket, target)
            assert max(terms) <= p.time_us - p.overhead_us - p.reduction_us <= 1.25 * max(terms)
            assert (p.matrix_us > 0) == (config["math"] == "mma")
            assert 0 < p.occupancy <= 1
            shared = DecodePlan(config).shared_bytes
            assert p.ctas_per_sm == target.resident_ctas(config["warps"], built.registers, shared)
            if not bucket.ragged:
                assert p.time_us > previous
                previous = p.time_us


def test_which_limit_holds(kernels: dict[tuple[Config, str], tuple[Built, sass.SassFacts]]) -> None:
    """A large batch is limited by memory on the GB10, and not on the H200."""
    config = configs()[0]
    for arch, memory_bound in (("sm_121", True), ("sm_90", False)):
        p = predict(config, *kernels[config, arch], get_target(arch), SHAPE, Bucket(128, 8192), 1)
        assert (p.bottleneck == "memory") == memory_bound, p


def test_splits_are_weighed(kernels: dict[tuple[Config, str], tuple[Built, sass.SassFacts]]) -> None:
    """One request needs splits to fill the GPU; splitting costs a reduction that one split has not."""
    config = configs()[0]
    one, many = (predict(config, *kernels[config, "sm_90"], H200, SHAPE, Bucket(1, 32768), n) for n in (1, 32))
    assert many.time_us < one.time_us / 3
    assert one.reduction_us == 0 < many.reduction_us


def test_clusters_read_less_through_global_memory() -> None:
    config = default_config(Problem("decode", 256, 8, FORMAT))
    last, tree, clustered = (
        [_reduction_us(config.with_(reduction=r), [n], Shape(256, 16, 2), H200) for n in (1, 8, 9, 66)]
        for r in ("last", "tree", "cluster8")
    )
    assert 0 < clustered[0] < clustered[1] < clustered[2] < clustered[3]
    assert clustered[1] < last[1] and clustered[3] < tree[3] < last[3]


def test_hot_loop_is_the_one_over_tokens(kernels: dict[tuple[Config, str], tuple[Built, sass.SassFacts]]) -> None:
    for (config, _), (_, facts) in kernels.items():
        loop = hot_loop(facts)
        plan = DecodePlan(config)
        if config["math"] == "mma":
            products = 3 * plan.key_steps * plan.head_tiles  # both halves of the query, and the values
            squares = plan.key_steps  # of the norm correction
            weights = plan.head_tiles  # their sums
            assert sass.count(loop.opcodes, "HMMA") == plan.tiles * (products + squares + weights)
        else:
            assert sass.count(loop.opcodes, "FFMA", "HFMA2", "FMUL") >= plan.slice_dims // 32
        assert loop.instructions < facts.instructions


def test_refusals(kernels: dict[tuple[Config, str], tuple[Built, sass.SassFacts]], tmp_path: Path) -> None:
    config = configs()[0]
    built, facts = kernels[config, "sm_90"]
    clustered = config.with_(reduction="cluster2")
    with pytest.raises(UsageError, match="NVIDIA GB10: how many clusters of CTAs it holds is not known"):
        predict(clustered, *kernels[config, "sm_121"], get_target("sm_121"), SHAPE, Bucket(1, 1024), 2)
    with pytest.raises(UsageError, match=r"cubin is for sm_90, the target is sm_121"):
        predict(config, built, facts, get_target("sm_121"), SHAPE, Bucket(1, 1024), 1)
    alien = dataclasses.replace(H200, arch="sm_77")
    with pytest.raises(UsageError, match="no facts about architecture 'sm_77'"):
        predict(config, dataclasses.replace(built, arch="sm_77"), facts, alien, SHAPE, Bucket(1, 1024), 1)
    with pytest.raises(UsageError, match="does not fit on sm_90"):
        large = dataclasses.replace(built, shared_bytes=300_000)
        predict(config, large, facts, H200, SHAPE, Bucket(1, 1024), 1)
    (straight,) = build([tiny(1)], ["sm_90"], root=tmp_path).values()
    assert isinstance(straight, Built)
    with pytest.raises(TunerError, match="no loop with arithmetic"):
        predict(config, straight, sass.facts(straight), H200, SHAPE, Bucket(1, 1024), 1)


def test_memory_limit() -> None:
    # 8 requests x 4096 tokens x 8 KV heads x 134 bytes over 4300 GB/s.
    limit = limit_us(PROBLEM, SHAPE, Bucket(8, 4096), H200)
    assert limit == pytest.approx(8 * 4096 * 8 * 134 / 4300e9 * 1e6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 50)), min_size=1, max_size=20), st.integers(1, 40))
def test_busiest_place_is_bounded(ctas: list[tuple[int, int]], places: int) -> None:
    steps = busiest(tuple(ctas), places)
    total, longest = sum(n * s for n, s in ctas), max(s for _, s in ctas)
    assert max(longest, total / places) <= steps <= total / places + longest


@pytest.mark.parametrize("arch", ARCHS)
def test_costs_of_known_instructions(arch: str) -> None:
    target = get_target(arch)
    assert cost({"FFMA": 8}, 0, target).issue == 8
    assert cost({"LOP3.LUT": 8}, 0, target).issue == 16
    assert cost({"MUFU.EX2": 2, "FFMA": 4}, 0, target).issue == 16
    assert cost({"LDS.128": 2, "LDS.U8": 1, "SHFL.BFLY": 1}, 0, target).shared == 10
    assert cost({"LDSM.16.M88.4": 1}, 0, target).shared == 4
    # The dense rate of the datasheet is never exceeded.
    matrix = cost({"HMMA.16816.F32": 1}, 0, target).matrix
    assert 4096 / matrix * target.sms * target.clock_mhz * 1e6 <= target.bf16_tflops * 1e12 * 1.001


def test_unknown_kernel_of_the_same_shape_costs_what_its_code_says(tmp_path: Path) -> None:
    """The Triton entry point takes any cubin: here one of nvcc's, with a loop of known instructions."""
    (built,) = build([LOOPS], ["sm_121"], root=tmp_path).values()
    assert isinstance(built, Built)
    facts, target = sass.facts(built), get_target("sm_121")
    narrow, wide = (
        predict_triton(facts, target, SHAPE, LAYOUT, Bucket(32, 8192), block_kv=n, splits=8, warps=1) for n in (4, 8)
    )
    assert narrow.issue_us > 1.9 * wide.issue_us
    with pytest.raises(UsageError, match="cubin is for sm_121, the target is sm_90"):
        predict_triton(facts, H200, SHAPE, LAYOUT, Bucket(1, 1024), block_kv=4, splits=8, warps=1)
