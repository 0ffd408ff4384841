"""GPUs as their drivers describe them."""

from __future__ import annotations

from tuner.targets import DeviceFacts

H100 = DeviceFacts(
    name="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    sms=132,
    l2_bytes=50 * 2**20,
    shared_bytes_per_sm=228 * 1024,
    shared_bytes_per_cta=227 * 1024,
    clock_khz=1_980_000,
    memory_clock_khz=2_619_000,
    memory_bus_bits=5120,
)
