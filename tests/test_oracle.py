"""The reference against an independent implementation: vLLM's unmodified Triton kernels, interpreted on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from vllm_source import source

from tuner.formats import HEAD_DIMS, VLLM_PRESETS

TESTS = Path(__file__).parent


@cache
def measurements(name: str) -> dict[str, dict[str, float]]:
    """What oracle_child.py measures for one format, per head dim; skips without vLLM's sources."""
    root, reason = source()
    if root is None:
        pytest.skip(reason)
    path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    child = subprocess.run(
        [sys.executable, TESTS / "oracle_child.py", root, name],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    results: dict[str, dict[str, float]] = json.loads(child.stdout)
    return results


@pytest.mark.parametrize("name", VLLM_PRESETS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
class TestAgainstVllm:
    def test_levels(self, name: str, head_dim: int) -> None:
        assert measurements(name)[str(head_dim)]["level_error"] < 1e-6

    def test_stored_bytes(self, name: str, head_dim: int) -> None:
        m = measurements(name)[str(head_dim)]
        # A rotated coefficient that falls on a threshold, or a norm halfway between two fp16 numbers, may round
        # either way, as vLLM sums in fp32: that moves a row by less than a quantisation step.
        assert m["key_bytes_differ"] <= 1e-3 * m["bytes"]
        assert m["key_error"] < 0.05
        assert m["value_bytes_differ"] == 0
        assert m["value_error"] == 0
        assert m["written_elsewhere"] == 0

    def test_decode_attention(self, name: str, head_dim: int) -> None:
        # Rounding to fp16 alone costs 3e-4.
        assert measurements(name)[str(head_dim)]["output_error"] < 5e-4
