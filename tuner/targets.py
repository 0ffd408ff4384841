"""Facts of a GPU that constraints, the static model and reports need.

The attached device is queried where it can be; the table holds the others. Sources: the CUDA programming guide's
table of technical specifications per compute capability, vendor datasheets, and measured read bandwidth where a
comment says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tuner.errors import UsageError

RESERVED_SHARED_BYTES = 1024
"""What the system keeps of shared memory per CTA (sm_90 and later)."""
_REGISTER_UNIT = 256  # registers are allotted to a warp in units of this many
_SM_PARTS = 4  # warp schedulers, each with a register file of its own
_LEAST_REGISTERS = 16  # per thread, however few the kernel names
_PLAUSIBLE_GBPS = (100.0, 20000.0)  # drivers of integrated memories report nonsense, or nothing


_CLUSTERED_CTAS = {1: 132, 2: 132, 4: 120, 8: 112}
"""CTAs that an H200 held at once, one per SM, by the size of their clusters (docs/kernel-notes.md)."""


@dataclass(frozen=True)
class Target:
    """One GPU. ``bandwidth_gbps`` is what a read-only kernel reaches, ``peak_gbps`` the datasheet's figure.

    Both count 10^9 bytes per second.
    """

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

    def held_ctas(self, resident: int, cluster: int = 1) -> int:
        """CTAs that the GPU holds at once, ``resident`` on each SM, in clusters of ``cluster``.

        A cluster's CTAs are on one GPC, and GPCs are not filled by whole clusters. What was seen on an H200 with one
        CTA on each of its 132 SMs is scaled: other GPUs may have other GPCs, and more CTAs per SM may pack better.
        """
        return max(1, resident * self.sms * _CLUSTERED_CTAS[cluster] // 132)

    def resident_ctas(self, warps: int, registers: int, shared_bytes: int) -> int:
        """CTAs of ``warps`` warps that an SM holds at once, with ``registers`` per thread; 0 where one is too much."""
        per_warp = -(-max(registers, _LEAST_REGISTERS) * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
        # A warp's registers come from the part of the SM that issues it.
        warps_with_registers = _SM_PARTS * (self.registers // _SM_PARTS // per_warp)
        return min(
            self.max_warps // warps,
            self.max_ctas,
            warps_with_registers // warps,
            self.shared_bytes_per_sm // (shared_bytes + RESERVED_SHARED_BYTES),
        )


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


@dataclass(frozen=True)
class DeviceFacts:
    """What the driver says of a device. Memory clock and bus width are 0 where it does not know."""

    name: str
    capability: tuple[int, int]
    sms: int
    l2_bytes: int
    shared_bytes_per_sm: int
    shared_bytes_per_cta: int
    clock_khz: int
    memory_clock_khz: int
    memory_bus_bits: int


def describe(device: DeviceFacts) -> Target:
    """The target that ``device`` is: the facts of its architecture, corrected by what the driver says.

    Bandwidth is the table's for the table's own device; for another of the same architecture it follows from memory
    clock and bus width (two transfers per clock), with the same share reached by a read-only kernel.
    Raises UsageError for an architecture without facts.
    """
    known = get_target("sm_{}{}".format(*device.capability))
    target = replace(
        known,
        device_name=device.name,
        sms=device.sms,
        shared_kb_per_sm=device.shared_bytes_per_sm // 1024,
        shared_kb_per_cta=device.shared_bytes_per_cta // 1024,
        l2_mb=device.l2_bytes // 2**20,
        clock_mhz=device.clock_khz // 1000 or known.clock_mhz,
    )
    peak_gbps = 2 * device.memory_clock_khz * device.memory_bus_bits / 8 / 1e6
    is_known = device_slug(device.name) == device_slug(known.device_name)
    if is_known or not _PLAUSIBLE_GBPS[0] <= peak_gbps <= _PLAUSIBLE_GBPS[1]:
        return target
    return replace(target, peak_gbps=peak_gbps, bandwidth_gbps=peak_gbps * known.bandwidth_gbps / known.peak_gbps)


def attached(device: int = 0) -> Target | None:
    """The CUDA device with that index in this machine, None without one.

    Imports torch and initialises CUDA. Raises UsageError for an architecture without facts.
    """
    import torch

    if not 0 <= device < torch.cuda.device_count():
        return None
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack some of what it has
    return describe(
        DeviceFacts(
            name=properties.name,
            capability=(properties.major, properties.minor),
            sms=properties.multi_processor_count,
            l2_bytes=properties.L2_cache_size,
            shared_bytes_per_sm=properties.shared_memory_per_multiprocessor,
            shared_bytes_per_cta=properties.shared_memory_per_block_optin,
            # Newer versions of torch have these three.
            clock_khz=getattr(properties, "clock_rate", 0),
            memory_clock_khz=getattr(properties, "memory_clock_rate", 0),
            memory_bus_bits=getattr(properties, "memory_bus_width", 0),
        )
    )


def device_slug(name: str) -> str:
    """``name`` as it stands in file names, spelled as vLLM does: "NVIDIA GB10" -> "NVIDIA_GB10".

    Every member of the H200 family is NVIDIA_H200.
    """
    slug = name.replace(" ", "_").replace("/", "_")
    return "NVIDIA_H200" if "H200" in slug.split("_") else slug
