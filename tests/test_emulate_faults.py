"""The emulator finds every fault that a kernel can make, and says where it was made."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulated_sources import Faults, run_fault, source

from tuner.emulate import EmulationError, Launch, compile_many, emulate


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build")
    compile_many([source("faults.cu")], root=folder)
    return folder


@pytest.fixture
def fault(root):
    return lambda *args, **kw: run_fault(root, *args, **kw)


@pytest.mark.parametrize("size", [1, 15, 16, 129, 256])
@pytest.mark.parametrize("at", ["before", "after"])
def test_one_byte_outside_a_buffer(fault, size, at):
    data = np.zeros(size, np.uint8)
    assert not fault("read_byte", size - 1, data=data).any() and not fault("read_byte", 0, data=data).any()
    n = -1 if at == "before" else size
    with pytest.raises(EmulationError, match=rf"READ of size 1 at byte {n} of data, which has {size}; line \d+: "):
        fault("read_byte", n, data=data)


def test_a_view_stands_for_its_storage(fault):
    storage = torch.arange(64, dtype=torch.uint8)
    assert fault("read_byte", -10, data=storage[10:12])[0] == 0
    assert fault("read_byte", 53, data=storage[10:20:3])[0] == 63
    with pytest.raises(EmulationError, match="at byte 64 of data, which has 64"):
        fault("read_byte", 54, data=storage[10:12])
    assert fault("read_byte", 53, data=storage.numpy()[10:20])[0] == 63


@pytest.mark.parametrize("entry", ["read_half", "load_half"])
def test_misaligned_half(fault, entry):
    assert fault(entry, 92)[0] == 93 << 8 | 92
    with pytest.raises(EmulationError, match=r"misaligned address .*short unsigned int.*; line \d+: p\.out.*p\.data"):
        fault(entry, 93)


@pytest.mark.parametrize("shared", [0, 1, 100, 128, 227 * 1024])
def test_one_byte_outside_shared_memory(fault, shared):
    if shared:
        assert fault("write_shared", shared - 1, shared=shared)[0] == 1
    for n in (-1, shared):
        with pytest.raises(EmulationError, match=r"WRITE of size 1; line \d+: smem\[p\.n\] = 1"):
            fault("write_shared", n, shared=shared)


def test_local_array_overrun(fault):
    with pytest.raises(EmulationError, match=r"index 4 out of bounds.*; line \d+: p\.out.*local"):
        fault("local_index", 4)


def test_missing_wait_reads_poison(fault):
    data = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(fault("missing_wait", 1), data.view(np.uint32)[:32])
    assert (fault("missing_wait", 0) == 0xFFFFFFFF).all()


def test_missing_sync_shows_under_some_seed(fault):
    expected = (np.arange(64) ^ 32) * 4 + 6000
    results = [fault("missing_sync", 0, block=64, seed=s) for s in range(4)]
    assert any((r != expected).any() for r in results)
    for seed in range(4):
        np.testing.assert_array_equal(fault("missing_sync", 1, block=64, seed=seed), expected)


@pytest.mark.parametrize(
    ("entry", "arguments", "message"),
    [
        ("divergent", {}, r"thread 7 is at sync_warp \(line \d+\), other lanes .* wait at shuffle_xor \(line \d+\)"),
        ("exits", {"n": 0}, r"thread 1 is at shuffle \(line \d+\), but 1 lanes of its warp have exited"),
        ("exits", {"n": 31}, r"thread 31 exits while 31 lanes of its warp wait at shuffle \(line"),
        ("deadlock", {"block": 64}, r"deadlock: 32 threads wait at sync_named .*, 32 threads wait at sync_cta"),
        ("barrier_count", {"n": 48}, r"sync_named: 48 threads, expected a multiple of 32"),
        ("copy_alignment", {"n": 8}, r"cp_async's source: misaligned: .* expected a multiple of 16; line \d+: "),
        ("copy_alignment", {"n": 256}, r"cp_async's source: heap-buffer-overflow.* at byte 256 of data"),
        ("copy_alignment", {"shared": 15}, r"cp_async's destination: 16 bytes at shared memory's byte 0"),
        ("copy_twice", {"n": 12}, r"data race in shared memory: two copies to byte 12 are in flight; line \d+: "),
        ("copy_valid", {"n": 5}, r"cp_async: 5 valid bytes, expected 0 to 4"),
        ("bulk_overrun", {"n": 208}, r"bulk_copy's source: heap-buffer-overflow.* at byte 256 of data"),
        ("bulk_overrun", {"n": 8}, r"bulk_copy's source: misaligned"),
        ("bulk_bytes", {"n": 8}, r"bulk_copy: 8 bytes, expected a positive multiple of 16"),
        ("bulk_bytes", {"n": 48}, r"deadlock: 1 threads wait at mbarrier_wait .*31 have exited"),
        ("bulk_bytes", {"n": 80}, r"deadlock: 1 threads wait at mbarrier_wait"),
        ("barrier_missing", {"n": 0}, r"mbarrier_wait: no mbarrier was initialised there"),
        ("barrier_overwritten", {"n": 1}, r"mbarrier_arrive: the mbarrier was overwritten"),
    ],
)
def test_misuse_is_named(fault, entry, arguments, message):
    with pytest.raises(EmulationError, match=message) as caught:
        fault(entry, **arguments)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{entry}, CTA (0, 0, 0), thread ")


def test_endless_kernel_times_out_and_leaves_buffers_alone(root):
    out = np.full(1, 7, np.uint32)
    with pytest.raises(EmulationError, match=r"no end after 0\.5 s"):
        emulate(source("faults.cu"), Launch("endless", (1, 1, 1), 32), Faults(), {"out": out}, root=root, timeout_s=0.5)
    assert out[0] == 7
