"""What our kernels are compared with: Triton kernels as they ship and tuned, vLLM's own, and bf16 attention.

    for name in available("cuda", problem):
        run = prepare(name, DecodeInputs.of(case))
        out = run()              # CUDA-graph safe: buffers were allocated by prepare()

Importing this package imports neither torch nor triton; the kernels' modules do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from tuner.baselines.inputs import (
    SHIPPED,
    TUNABLE,
    Constants,
    DecodeInputs,
    DequantConstants,
    TritonConstants,
)
from tuner.baselines.store_inputs import StoreInputs
from tuner.errors import UsageError
from tuner.space.core import Problem

Run = Callable[[], Any]
"""Enqueues the work on torch's current stream. Decode: returns out [B, Hq, D]. Dequant: (K, V). Store: nothing."""


@dataclass(frozen=True)
class Baseline:
    """One competitor. ``kind``: "triton" (ours, constants open), "vllm" (its own code) or "peer" (uncompressed
    cache). ``op``: "decode", "dequant" or "store". ``origin`` says whose code runs and how faithful it is."""

    name: str
    op: str
    kind: str
    origin: str
    module: str
    """Module of this package with ``unavailable(name, device, problem)`` and ``prepare(name, inputs, constants)``."""


@dataclass(frozen=True)
class Availability:
    """``reason`` is None where the baseline can run, else one line that says why not and what to do."""

    name: str
    reason: str | None


BASELINES: dict[str, Baseline] = {
    b.name: b
    for b in (
        Baseline("triton", "decode", "triton", "our Triton kernel in the structure that vLLM ships", "triton_decode"),
        Baseline("vllm_triton", "decode", "vllm", "vLLM's unmodified Triton kernel", "vllm_triton"),
        Baseline("sdpa_bf16", "decode", "peer", "torch SDPA on a contiguous bf16 cache", "attention"),
        Baseline("fa3_bf16", "decode", "peer", "vLLM's FlashAttention-3, paged bf16 cache", "attention"),
        Baseline("fa3_fp8", "decode", "peer", "vLLM's FlashAttention-3, paged fp8 cache", "attention"),
        Baseline("flashinfer_bf16", "decode", "peer", "FlashInfer, paged bf16 cache", "attention"),
        Baseline("triton_dequant", "dequant", "triton", "our Triton gather-free dequantisation", "triton_dequant"),
        Baseline("vllm_store", "store", "vllm", "vLLM's unmodified store: casts, norm, rotation, pack", "vllm_store"),
    )
}


def get_baseline(name: str) -> Baseline:
    """The baseline called ``name``; raises UsageError, naming the known ones, for any other."""
    try:
        return BASELINES[name]
    except KeyError:
        raise UsageError(f"unknown baseline {name!r}: expected one of {', '.join(BASELINES)}") from None


def tuned_name(name: str, constants: Constants) -> str:
    """``name`` with its constants spelt out, as "triton[block_kv=16,num_warps=2,...]": ``prepare`` takes it too."""
    return f"{name}[{','.join(f'{k}={v}' for k, v in asdict(constants).items())}]"


def split_name(name: str) -> tuple[str, Constants | None]:
    """Inverse of ``tuned_name``; a plain name has no constants. Raises UsageError for a misspelt one."""
    plain, bracket, rest = name.partition("[")
    if not bracket:
        return plain, None
    if get_baseline(plain).op not in SHIPPED:
        raise UsageError(f"baseline {plain} has no open constants: expected its plain name")
    try:
        values = {k: int(v) for k, v in (pair.split("=") for pair in rest.removesuffix("]").split(","))}
        return plain, type(SHIPPED[get_baseline(plain).op])(**values)
    except (ValueError, TypeError):
        example = tuned_name(plain, SHIPPED[get_baseline(plain).op])
        raise UsageError(f"cannot read the constants of baseline {name!r}: expected as in {example}") from None


def survey(device: Any, problem: Problem) -> tuple[Availability, ...]:
    """Every baseline of ``problem.op`` and why it cannot run on ``device`` (torch device or its name), if so."""
    return tuple(
        Availability(b.name, _module(b).unavailable(b.name, device, problem))
        for b in BASELINES.values()
        if b.op == problem.op
    )


def fingerprints() -> dict[str, str]:
    """Baselines that are somebody else's file, at hand and readable -> the first 16 hex digits of its SHA-256."""
    from tuner.baselines import attention, vllm_triton

    fa3 = attention.fa3_library()
    files = {"vllm_triton": vllm_triton.source_file(), "fa3_bf16": fa3, "fa3_fp8": fa3}
    digests = {f: _digest(f) for f in {f for f in files.values() if f is not None}}
    return {n: digest for n, f in files.items() if f is not None and (digest := digests[f])}


@cache
def _digest(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError:
        return None


def available(device: Any, problem: Problem) -> list[str]:
    """Names of the baselines of ``problem.op`` that can run on ``device``; ``survey`` says why others cannot."""
    return [a.name for a in survey(device, problem) if a.reason is None]


def prepare(name: str, inputs: DecodeInputs | StoreInputs, constants: Constants | None = None) -> Run:
    """Allocates what ``name`` needs and returns a call that may be captured in a CUDA graph.

    ``constants`` only for kind "triton"; None means as shipped, or as ``name`` spells them (``tuned_name``). Kinds
    "triton" and "vllm" reread query, lengths, block table and cache at each run; the peers' cache is a copy.
    Raises UsageError for an unknown name or constants that do not fit, TunerError where the baseline is not
    available.
    """
    name, spelt = split_name(name)
    constants = constants or spelt
    baseline = get_baseline(name)
    if constants is not None and baseline.kind != "triton":
        raise UsageError(f"baseline {name} has no open constants: expected constants=None")
    run: Run = _module(baseline).prepare(name, inputs, constants)
    return run


def _module(baseline: Baseline) -> Any:
    return import_module(f"tuner.baselines.{baseline.module}")


__all__ = [
    "BASELINES",
    "SHIPPED",
    "TUNABLE",
    "Availability",
    "Baseline",
    "Constants",
    "DecodeInputs",
    "DequantConstants",
    "StoreInputs",
    "TritonConstants",
    "available",
    "get_baseline",
    "prepare",
    "split_name",
    "survey",
    "tuned_name",
]
