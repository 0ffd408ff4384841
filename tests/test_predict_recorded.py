"""The static model against what GPUs measured: the shipped tables are the recorded data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpus import H100

from tuner.build import Built
from tuner.predict import predict
from tuner.sass import SassFacts, disassemble
from tuner.space import Config, get_space
from tuner.table import BatchEntry, BucketEntry, Table, read
from tuner.table.schema import Timing
from tuner.targets import describe, device_slug, get_target
from tuner.workload import Bucket, Shape

ROOT = Path(__file__).resolve().parent.parent
TABLES = ROOT / "tuner" / "tables"
GRID = ROOT / "docs" / "decode-grid" / "NVIDIA_H200.json"
GPUS = {t.device_name: t for t in (get_target("sm_90"), describe(H100))}
MEASURED = sorted(
    p for p in TABLES.glob("turboquant_decode*.json") if any(device_slug(name) in p.name for name in GPUS)
)
APART = 1.05
"""Measured times closer than this are no reason to prefer one kernel."""
UNSURE = 0.1
"""A median whose interval is wider than this is no yardstick."""

each_table = pytest.mark.parametrize("path", MEASURED, ids=lambda p: p.stem.removeprefix("turboquant_decode,"))


@cache
def all_recorded() -> dict[Path, Table]:
    return {path: read(path) for path in MEASURED}


@cache
def all_facts() -> dict[str, SassFacts]:
    """Of all tables' kernels at once: the disassembler takes most of its time to start."""
    cubins = {k.id: TABLES / "kernels" / f"{k.id}.cubin" for table in all_recorded().values() for k in table.kernels}
    return dict(zip(cubins, disassemble((c, "wph_decode") for c in cubins.values()), strict=True))


def recorded(path: Path) -> tuple[Table, dict[str, SassFacts]]:
    table = all_recorded()[path]
    assert table.evidence == "measured"
    return table, all_facts()


def predicted_us(path: Path, entry: BatchEntry | BucketEntry, timing: Timing) -> float:
    """What the model says of ``entry``'s kernel and splits on the bucket of ``timing``."""
    table, facts = recorded(path)
    k = table.kernel(entry.kernel)
    sizes = (k.registers, k.spill_bytes, 0, 0)
    built = Built(k.source_digest, k.arch, path, k.cubin_sha256, *sizes, 0.0, "wph_decode", {})
    shape = Shape(table.problem.head_dim, table.problem.gqa * table.kv_heads, table.kv_heads)
    bucket = Bucket(entry.batch, timing.context, timing.ragged)
    config = k.config(table.problem)
    return predict(config, built, facts[k.id], GPUS[table.device.name], shape, bucket, entry.splits).time_us


def uncertainty(timing: Timing) -> float:
    return (timing.ci_high_us - timing.ci_low_us) / timing.time_us


def pairs(path: Path) -> Iterator[tuple[float, float]]:
    """(measured, predicted) ratio of two kernels on one bucket: its batch's one choice over its own."""
    table, _ = recorded(path)
    shared = {(e.batch, t.context, t.ragged): (e, t) for e in table.by_batch for t in e.timings}
    for own in table.by_batch_and_context:
        other, timing = shared[own.batch, own.timing.context, own.timing.ragged]
        if (other.kernel, other.splits) != (own.kernel, own.splits):
            predicted = predicted_us(path, other, timing) / predicted_us(path, own, own.timing)
            yield timing.time_us / own.timing.time_us, predicted


@each_table
def test_model_is_within_a_factor_and_better_than_counting_bytes(path: Path) -> None:
    entries = [e for e in recorded(path)[0].by_batch_and_context if uncertainty(e.timing) < UNSURE]
    assert len(entries) >= 24
    measured = np.array([e.timing.time_us for e in entries])
    predicted = np.array([predicted_us(path, e, e.timing) for e in entries])
    bytes_alone = np.array([e.timing.limit_us for e in entries])
    ratio = predicted / measured
    print(f"predicted / measured: median {np.median(ratio):.2f}, {ratio.min():.2f} to {ratio.max():.2f}")
    assert 0.6 < np.median(ratio) < 1.1
    assert ratio.min() > 0.5 and ratio.max() < 1.3
    error, naive = (np.sqrt(np.mean(np.log(x / measured) ** 2)) for x in (predicted, bytes_alone))
    print(f"error as a factor: {np.exp(error):.2f}, of bytes over bandwidth: {np.exp(naive):.2f}")
    assert error < naive / 2


def test_model_mostly_names_the_faster_of_two_kernels() -> None:
    """Over all tables: what a search without a GPU relies on."""
    found = [p for path in MEASURED for p in pairs(path) if p[0] > APART]
    right = sum(predicted > 1 for _, predicted in found)
    print(f"of {len(found)} pairs more than {APART - 1:.0%} apart the model names the faster in {right}")
    assert len(found) >= 40 and right >= 0.7 * len(found)


def same_point(raced: dict[str, Any], config: Config, splits: int) -> bool:
    """Whether a race's kernel, described by the axes that there were, is ``config``."""
    stated = dict(axis.split("=") for axis in raced["config"].split())
    values = get_space("decode").completed(stated)
    return raced["splits"] == splits and all(str(values[name]) == str(value) for name, value in config.params)


def quiet(path: Path) -> Iterator[tuple[float, float]]:
    """(measured, predicted) of winners that were raced once more, on an H200 alone on its host."""
    table, _ = recorded(path)
    raced = {
        (r["head_dim"], r["kv_heads"], r["q_heads"], r["batch"], r["context"], r["ragged"]): r
        for r in json.loads(GRID.read_text())["results"]
        if r["section"] in ("grid", "ragged") and r["cache_format"] == table.problem.cache_format
    }
    for e in table.by_batch_and_context:
        shape = (table.problem.head_dim, table.kv_heads, table.problem.gqa * table.kv_heads)
        race = raced.get((*shape, e.batch, e.timing.context, e.timing.ragged))
        if race and same_point(race["kernels"]["wph"], table.kernel(e.kernel).config(table.problem), e.splits):
            yield race["times_us"]["wph"], predicted_us(path, e, e.timing)


def test_short_calls_of_a_gpu_alone_on_its_host() -> None:
    """What beginnings and clusters are charged was fitted to these times; tables hold those of a host that delays."""
    found = [pair for path in MEASURED if "NVIDIA_H200" in path.name for pair in quiet(path)]
    short = np.array([predicted / measured for measured, predicted in found if measured < 25])
    print(f"{len(short)} of {len(found)} under 25 us: {np.median(short):.2f}, {short.min():.2f} to {short.max():.2f}")
    assert len(found) > 250 and len(short) > 50
    assert 0.9 < np.median(short) < 1.1 and short.max() < 1.3
