"""Facts of a GPU that constraints, the static model and reports need.

The attached device is queried where it can be; the table holds the others. Sources: the CUDA programming guide's
table of technical specifications per compute capability, vendor datasheets, and measured read bandwidth where a
comment says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from tuner.errors import UsageError


@dataclass(frozen=True)
class Target:
    """One GPU. ``bandwidth_gbps`` is what a read-only kernel reaches, ``peak_gbps`` the datasheet's figure (10^9 bytes/s)."""

    arch: str
    device_name: str
    sms: int
    max_warps: int
    max_ctas: int
    registers: int
    shared_kb_per_sm: int
    shared_kb_per_cta: int
    l2_mb: int
    peak_gbps: float
    bandwidth_gbps: float
    clock_mhz: int
    bf16_tflops: float
    """Dense tensor-core rate of mma.sync's operand types, datasheet."""

    @property
    def shared_bytes_per_cta(self) -> int:
        return self.shared_kb_per_cta * 1024

    @property
    def shared_bytes_per_sm(self) -> int:
        return self.shared_kb_per_sm * 1024


TARGETS: dict[str, Target] = {
    t.arch: t
    for t in (
        # arch, name, SMs, warps, CTAs, registers, shared SM/CTA, L2, peak, read (measured where known), clock, bf16
        Target("sm_90", "NVIDIA H200", 132, 64, 32, 65536, 228, 227, 60, 4800, 4300, 1755, 989),
        Target("sm_100", "NVIDIA B200", 148, 64, 32, 65536, 228, 227, 126, 7700, 6900, 1850, 2250),
        Target("sm_120", "NVIDIA GeForce RTX 5090", 170, 48, 24, 65536, 100, 99, 96, 1792, 1610, 2400, 209),
        Target("sm_121", "NVIDIA GB10", 48, 48, 24, 65536, 100, 99, 24, 273, 231, 2400, 92),
    )
}
ARCHS = tuple(TARGETS)


def get_target(arch: str) -> Target:
    """Facts of ``arch`` ("sm_121"). Raises UsageError for an architecture without facts."""
    try:
        return TARGETS[arch]
    except KeyError:
        raise UsageError(f"no facts about architecture {arch!r}: expected one of {', '.join(ARCHS)}") from None
