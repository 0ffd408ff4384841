"""How exact vLLM's own kernel is on the gate's cases: a kernel of ours may not be worse."""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

from torch import Tensor

from tuner.baselines import DecodeInputs, prepare, survey
from tuner.check import Level, decode_errors
from tuner.errors import TunerError
from tuner.reference import Case
from tuner.space import Problem

NAME = "vllm_triton"


@lru_cache(maxsize=16)
def vllm_errors(problem: Problem, device: str, level: Level, kv_heads: int) -> tuple[float, ...]:
    """``check.decode_errors`` of vLLM's unmodified kernel; () where it is not at hand for ``problem``.

    Only of level "full", which finalists pass: elsewhere Triton's compilations would cost more than the gate.
    """
    reason = next(a.reason for a in survey(device, problem) if a.name == NAME) if level == "full" else "not asked"
    if reason is not None:
        return ()

    from triton.errors import TritonError

    def run(case: Case, out: Tensor) -> None:
        call: Any = prepare(NAME, DecodeInputs.of(case))
        try:
            result = call()
        except (TypeError, ValueError, NotImplementedError, AssertionError, TritonError) as error:
            # A version with other parameters, one that refuses the case, or whose code Triton does not compile.
            raise TunerError(f"{type(error).__name__}: {error}") from error
        out.copy_(result)

    try:
        return decode_errors(run, problem, device=device, level=level, kv_heads=kv_heads)
    except TunerError as error:
        print(f"vLLM's own kernel sets no bar: {error}", file=sys.stderr)
        return ()
