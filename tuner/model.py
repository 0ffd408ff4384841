"""The static model of a GPU: time of a launch from what its CTAs cost, how many run at once, and their bytes.

time = launch + max(memory, issue, shared memory, matrix, latency) + reduction, the maximum slightly smoothed, so that
of two kernels with the same bottleneck the one with less other work comes first, where

* memory: bytes / min(read bandwidth, bytes in flight / latency) (Little's law), wave by wave;
* issue, shared, matrix: the busiest SM's work in the loop and around it, over the rate of the unit;
* latency: the longest chain of one CTA's steps after another, each at least its stall cycles, and at least its
  share of a trip to memory with the tiles that it keeps in flight.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import lru_cache

from tuner.errors import UsageError
from tuner.pipes import SCHEDULERS, Cycles
from tuner.targets import Target, get_target

LATENCY_US = {"sm_90": 0.8, "sm_100": 0.85, "sm_120": 0.65, "sm_121": 0.9}
"""A trip to DRAM under load."""
_LAUNCH_US = 2.5  # one kernel in a CUDA graph, from start to end of an empty one
_NEXT_KERNEL_US = 1.5  # each further kernel of the same graph
_COLD_TRIPS = 3  # dependent trips to memory before the first product: lengths, block table, slots
_SHARPNESS = 5.0  # exponent of the smoothed maximum: a second term of equal size adds 15%, one of half the size 0.6%
_MAX_SIMULATED_CTAS = 4096


@dataclass(frozen=True)
class Prediction:
    """Time of one call and the terms it is made of, in microseconds; the largest term names the ``bottleneck``.

    ``occupancy`` is resident warps over the SM's maximum, ``waves`` the CTAs over what the GPU holds at once.
    """

    time_us: float
    memory_us: float
    issue_us: float
    shared_us: float
    matrix_us: float
    latency_us: float
    reduction_us: float
    overhead_us: float
    bottleneck: str
    occupancy: float
    ctas_per_sm: int
    waves: float
    evidence: str = "predicted"


@dataclass(frozen=True)
class Launch:
    """What a call does. ``ctas``: (how many, steps of each) in launch order; costs are per warp."""

    warps: int
    registers: int
    shared_bytes: int
    ctas: tuple[tuple[int, int], ...]
    step: Cycles
    once: Cycles
    tiles_in_flight: int
    bytes_in_flight: float
    memory_bytes: float
    reduction_us: float
    kernels: int
    cluster: int = 1


@lru_cache(maxsize=4096)
def busiest(ctas: tuple[tuple[int, int], ...], places: int) -> float:
    """Steps of the place that ends last, where CTAs go in order to the place that is free first."""
    number = sum(n for n, _ in ctas)
    sizes = {steps for _, steps in ctas}
    if len(sizes) == 1:
        return -(-number // places) * sizes.pop()
    if number > _MAX_SIMULATED_CTAS:
        # So many even out but for the last ones.
        return sum(n * steps for n, steps in ctas) / places + max(sizes) / 2
    ends = [0] * min(places, number)
    for n, steps in ctas:
        for _ in range(n):
            heapq.heapreplace(ends, ends[0] + steps)
    return max(ends)


def model(launch: Launch, target: Target) -> Prediction:
    """Time of ``launch`` on ``target``. Raises UsageError where a CTA does not fit, or for an unknown architecture."""
    get_target(target.arch)
    resident = target.resident_ctas(launch.warps, launch.registers, launch.shared_bytes)
    if resident < 1:
        raise UsageError(
            f"a CTA of {launch.warps} warps, {launch.registers} registers and {launch.shared_bytes} bytes of shared "
            f"memory does not fit on {target.arch}: choose a smaller configuration"
        )
    latency_us = LATENCY_US[target.arch]
    cycle_us = 1.0 / target.clock_mhz
    number = sum(n for n, _ in launch.ctas)
    slots = target.held_ctas(resident, launch.cluster)
    waves = number / slots

    on_sm = busiest(launch.ctas, target.sms) * launch.warps
    starts_on_sm = -(-number // target.sms) * launch.warps
    total = launch.step.times(on_sm).plus(launch.once.times(starts_on_sm))
    # Fewer warps than schedulers leave schedulers idle.
    busy = min(SCHEDULERS, launch.warps * min(resident, -(-number // target.sms)))
    issue_us = total.issue / busy * cycle_us

    trip = latency_us / cycle_us
    step = max(launch.step.stall, (launch.step.stall + trip) / launch.tiles_in_flight)
    rounds = -(-number // slots)
    chain_us = (busiest(launch.ctas, slots) * step + rounds * (launch.once.stall + trip)) * cycle_us

    memory_us = 0.0
    for ctas in [slots] * int(waves) + [number % slots]:
        if ctas:
            flying = ctas * launch.bytes_in_flight / latency_us
            bandwidth = min(target.bandwidth_gbps * 1e3, flying)
            memory_us += launch.memory_bytes * ctas / number / bandwidth
    terms = {
        "memory": memory_us,
        "issue": issue_us,
        "shared": total.shared * cycle_us,
        "matrix": total.matrix * cycle_us,
        "latency": chain_us,
    }
    overhead_us = _LAUNCH_US + (launch.kernels - 1) * _NEXT_KERNEL_US + _COLD_TRIPS * latency_us
    longest = sum(t**_SHARPNESS for t in terms.values()) ** (1 / _SHARPNESS)
    parts = terms | {"reduction": launch.reduction_us, "launch": overhead_us}
    return Prediction(
        time_us=overhead_us + longest + launch.reduction_us,
        memory_us=memory_us,
        issue_us=issue_us,
        shared_us=terms["shared"],
        matrix_us=terms["matrix"],
        latency_us=chain_us,
        reduction_us=launch.reduction_us,
        overhead_us=overhead_us,
        bottleneck=max(parts, key=lambda n: parts[n]),
        occupancy=min(1.0, resident * launch.warps / target.max_warps),
        ctas_per_sm=resident,
        waves=waves,
    )
