"""How long an SM's units are busy with given instructions: the machine half of the static model.

Rates per SM and clock follow the throughput table of the CUDA programming guide (results per clock and SM: FP32 128,
integer and logic 64, conversions and transcendentals 16, shuffles 32; shared memory 128 bytes). Four schedulers issue
one warp instruction per clock each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tuner.sass import access_bytes
from tuner.targets import Target, get_target

SCHEDULERS = 4
_ALU = {
    *("IADD3", "IADD", "VIADD", "LOP3", "PLOP3", "SHF", "PRMT", "ISETP", "LEA", "SEL", "FSEL", "FSETP", "FMNMX"),
    *("FMNMX3", "IMNMX", "VIMNMX", "VIADDMNMX", "IABS", "SGXT", "BMSK", "MOV", "F2FP", "HMNMX2", "HSETP2", "VABSDIFF"),
}
_FMA = {"FFMA", "FADD", "FMUL", "IMAD", "IDP", "HFMA2", "HADD2", "HMUL2"}
_XU = {"MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "FLO", "BREV", "I2I", "F2IP", "I2IP"}
_DATA_PATH = {
    *("LDS", "STS", "LDSM", "STSM", "ATOMS", "LDGSTS", "SHFL"),
    *("LDG", "STG", "LD", "ST", "LDL", "STL", "RED", "ATOM", "ATOMG"),
}
_MATRIX_FLOPS = {"16816": 4096, "1688": 2048, "16832": 8192}


_ALU_CYCLES, _XU_CYCLES = 2.0, 8.0  # of a scheduler per warp instruction: 16 and 4 lanes of 32
# Share of the datasheet's matrix rate that mma.sync reaches. sm_90 needs wgmma for all of it, sm_100 tcgen05.
_MMA_SHARE = {"sm_90": 0.62, "sm_100": 0.25, "sm_120": 1.0, "sm_121": 1.0}


@dataclass(frozen=True)
class Cycles:
    """What one warp's instructions cost. ``issue``: cycles of its scheduler; ``stall``: of the warp itself, were it
    alone and never waiting for memory; ``shared``, ``matrix``: of the SM's shared-memory path and matrix units."""

    issue: float
    stall: float
    shared: float
    matrix: float

    def times(self, n: float) -> Cycles:
        return Cycles(self.issue * n, self.stall * n, self.shared * n, self.matrix * n)

    def plus(self, other: Cycles) -> Cycles:
        return Cycles(
            self.issue + other.issue,
            self.stall + other.stall,
            self.shared + other.shared,
            self.matrix + other.matrix,
        )


def _path_cycles(opcode: str) -> float:
    """Cycles of the SM's 128-byte path for one warp-wide access or shuffle."""
    base, *modifiers = opcode.split(".")
    if base == "SHFL":
        return 1.0
    if base in ("LDSM", "STSM"):
        return float(next((int(m) for m in modifiers if m in ("2", "4")), 1))
    return max(1.0, access_bytes(opcode) / 4)


def cost(opcodes: Mapping[str, int], stall_cycles: float, target: Target) -> Cycles:
    """Cost of a histogram of complete opcodes. Raises UsageError for an architecture without rates."""
    mma_share = _MMA_SHARE[get_target(target.arch).arch]
    issue = alu = fma = xu = shared = flops = 0.0
    for opcode, n in opcodes.items():
        base, *modifiers = opcode.split(".")
        issue += n
        if base in _ALU:
            alu += n * _ALU_CYCLES
        elif base in _FMA:
            fma += n
        elif base in _XU:
            xu += n * _XU_CYCLES
        elif base in _DATA_PATH:
            shared += n * _path_cycles(opcode)
        elif base == "HMMA":
            flops += n * next((f for m, f in _MATRIX_FLOPS.items() if m in modifiers), 4096)
    per_cycle = target.bf16_tflops * 1e6 / target.clock_mhz / target.sms * mma_share
    return Cycles(max(issue, alu, fma, xu), stall_cycles, shared, flops / per_cycle)
