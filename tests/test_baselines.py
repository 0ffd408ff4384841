"""Baselines: registry, Triton kernels interpreted and compiled for absent GPUs, and on a GPU all of them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import triton_interpreted as cases
from tuner.baselines import (
    BASELINES,
    SHIPPED,
    TUNABLE,
    DecodeInputs,
    DequantConstants,
    TritonConstants,
    available,
    fingerprints,
    prepare,
    split_name,
    survey,
    tuned_name,
)
from tuner.baselines.compile import compile_for
from tuner.cubin import read_cubin
from tuner.errors import TunerError, UsageError
from tuner.formats import slot_layout
from tuner.reference import Case, dequantize, synthetic_cache
from tuner.space.core import Problem

ROOT = Path(__file__).parents[1]
DECODE = Problem("decode", 128, 4, "turboquant_4bit_nc")


@cache
def interpreted(family: str) -> dict[str, dict[str, float]]:
    """Results of one family of cases, run once, in a process whose Triton interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.triton_interpreted", family]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("case", cases.DECODE)
def test_decode_attends(case: str) -> None:
    limit = 3e-3 if "grouped" in case else 5e-4
    assert interpreted("decode")[case]["error"] < limit


@pytest.mark.parametrize("case", cases.DEQUANT)
def test_dequant_decodes_live_rows_and_nothing_else(case: str) -> None:
    result = interpreted("dequant")[case]
    assert result["error"] < 1e-6
    assert result["written"] == 0


@pytest.mark.parametrize("case", cases.VLLM)
def test_shipped_structure_equals_vllms_kernel(case: str) -> None:
    if not os.environ.get("WPH_VLLM_SOURCE"):
        pytest.skip("WPH_VLLM_SOURCE does not name a directory with vLLM's sources")
    result = interpreted("vllm")[case]
    assert result["error"] <= 1e-3 * result["size"]


@pytest.mark.parametrize("case", cases.STORE)
def test_vllms_store_writes_what_the_reference_writes(case: str) -> None:
    if not os.environ.get("WPH_VLLM_SOURCE"):
        pytest.skip("WPH_VLLM_SOURCE does not name a directory with vLLM's sources")
    result = interpreted("store")[case]
    assert result["error"] < 1e-3  # an index or two on a tie
    assert result["written"] == 0


def test_registry_imports_neither_torch_nor_triton() -> None:
    code = "import sys, tuner.baselines; sys.exit(any(m in sys.modules for m in ('torch', 'triton')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_shipped_constants_are_vllms_and_on_the_axes() -> None:
    assert SHIPPED["decode"] == TritonConstants(block_kv=4, num_warps=1, num_stages=1, splits=32, block_h=1)
    for op, axes in TUNABLE.items():
        assert all(getattr(SHIPPED[op], name) in values for name, values in axes.items())


def test_absent_baselines_say_why() -> None:
    reasons = {a.name: a.reason for a in survey("cpu", DECODE)}
    assert set(reasons) == {n for n, b in BASELINES.items() if b.op == "decode"}
    assert reasons["sdpa_bf16"] is None
    assert "needs an NVIDIA GPU" in str(reasons["triton"])
    assert available("cpu", DECODE) == ["sdpa_bf16"]


def test_reasons_name_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WPH_VLLM_SOURCE", str(tmp_path))
    monkeypatch.setenv("WPH_FA3_LIBRARY", str(tmp_path / "none.so"))
    reasons = {a.name: str(a.reason) for a in survey("cuda", DECODE)}
    assert "triton_turboquant_decode.py" in reasons["vllm_triton"]
    assert "WPH_FA3_LIBRARY" in reasons["fa3_bf16"]
    wide = {a.name: str(a.reason) for a in survey("cuda", Problem("decode", 512, 4, "turboquant_4bit_nc"))}
    assert "head dim 512" in wide["fa3_fp8"]
    seed = {a.name: str(a.reason) for a in survey("cuda", Problem("decode", 128, 4, "turboquant_seed"))}
    assert "dequantised before attention" in seed["triton"]
    assert "turboquant_seed" in seed["vllm_triton"]


@pytest.mark.parametrize("op", ["decode", "dequant"])
def test_names_spell_constants(op: str) -> None:
    name = "triton" if op == "decode" else "triton_dequant"
    assert split_name(tuned_name(name, SHIPPED[op])) == (name, SHIPPED[op])
    assert split_name(name) == (name, None)


@pytest.mark.parametrize("name", ["triton[block_kv=4]", "triton[block_kv=x]", "triton[", "nothing[rows=1]"])
def test_misspelt_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="expected"):
        split_name(name)


def small_case(cache_format: str, head_dim: int = 64) -> Case:
    return synthetic_cache(slot_layout(cache_format, head_dim), [3, 20], q_heads=4, kv_heads=2)


def test_bad_requests_are_refused() -> None:
    inputs = DecodeInputs.of(small_case("turboquant_4bit_nc"))
    with pytest.raises(UsageError, match="unknown baseline"):
        prepare("fastest", inputs)
    with pytest.raises(UsageError, match="no open constants"):
        prepare("sdpa_bf16", inputs, SHIPPED["decode"])
    with pytest.raises(UsageError, match="block_kv cannot be 5"):
        prepare("triton", inputs, TritonConstants(5, 1, 1, 32))
    with pytest.raises(UsageError, match="block_kv of at least 16"):
        prepare("triton", inputs, TritonConstants(8, 1, 1, 32, block_h=16))
    with pytest.raises(UsageError, match="DequantConstants, not TritonConstants"):
        prepare("triton_dequant", inputs, SHIPPED["decode"])
    with pytest.raises(TunerError, match="not available"):
        prepare("flashinfer_bf16", inputs)


@pytest.mark.parametrize("cache_format", ["turboquant_k3v4_nc", "turboquant_outlier"])
def test_sdpa_on_the_callers_dense_cache(cache_format: str) -> None:
    case = small_case(cache_format)

    def dense() -> tuple[torch.Tensor, torch.Tensor]:
        key, value = dequantize(case.kv_cache, case.codec)
        return key.nan_to_num().bfloat16(), value.nan_to_num().bfloat16()

    inputs = DecodeInputs.of(case, dense)
    out, expected = prepare("sdpa_bf16", inputs)().double(), case.expected()
    assert (out - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("arch", ["sm_90", "sm_121"])
def test_compiles_for_an_absent_gpu(arch: str, tmp_path: Path) -> None:
    stage1, merge = compile_for(None, DECODE, arch, root=tmp_path)
    assert (stage1.role, stage1.warps, merge.role, merge.warps) == ("stage1", 1, "merge", 4)
    assert stage1.arch == arch
    assert 32 <= stage1.registers <= 255
    assert stage1.stack_bytes == 0
    assert read_cubin(stage1.cubin).kernel(stage1.kernel).registers == stage1.registers
    written = stage1.cubin.stat().st_mtime_ns
    assert compile_for(None, DECODE, arch, root=tmp_path) == (stage1, merge)
    assert stage1.cubin.stat().st_mtime_ns == written
    keys, values = compile_for(None, Problem("dequant", 128, 1, "turboquant_seed"), arch, root=tmp_path)
    assert (keys.role, values.role) == ("keys", "values")


def test_other_constants_are_other_kernels(tmp_path: Path) -> None:
    narrow, _ = compile_for(TritonConstants(4, 1, 1, 8), DECODE, "sm_121", root=tmp_path)
    grouped, _ = compile_for(TritonConstants(16, 4, 2, 8, 16), DECODE, "sm_121", root=tmp_path)
    assert narrow.cubin != grouped.cubin
    assert grouped.shared_bytes > narrow.shared_bytes


def test_compilation_refuses_with_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="sm_75"):
        compile_for(None, DECODE, "sm_75", root=tmp_path)
    with pytest.raises(UsageError, match="dequantised before attention"):
        compile_for(None, Problem("decode", 128, 4, "turboquant_seed"), "sm_90", root=tmp_path)
    with pytest.raises(UsageError, match="DequantConstants"):
        compile_for(SHIPPED["dequant"], DECODE, "sm_90", root=tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UsageError, match="TRITON_INTERPRET"):
        compile_for(None, DECODE, "sm_90", root=tmp_path)


def gpu_case(cache_format: str, head_dim: int, lengths: list[int]) -> Case:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    layout = slot_layout(cache_format, head_dim)
    return synthetic_cache(layout, lengths, q_heads=16, kv_heads=4).to("cuda")


def relative_error(out: Any, case: Case) -> float:
    expected = case.expected()
    return float((out.double() - expected).norm() / expected.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [128, 256, 512])
@pytest.mark.parametrize("cache_format", ["turboquant_4bit_nc", "turboquant_k8v4"])
def test_every_available_baseline_attends_on_the_gpu(cache_format: str, head_dim: int) -> None:
    case = gpu_case(cache_format, head_dim, [1, 15, 700, 1024])
    inputs = DecodeInputs.of(case)
    for name in available("cuda", inputs.problem("decode")):
        assert relative_error(prepare(name, inputs)(), case) < (0.1 if name == "fa3_fp8" else 1e-2), name


@pytest.mark.gpu
@pytest.mark.parametrize("cache_format", ["turboquant_3bit_nc", "turboquant_seed", "turboquant_outlier"])
def test_dequant_on_the_gpu(cache_format: str) -> None:
    case = gpu_case(cache_format, 256, [0, 1, 100])
    inputs = DecodeInputs.of(case)
    for constants in (None, DequantConstants(8, 4, 2)):
        outputs = prepare("triton_dequant", inputs, constants)()
        for out, truth in zip(outputs, dequantize(case.kv_cache, case.codec), strict=True):
            rows = truth[case.block_table[2, :7].long()].flatten(0, 1)[:100]
            assert float((out[2, :100].double() - rows).norm() / rows.norm()) < 3e-3
            assert not out[0].any()
            assert not out[1, 1:].any()


@pytest.mark.gpu
def test_graph_replays_with_other_lengths() -> None:
    case = gpu_case("turboquant_4bit_nc", 128, [300, 40])
    for name in ("triton", "vllm_triton"):
        if name not in available("cuda", DecodeInputs.of(case).problem("decode")):
            continue
        run = prepare(name, DecodeInputs.of(case))
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()
        case.seq_lens.copy_(torch.tensor([17, 33]))
        graph.replay()
        assert relative_error(out, case) < 1e-2
        case.seq_lens.copy_(torch.tensor([300, 40]))


def test_what_is_somebody_elses_file_is_known_by_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = tmp_path / "vllm/v1/attention/ops"
    ops.mkdir(parents=True)
    (ops / "triton_turboquant_decode.py").write_text("kernel")
    (tmp_path / "fa3.so").write_text("library")
    monkeypatch.setenv("WPH_VLLM_SOURCE", str(tmp_path))
    monkeypatch.setenv("WPH_FA3_LIBRARY", str(tmp_path / "fa3.so"))
    library = hashlib.sha256(b"library").hexdigest()[:16]
    kernel = hashlib.sha256(b"kernel").hexdigest()[:16]
    assert fingerprints() == {"vllm_triton": kernel, "fa3_bf16": library, "fa3_fp8": library}
    monkeypatch.setenv("WPH_VLLM_SOURCE", str(tmp_path / "nowhere"))
    monkeypatch.setenv("WPH_FA3_LIBRARY", str(tmp_path / "none.so"))
    assert fingerprints() == {}
