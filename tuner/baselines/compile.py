"""Our Triton kernels compiled ahead of time for a GPU that need not be here: machine code for the static model."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tuner.baselines.inputs import Constants, DequantConstants, TritonConstants, constants_for
from tuner.baselines.support import interpreted
from tuner.cubin import parse_cubin
from tuner.errors import TunerError, UsageError
from tuner.space.core import Problem

BLOCK_SIZE = 16
"""Tokens per block where the caller names none: it only decides shifts in the address arithmetic."""
_ALIGNED = [["tt.divisibility", 16]]
_PTX_TARGETS = {"sm_90": 90, "sm_100": 100, "sm_120": 120, "sm_121": 121}


@dataclass(frozen=True)
class TritonBinary:
    """One compiled kernel. ``role``: "stage1", "merge", "keys" or "values"; ``kernel`` is the entry's name.

    ``shared_bytes`` per CTA, ``registers`` and ``stack_bytes`` (spills included) per thread, ``warps`` per CTA.
    """

    role: str
    kernel: str
    arch: str
    cubin: Path
    registers: int
    shared_bytes: int
    stack_bytes: int
    warps: int


@dataclass(frozen=True)
class _Unit:
    role: str
    function: Any
    types: dict[str, str]
    constexprs: dict[str, int]
    warps: int
    stages: int


def compile_for(
    constants: Constants | None,
    problem: Problem,
    arch: str,
    *,
    block_size: int = BLOCK_SIZE,
    root: Path = Path("build"),
) -> tuple[TritonBinary, ...]:
    """The kernels of one call of baseline "triton" (op decode: stage1, merge) or "triton_dequant" (keys, values).

    ``constants`` None means as shipped. Nothing is compiled twice: results are kept under ``root``/triton by
    everything that decides them. Raises UsageError for constants or an architecture that do not fit, TunerError
    with the compiler's message where compilation fails.
    """
    if arch not in _PTX_TARGETS:
        raise UsageError(f"Triton kernels cannot be compiled for {arch!r}: expected one of {', '.join(_PTX_TARGETS)}")
    if interpreted():
        raise UsageError("TRITON_INTERPRET is set, so Triton compiles nothing: unset it")
    chosen = constants_for(problem.op, constants, problem)
    if problem.op == "decode":
        if problem.layout.format.separate_planes:
            raise UsageError(f"{problem.cache_format} has no fused Triton kernel: it is dequantised before attention")
        units = _decode_units(problem, chosen, block_size)
    else:
        units = _dequant_units(problem, chosen, block_size)
    return tuple(_compile(unit, arch, root) for unit in units)


def _decode_units(problem: Problem, constants: TritonConstants, block_size: int) -> tuple[_Unit, ...]:
    from tuner.baselines import triton_decode as kernels

    query = "*fp32" if problem.layout.format.rotates_query else "*bf16"
    stage1 = {
        "query": query,
        "kv_cache": "*u8",
        "block_table": "*i32",
        "seq_lens": "*i32",
        "centroids": "*fp32",
        "partials": "*fp32",
        "scale": "fp32",
    }
    merge = {"partials": "*fp32", "out": "*bf16", "seq_lens": "*i32"}
    return (
        _Unit(
            "stage1",
            kernels.decode_stage1,
            stage1,
            kernels.stage1_constexprs(problem, constants, block_size),
            constants.num_warps,
            constants.num_stages,
        ),
        _Unit(
            "merge",
            kernels.decode_merge,
            merge,
            kernels.merge_constexprs(problem, constants),
            kernels.MERGE_WARPS,
            kernels.MERGE_STAGES,
        ),
    )


def _dequant_units(problem: Problem, constants: DequantConstants, block_size: int) -> tuple[_Unit, ...]:
    from tuner.baselines import triton_dequant as kernels

    types = {
        "slots": "*u8",
        "block_table": "*i32",
        "seq_lens": "*i32",
        "centroids": "*fp32",
        "signs": "*fp32",
        "channels": "*i32" if problem.layout.outliers else "*fp32",
        "out": "*bf16",
    }
    return tuple(
        _Unit(
            role,
            kernels.dequantize_rows,
            types,
            kernels.constexprs(problem, constants, block_size, values=role == "values", by_block_id=False),
            constants.num_warps,
            constants.num_stages,
        )
        for role in ("keys", "values")
    )


def _signature(unit: _Unit) -> tuple[dict[str, str], dict[tuple[int], Any]]:
    """Type of every argument, and which are multiples of 16: what Triton's launcher would find at a typical call.

    Pointers and the strides of requests and blocks are; strides between slots are not.
    """
    signature, aligned = {}, {}
    for i, name in enumerate(unit.function.arg_names):
        kind = "constexpr" if name in unit.constexprs else unit.types.get(name, "i32")
        signature[name] = kind
        odd = (name == "slots" and unit.role == "values") or name in ("token_stride", "head_stride", "table_stride")
        if kind != "constexpr" and kind != "fp32" and not odd:
            aligned[(i,)] = _ALIGNED
    return signature, aligned


def _compile(unit: _Unit, arch: str, root: Path) -> TritonBinary:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, aligned = _signature(unit)
    source = ASTSource(unit.function, signature, constexprs=unit.constexprs, attrs=aligned)
    options = {"num_warps": unit.warps, "num_stages": unit.stages, "enable_fp_fusion": True}
    identity = f"{triton.__version__} {source.hash()} {unit.role} {arch} {sorted(options.items())}"
    folder = root / "triton" / arch / hashlib.sha256(identity.encode()).hexdigest()[:32]
    facts_path = folder / "facts.json"
    if not facts_path.is_file():
        try:
            kernel = triton.compile(source, target=GPUTarget("cuda", _PTX_TARGETS[arch], 32), options=options)
        except Exception as error:  # Triton raises many kinds, RuntimeError for ptxas
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise TunerError(f"Triton cannot compile {unit.role} for {arch}: {lines[0]}") from error
        cubin: bytes = kernel.asm["cubin"]
        facts = parse_cubin(cubin, f"what Triton made of {unit.role}").kernel(kernel.metadata.name)
        binary = TritonBinary(
            role=unit.role,
            kernel=kernel.metadata.name,
            arch=arch,
            cubin=folder / "kernel.cubin",
            registers=facts.registers,
            shared_bytes=int(kernel.metadata.shared),
            stack_bytes=facts.stack_bytes,
            warps=unit.warps,
        )
        _publish(folder, cubin, {k: v for k, v in asdict(binary).items() if k != "cubin"})
    data = json.loads(facts_path.read_text())
    return TritonBinary(cubin=folder / "kernel.cubin", **data)


def _publish(folder: Path, cubin: bytes, facts: Mapping[str, Any]) -> None:
    """Writes both files whole or not at all; the facts last, since they say that the folder is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("kernel.cubin", cubin), ("facts.json", json.dumps(facts, indent=1).encode())):
        handle, temporary = tempfile.mkstemp(dir=folder)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, folder / name)
