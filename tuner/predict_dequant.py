"""Time of a dequantisation from its machine code: compressed rows read, bf16 rows written, instructions per row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tuner.build import Built
from tuner.errors import UsageError
from tuner.formats import SlotLayout
from tuner.geometry import dequant_geometry
from tuner.model import Launch, Prediction, model
from tuner.pipes import Cycles, cost
from tuner.sass import Loop, SassFacts, access_bytes
from tuner.space import Config
from tuner.space.dequant import shape as cover_of
from tuner.targets import Target
from tuner.workload import Bucket, Shape, bf16_bytes, cache_bytes

BLOCK_SIZE = 16
"""Tokens per block that times are predicted for: what kernels are timed with."""
_NONE = Cycles(0.0, 0.0, 0.0, 0.0)
_SIDES = 2


def row_loops(sass: SassFacts) -> list[Loop]:
    """The innermost loops that write rows: one for keys and one for values, or one for both in turn, or none where a
    CTA takes one step. Each twice where there is another for outputs and blocks that are not of the usual kind."""
    writing = [x for x in sass.loops if _widest_store(x.opcodes) >= 4]
    return [x for x in writing if not any(x.contains(other) for other in writing)]


def usual(loops: Sequence[Loop]) -> list[Loop]:
    """Those of ``loops`` that a cache and an output of the usual layout go through: the ones without narrow stores, or
    all where each has a branch for them."""
    return [x for x in loops if not any(map(_is_narrow, x.opcodes))] or list(loops)


def predict_dequant(
    config: Config, built: Built, sass: SassFacts, target: Target, shape: Shape, bucket: Bucket
) -> Prediction:
    """Predicted time of one call that decodes keys and values of every live token.

    Raises UsageError where cubin and target are of different architectures, or a CTA does not fit on the target.
    """
    if built.arch != target.arch:
        raise UsageError(f"the cubin is for {built.arch}, the target is {target.arch}: build it for {target.arch}")
    layout, cover = config.problem.layout, cover_of(config)
    every = row_loops(sass)
    loops = usual(every)
    # Keys and values one after the other, or each by half of the warps.
    sides = 1 if config["divide"] == "planes" else _SIDES
    rows = BLOCK_SIZE * shape.kv_heads
    geometry = dequant_geometry(config, entries=1, block_size=BLOCK_SIZE, kv_heads=shape.kv_heads)
    ctas_per_block = geometry.grid[0]
    active = rows / (ctas_per_block * cover.slots)

    step, once = _NONE, _executed(sass.opcodes, sass.stall_cycles, target)
    for loop in every:
        inside = _executed(loop.opcodes, loop.stall_cycles, target)
        once = once.plus(inside.times(-1.0))
        if loop in loops:
            step = step.plus(inside.times(active / len(loops)))
    if not loops:
        # With bulk copies the one step stands there twice, too.
        once = once.times(active * sides / _SIDES / (2 if config["load"] == "bulk" else 1))

    blocks = sum(-(-tokens // BLOCK_SIZE) for tokens in bucket.lengths())
    read, written = cache_bytes(shape, layout, bucket), bf16_bytes(shape, bucket)
    buffers = 2 if config["load"] == "staged" and config["steps"] > 1 else 1
    passes = config["warps"] // config["dim_warps"] * config["rows"] * cover.rows_per_pass
    in_flight = buffers * passes * active * layout.token_bytes / _SIDES
    if config["load"] == "bulk":  # keys and values of all steps at once
        buffers, in_flight = sides * config["steps"], cover.slots * active * layout.token_bytes
    launch = Launch(
        warps=config["warps"],
        registers=built.registers,
        shared_bytes=built.shared_bytes + geometry.shared_bytes,
        ctas=((blocks * ctas_per_block, sides * config["steps"]),),
        step=step,
        once=once,
        tiles_in_flight=buffers,
        # Writes wait for nothing: what flows is what the reads in flight allow, and the writes that follow them.
        bytes_in_flight=in_flight * (read + written) / read,
        memory_bytes=read + written,
        reduction_us=0.0,
        kernels=1,
    )
    return model(launch, target)


def predict_triton_dequant(
    kernels: Sequence[tuple[SassFacts, int]],
    target: Target,
    shape: Shape,
    layout: SlotLayout,
    bucket: Bucket,
    *,
    rows: int,
    warps: int,
) -> float:
    """Predicted time in us of the Triton twin: one kernel for the keys, then one for the values.

    ``kernels``: machine code and dynamic shared memory of each; ``rows`` tokens and ``warps`` per program.
    Raises UsageError where a CTA does not fit.
    """
    programs = sum(-(-tokens // rows) for tokens in bucket.lengths()) * shape.kv_heads
    memory_bytes = (cache_bytes(shape, layout, bucket) + bf16_bytes(shape, bucket)) / len(kernels)
    time_us = 0.0
    for number, (sass, shared_bytes) in enumerate(kernels):
        launch = Launch(
            warps=warps,
            registers=sass.registers,
            shared_bytes=sass.shared_bytes + shared_bytes,
            ctas=((programs, 1),),
            step=_NONE,
            once=_executed(sass.opcodes, sass.stall_cycles, target),
            tiles_in_flight=1,
            bytes_in_flight=rows * (layout.token_bytes / _SIDES + 2 * shape.head_dim),
            memory_bytes=memory_bytes,
            reduction_us=0.0,
            kernels=len(kernels),
        )
        p = model(launch, target)
        time_us += p.time_us if number == 0 else p.time_us - p.overhead_us
    return time_us


def _executed(opcodes: Mapping[str, int], stall_cycles: float, target: Target) -> Cycles:
    """Cost without the branches for odd addresses and misaligned outputs, which a cache of the usual layout never
    takes: single bytes loaded, single channels stored, and an instruction that packs or unpacks for each."""
    wide = _widest_store(opcodes) >= 4
    unused = {o for o in opcodes if _is_narrow(o)} if wide else set()
    left = {o: n for o, n in opcodes.items() if o not in unused}
    packing = sum(opcodes[o] for o in unused)
    for name in [o for o in left if o.partition(".")[0] in ("PRMT", "LOP3", "SHF")]:
        taken = min(packing, left[name])
        left[name] -= taken
        packing -= taken
    share = sum(left.values()) / max(1, sum(opcodes.values()))
    return cost(left, stall_cycles * share, target)


def _is_narrow(opcode: str) -> bool:
    base = opcode.partition(".")[0]
    return (base == "LDG" and access_bytes(opcode) == 1) or (base == "STG" and access_bytes(opcode) == 2)


def _widest_store(opcodes: Mapping[str, int]) -> int:
    return max((access_bytes(o) for o in opcodes if o.partition(".")[0] == "STG"), default=0)
