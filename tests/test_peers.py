"""The uncompressed peers' own arithmetic on the CPU, and what is said where a peer is not at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tuner.baselines import DecodeInputs, attention, vllm_triton
from tuner.errors import TunerError
from tuner.formats import slot_layout
from tuner.reference import synthetic_cache
from tuner.space import Problem

FORMAT = "turboquant_4bit_nc"


def problem(head_dim: int = 128, cache_format: str = FORMAT) -> Problem:
    return Problem("decode", head_dim, 4, cache_format)


def inputs(block_size: int = 32) -> tuple[DecodeInputs, torch.Tensor]:
    """Inputs with a dense cache, and that cache's keys [blocks, block_size, Hk, D]."""
    case = synthetic_cache(slot_layout(FORMAT, 64), (70, 0, 33), q_heads=8, kv_heads=2, block_size=block_size)
    key = torch.randn(case.kv_cache.shape[0], block_size, 2, 64).bfloat16()
    return DecodeInputs.of(case, lambda: (key, -key)), key


def test_pages_hold_the_tokens_in_their_order() -> None:
    given, dense = inputs()
    key, value, table = attention._pages(given)
    assert key.shape[1:] == (attention.PAGE_TOKENS, 2, 64) and torch.equal(value, -key)
    for row, length in enumerate(given.seq_lens.tolist()):
        token = torch.arange(length)
        block = given.block_table[row, token // given.block_size].long()
        page = table[row, token // attention.PAGE_TOKENS].long()
        assert torch.equal(key[page, token % attention.PAGE_TOKENS], dense[block, token % given.block_size])
    assert int(table.min()) >= 0 and int(table.max()) < len(key)  # entries that no token needs are pages, too


def test_fp8_scales_undo_the_division_per_head() -> None:
    x = torch.randn(100, 16, 2, 64)
    x[:, :, 1] *= 1000
    coded, scale = attention._to_fp8(x, dims=(0, 1, 3))
    assert coded.dtype == torch.float8_e4m3fn and scale.shape == (2,)
    assert coded.float().abs().amax((0, 1, 3)).tolist() == [attention.FP8_MAX] * 2
    error = (coded.float() * scale.view(1, 1, 2, 1) - x).norm() / x.norm()
    assert 0.001 < float(error) < 0.04  # three bits of mantissa
    zero, _ = attention._to_fp8(torch.zeros(2, 16, 1, 4), dims=(0, 1, 3))
    assert not zero.float().any()


def test_the_library_is_the_one_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "fa3.so"
    monkeypatch.setenv(attention.FA3_VARIABLE, str(library))
    assert attention.fa3_library() is None
    assert attention.FA3_VARIABLE in (attention.unavailable("fa3_bf16", "cuda", problem()) or "")
    library.write_bytes(b"")
    assert attention.fa3_library() == library
    assert attention.unavailable("fa3_bf16", "cpu", problem()) == "needs an NVIDIA GPU: the device is cpu"


def test_peers_say_why_they_cannot_run() -> None:
    assert attention.unavailable("sdpa_bf16", "cpu", problem(512)) is None
    assert "at most 256" in (attention.unavailable("fa3_fp8", "cuda", problem(512)) or "")
    with pytest.raises(TunerError, match="baseline fa3_bf16 is not available: "):
        attention.prepare("fa3_bf16", inputs()[0])


def test_vllms_kernel_from_sources_that_are_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert vllm_triton.unavailable("vllm_triton", "cpu", problem(128, "turboquant_seed")) == (
        "vLLM has no format turboquant_seed"
    )
    ops = tmp_path / "vllm/v1/attention/ops"
    ops.mkdir(parents=True)
    monkeypatch.setenv(vllm_triton.SOURCE_VARIABLE, str(tmp_path))
    for name in ("triton_turboquant_decode.py", "triton_decode_attention.py"):
        expected = f"{vllm_triton.SOURCE_VARIABLE}={tmp_path} has no vllm/v1/attention/ops/{name}"
        assert vllm_triton.unavailable("vllm_triton", "cuda", problem()) == expected
        with pytest.raises(TunerError, match=name):
            vllm_triton.load_launcher()
        with pytest.raises(TunerError, match="baseline vllm_triton is not available"):
            vllm_triton.prepare("vllm_triton", inputs()[0])
        (ops / name).write_text("")
    assert "has no" not in (vllm_triton.unavailable("vllm_triton", "cpu", problem()) or "")
