"""Benchmarks of whole models: whose kernel races, and what is said where nothing can be timed."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tuner.bench import OURS, bench_model, our_kernel
from tuner.errors import TunerError
from tuner.space import Problem, default_config
from tuner.table import BatchEntry, Device, Kernel, Provenance, Table, Timing, kernel_id, write
from tuner.targets import get_target
from tuner.workload import Bucket, Shape, Workload, load_model

TARGET = get_target("sm_90")
FORMAT = "turboquant_4bit_nc"
SHAPE = Shape(128, 32, 8)
PROBLEM = Problem("decode", 128, 4, FORMAT)
IMAGE = b"\x7fELF tuned"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path / "tuned"))
    monkeypatch.setenv("VLLM_CONFIG_ROOT", str(tmp_path / "none"))
    return tmp_path / "tuned"


def write_table(folder: Path, problem: Problem = PROBLEM) -> Table:
    sha = hashlib.sha256(IMAGE).hexdigest()
    config = default_config(problem).with_(warps=8)
    kernel = Kernel(kernel_id("sm_90", sha), config.params, "ab" * 32, sha, "sm_90", 128, 8192, 0)
    timing = Timing(4096, False, 20.0, 19.0, 21.0, 12.0, {"triton": 200.0}, "memory")
    entry = BatchEntry(8, kernel.id, 5, 1.1, 1.05, (timing,))
    device = Device(TARGET.device_name, "sm_90", 132)
    table = Table(problem, 8, device, Provenance("2026-01-01T00:00:00Z", 0), "measured", (kernel,), (entry,), ())
    write(table, folder, {kernel.id: IMAGE})
    return table


def test_the_tables_kernel_races_where_there_is_one(folder: Path, tmp_path: Path) -> None:
    table = write_table(folder)
    ours, source = our_kernel(SHAPE, FORMAT, Bucket(8, 4096), TARGET, tmp_path / "build")
    assert source == "table" and ours.name == OURS and ours.splits == 5
    assert ours.config == table.kernels[0].config(PROBLEM)
    assert ours.cubin is not None and ours.cubin.read_bytes() == IMAGE
    assert not (tmp_path / "build").exists()  # nothing was compiled


def test_a_table_of_another_device_is_not_ours(folder: Path, tmp_path: Path) -> None:
    write_table(folder)
    other = replace(TARGET, device_name="NVIDIA something else")
    ours, source = our_kernel(Shape(64, 8, 2), FORMAT, Bucket(2, 16384), other, tmp_path / "build")
    assert source == "default"
    assert ours.config == default_config(Problem("decode", 64, 4, FORMAT))
    assert ours.cubin is not None and ours.cubin.read_bytes().startswith(b"\x7fELF")
    assert ours.splits > 1  # two long requests on 132 SMs


def test_a_damaged_table_is_an_error_and_not_a_default(folder: Path, tmp_path: Path) -> None:
    write_table(folder)
    (path,) = folder.glob("*.json")
    path.write_text(path.read_text()[:100])
    with pytest.raises(TunerError, match="JSON"):
        our_kernel(SHAPE, FORMAT, Bucket(8, 4096), TARGET, tmp_path)


def test_a_model_of_sliding_layers_alone_has_nothing_to_time() -> None:
    workload = load_model("gemma-4-31b")
    sliding = tuple((s, n) for s, n in workload.shapes if s.sliding)
    assert sliding and len(sliding) < len(workload.shapes)
    with pytest.raises(TunerError, match="every layer of gemma"):
        bench_model(Workload("gemma", sliding, workload.buckets), FORMAT, [1], 1024, TARGET)


def test_without_a_gpu_the_bucket_and_the_reason_are_named(folder: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: this is the message without one")
    write_table(folder)
    with pytest.raises(TunerError, match=r"b8_c4096: error: no NVIDIA GPU"):
        bench_model(load_model("llama-3.1-8b"), FORMAT, [8], 4096, TARGET, root=tmp_path)
