"""Op store through the search: buckets, limit, inputs, the table that comes out and what reads it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tuner.baselines import BASELINES, split_name, survey
from tuner.build import Built, build
from tuner.errors import UsageError
from tuner.geometry import dynamic_shared_bytes
from tuner.measure import Checked, Contestant, Failure, Measurer, Race
from tuner.measure.store_pool import SCATTERED, slot_mapping
from tuner.render import render
from tuner.report import terminal
from tuner.report.rows import rows, summary
from tuner.search import Candidate, Time, Timings, TuneRequest, TuneResult, tune
from tuner.search.evaluate import Final, Scored, limit_us, splits_for_batch
from tuner.search.request import Failure as SearchFailure
from tuner.space import Config, Problem, default_config
from tuner.table import explain, lookup, read, verify
from tuner.targets import get_target
from tuner.workload import Bucket, Shape, store_buckets

SHAPE = Shape(128, 32, 8)
PROBLEM = Problem("store", 128, 1, "turboquant_4bit_nc")
TARGET = get_target("sm_90")


class Formula:
    """Few warps suit few tokens; the times stand in for a GPU's. The rest is the search's own."""

    fingerprint = "formula"

    def __init__(self, root: Path) -> None:
        self.root = root

    def build(self, configs: Sequence[Config]) -> list[Candidate | SearchFailure]:
        return [self._build(c) for c in configs]

    def _build(self, config: Config) -> Candidate:
        digest = hashlib.sha256(config.describe().encode()).hexdigest()
        cubin = self.root / digest
        cubin.write_bytes(digest.encode())
        shared = dynamic_shared_bytes(config)
        return Candidate(config, digest, hashlib.sha256(digest.encode()).hexdigest(), str(cubin), 64, shared, 0)

    def time(self, config: Config, bucket: Bucket) -> Time:
        wanted = 16 if bucket.batch > SCATTERED else 1
        us = 3 + limit_us(PROBLEM, SHAPE, bucket, TARGET) * (1 + abs(config["warps"] - wanted) / 4)
        return Time(us, us, us)

    def score(self, candidate: Candidate, best: Timings | None) -> Scored | SearchFailure:
        return Scored({b.key: {1: self.time(candidate.config, b)} for b in store_buckets()})

    def confirm(self, candidate: Candidate) -> SearchFailure | None:
        return None

    def rivals(self, tell: Callable[[str], None], *_: float) -> tuple[str, ...]:
        return ()

    def final(
        self, contestants: Sequence[tuple[Candidate, int]], bucket: Bucket, rivals: Sequence[str] | None, *_: float
    ) -> Final | SearchFailure:
        assert not rivals and all(splits == 1 for _, splits in contestants)
        times = tuple(self.time(c.config, bucket) for c, _ in contestants)
        winner = min(range(len(times)), key=lambda i: times[i].median_us)
        return Final(times, winner, False, {} if rivals is None else {"vllm_store": 5 * times[winner].median_us})

    def close(self) -> None:
        pass


def search(root: Path) -> TuneResult:
    request = TuneRequest(
        PROBLEM, SHAPE, store_buckets(), TARGET, "measured", trials=24, root=root, output=root / "tables"
    )
    return tune(request, None, Formula(root))  # type: ignore[arg-type]


def test_a_table_comes_out_and_is_found_by_tokens(tmp_path: Path) -> None:
    result = search(tmp_path)
    assert result.path and verify(result.path) == ()
    assert result.path.name.startswith("turboquant_store,head_dim=128,gqa=1,") and read(result.path) == result.table
    table = result.table
    assert {e.batch for e in table.by_batch} == {b.batch for b in store_buckets()}
    few, many = (lookup(table, tokens, kv_heads=8) for tokens in (100, 16000))
    assert few is not None and many is not None and few.splits == many.splits == 1
    assert table.kernel(few.kernel).config(PROBLEM)["warps"] < table.kernel(many.kernel).config(PROBLEM)["warps"]
    assert lookup(table, 40_000, kv_heads=8) is None  # beyond the largest chunk by more than the cut-off
    assert lookup(table, 40_000, kv_heads=2) == lookup(table, 10_000, kv_heads=8)  # rows are tokens x heads


def test_reports_speak_of_tokens_and_of_vllms_launches(tmp_path: Path) -> None:
    table = search(tmp_path).table
    assert all(r.shipped_us == pytest.approx(5 * r.time_us) for r in rows(table))
    lines = summary(table)
    assert lines[0].startswith("against vLLM's launches: 5.00 x faster") and len(lines) == 2
    console = Console(width=120, record=True)
    console.print(terminal.winners(table))
    printed = console.export_text()
    assert "tokens" in printed and "5.00 x" in printed and "8k" in printed and "context" not in printed
    assert printed.count("measured") == len(store_buckets())
    text = explain(table, 8192, kv_heads=8).lines
    assert any("baseline vllm_store" in line for line in text) and any("memory limit" in line for line in text)


def test_the_limit_is_what_is_read_and_written() -> None:
    """8k tokens x 8 heads: 512 bytes of rows in, 134 of slot out."""
    expected = 8192 * 8 * (512 + 134) / (TARGET.bandwidth_gbps * 1e3)
    assert limit_us(PROBLEM, SHAPE, Bucket(8192, 1), TARGET) == pytest.approx(expected)
    seed = Problem("store", 128, 1, "turboquant_seed")
    bytes_of_seed = limit_us(seed, SHAPE, Bucket(1, 1), TARGET) * TARGET.bandwidth_gbps * 1e3
    assert bytes_of_seed == pytest.approx(8 * (512 + 2 * 95))  # padding is not written


def test_splits_of_a_store() -> None:
    config = default_config(PROBLEM).with_(store="staged", store_bytes=16)
    assert splits_for_batch(config, 64, SHAPE, [Bucket(8, 1)], TARGET) == (1,)


def test_buckets_are_decode_steps_and_chunks() -> None:
    sizes = [b.batch for b in store_buckets()]
    assert sizes == sorted(sizes) and {1, 128, 512, 8192} <= set(sizes)
    assert all(b.context == 1 and b.tokens == b.batch for b in store_buckets())


@pytest.mark.parametrize("tokens", [1, 128, SCATTERED, SCATTERED + 1, 1024])
def test_slots_are_distinct_and_as_vllm_hands_them_out(tokens: int) -> None:
    slots = slot_mapping(tokens, 512, 16, torch.Generator().manual_seed(1))
    assert slots.dtype == torch.int64 and slots.shape == (tokens,)
    assert len(set(slots.tolist())) == tokens and int(slots.min()) >= 0 and int(slots.max()) < 512 * 16
    blocks = len(set((slots // 16).tolist()))
    assert blocks == (tokens if tokens <= SCATTERED else -(-tokens // 16))


def test_the_baseline_is_vllms_and_has_no_open_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [b.name for b in BASELINES.values() if b.op == "store"] == ["vllm_store"]
    with pytest.raises(UsageError, match="vllm_store has no open constants"):
        split_name("vllm_store[rows=1]")
    monkeypatch.setenv("WPH_VLLM_SOURCE", "/nowhere")
    (state,) = survey("cpu", PROBLEM)
    assert state.reason is not None and "triton_turboquant_store.py" in state.reason
    (state,) = survey("cpu", replace(PROBLEM, cache_format="turboquant_seed"))
    assert state.reason == "vLLM has no format turboquant_seed"


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def built(config: Config) -> Built:
    from tuner.kernels import device_arch

    source, arch = render(config), device_arch(0)
    result = build([source], [arch])[source.digest, arch]
    assert isinstance(result, Built), result
    return result


@pytest.mark.gpu
def test_gate_times_and_race_in_the_child() -> None:
    config = default_config(PROBLEM)
    kernel = built(config)
    buckets = [Bucket(1, 1), Bucket(128, 1), Bucket(8192, 1)]
    with Measurer() as measurer:
        checked = measurer.check(config, kernel.cubin, level="quick", kv_heads=8)
        assert isinstance(checked, Checked), checked
        assert checked.worst_error <= 1 and "indices moved" in checked.detail
        timings = measurer.time(config, kernel.cubin, kernel.registers, SHAPE, buckets)
        assert not isinstance(timings, Failure), timings
        assert [t.bucket for t in timings] == [b.key for b in buckets]
        medians = [t.sample.median_us for t in timings]
        assert 1 < medians[0] <= medians[1] * 1.2 and medians[1] < medians[2] < 200
        contestants = [Contestant("ours", config, kernel.cubin), Contestant("vllm_store")]
        race = measurer.race(contestants, SHAPE, PROBLEM.cache_format, buckets[1], op="store", budget_s=1.0)
        assert isinstance(race, Race), race
        if "vllm_store" not in race.samples:
            assert "vLLM" in race.failures["vllm_store"].message
        else:
            assert race.samples["ours"].median_us < race.samples["vllm_store"].median_us
