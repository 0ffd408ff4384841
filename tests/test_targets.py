"""tuner.targets: the table, the attached device, names in files."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from gpus import H100

from tuner.errors import UsageError
from tuner.targets import ARCHS, TARGETS, attached, describe, device_slug, get_target


@pytest.mark.parametrize("arch", ARCHS)
def test_table_is_consistent(arch: str) -> None:
    target = get_target(arch)
    assert target is TARGETS[arch] and target.arch == arch
    assert target.bandwidth_gbps < target.peak_gbps
    assert target.shared_kb_per_cta < target.shared_kb_per_sm
    assert target.shared_bytes_per_cta == 1024 * target.shared_kb_per_cta
    assert target.shared_bytes_per_sm == 1024 * target.shared_kb_per_sm
    assert target.max_warps % target.max_ctas == 0


def test_unknown_arch_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"sm_70.*expected one of sm_90, sm_100, sm_120, sm_121"):
        get_target("sm_70")


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H200", "NVIDIA_H200"),
        ("NVIDIA H200 NVL", "NVIDIA_H200"),
        ("NVIDIA GH200 480GB", "NVIDIA_GH200_480GB"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA_H100_80GB_HBM3"),
        ("NVIDIA GB10", "NVIDIA_GB10"),
        ("Quadro RTX 6000/8000", "Quadro_RTX_6000_8000"),
    ],
)
def test_device_slug(name: str, slug: str) -> None:
    assert device_slug(name) == slug


def test_device_of_a_known_arch_keeps_the_arch_facts_and_its_own() -> None:
    target = describe(H100)
    table = TARGETS["sm_90"]
    assert (target.arch, target.max_warps, target.registers) == ("sm_90", table.max_warps, table.registers)
    assert (target.device_name, target.sms, target.l2_mb, target.clock_mhz) == (H100.name, 132, 50, 1980)
    # Datasheet of the H100 SXM: 3.35 TB/s.
    assert target.peak_gbps == pytest.approx(3352, rel=1e-3)
    assert target.bandwidth_gbps / target.peak_gbps == pytest.approx(table.bandwidth_gbps / table.peak_gbps)


def test_bandwidth_stays_the_tables_where_it_was_measured_or_the_driver_is_silent() -> None:
    table = TARGETS["sm_90"]
    for facts in (replace(H100, name="NVIDIA H200"), replace(H100, memory_clock_khz=0)):
        assert (describe(facts).peak_gbps, describe(facts).bandwidth_gbps) == (table.peak_gbps, table.bandwidth_gbps)
    assert describe(replace(H100, clock_khz=0)).clock_mhz == table.clock_mhz


def test_device_without_facts_is_refused() -> None:
    with pytest.raises(UsageError, match="sm_80"):
        describe(replace(H100, capability=(8, 0)))


def test_no_such_device() -> None:
    assert attached(device=1_000) is None


@pytest.mark.gpu
def test_attached_device() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    target = attached()
    assert target is not None
    assert target.device_name == torch.cuda.get_device_name(0)
    assert target.sms == torch.cuda.get_device_properties(0).multi_processor_count
    assert 500 < target.clock_mhz < 4000
    assert target.shared_kb_per_cta >= 99


def test_import_needs_no_torch() -> None:
    code = "import sys, tuner.targets, tuner.workload, tuner.formats; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("cluster", "held"), [(1, 132), (2, 132), (4, 120), (8, 112)])
def test_clusters_do_not_fill_a_gpu(cluster: int, held: int) -> None:
    """What an H200 was seen to hold; elsewhere as much of it, in whole CTAs."""
    assert TARGETS["sm_90"].held_ctas(1, cluster) == held and TARGETS["sm_90"].held_ctas(2, cluster) == 2 * held
    assert TARGETS["sm_121"].held_ctas(1, cluster) == 48 * held // 132


def test_resident_ctas_and_what_limits_them() -> None:
    target = TARGETS["sm_90"]
    assert target.resident_ctas(4, 128, 0) == 4  # 65536 registers / (128 x 128)
    assert target.resident_ctas(1, 32, 0) == 32  # CTAs
    assert target.resident_ctas(16, 32, 0) == 4  # warps
    assert target.resident_ctas(1, 32, 100 * 1024) == 2  # shared memory
    assert target.resident_ctas(1, 32, 228 * 1024) == 0


# Registers per thread -> CTAs of one and of two warps, as cudaOccMaxActiveBlocksPerMultiprocessor of CUDA 13.0's
# cuda_occupancy.h answers for capability 9.0 without shared memory.
OCCUPANCY = {65: (28, 14), 72: (28, 14), 80: (24, 12), 96: (20, 10), 112: (16, 8), 136: (12, 6), 184: (8, 4)}


@pytest.mark.parametrize("registers", OCCUPANCY)
def test_registers_are_those_of_a_quarter_of_the_sm(registers: int) -> None:
    found = tuple(TARGETS["sm_90"].resident_ctas(warps, registers, 0) for warps in (1, 2))
    assert found == OCCUPANCY[registers]
