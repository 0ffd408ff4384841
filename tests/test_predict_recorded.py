"""The static model against what an H200 measured: the shipped tables are the recorded data."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tuner.build import Built
from tuner.predict import predict
from tuner.sass import disassemble
from tuner.table import read
from tuner.targets import get_target
from tuner.workload import Bucket, Shape

TABLES = Path(__file__).resolve().parent.parent / "tuner" / "tables"
MEASURED = sorted(p for p in TABLES.glob("turboquant_decode*.json") if "NVIDIA_H200" in p.name)


@cache
def recorded(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Measured and predicted times in us of a table's choices, bucket by bucket."""
    table = read(path)
    assert table.evidence == "measured"
    cubins = {k.id: path.parent / "kernels" / f"{k.id}.cubin" for k in table.kernels}
    facts = dict(zip(cubins, disassemble((c, "wph_decode") for c in cubins.values()), strict=True))
    shape = Shape(table.problem.head_dim, table.problem.gqa * table.kv_heads, table.kv_heads)
    target = get_target("sm_90")
    measured, predicted = [], []
    for entry in table.by_batch_and_context:
        kernel = table.kernel(entry.kernel)
        built = Built(
            kernel.source_digest,
            kernel.arch,
            cubins[kernel.id],
            kernel.cubin_sha256,
            kernel.registers,
            kernel.spill_bytes,
            0,
            0,
            0.0,
            "wph_decode",
            {},
        )
        bucket = Bucket(entry.batch, entry.timing.context, entry.timing.ragged)
        model = predict(kernel.config(table.problem), built, facts[kernel.id], target, shape, bucket, entry.splits)
        measured.append(entry.timing.time_us)
        predicted.append(model.time_us)
    return np.array(measured), np.array(predicted)


def ranks(values: np.ndarray) -> np.ndarray:
    return values.argsort().argsort().astype(float)


@pytest.mark.parametrize("path", MEASURED, ids=lambda p: p.stem.split(",device")[0])
def test_model_ranks_buckets_as_the_gpu_did(path: Path) -> None:
    measured, predicted = recorded(path)
    assert np.corrcoef(ranks(measured), ranks(predicted))[0, 1] > 0.95


@pytest.mark.parametrize("path", MEASURED, ids=lambda p: p.stem.split(",device")[0])
def test_model_is_within_a_factor(path: Path) -> None:
    measured, predicted = recorded(path)
    ratio = predicted / measured
    print(f"predicted / measured: median {np.median(ratio):.2f}, {ratio.min():.2f} to {ratio.max():.2f}")
    assert 0.5 < np.median(ratio) < 1.5
    assert ratio.min() > 0.25 and ratio.max() < 2.5
