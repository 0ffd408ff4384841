from __future__ import annotations

import ctypes
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tuner.emulate import EmulationError, Launch, compile_many, emulate
from tuner.errors import UsageError

KERNELS = Path(__file__).parent / "kernels"
ROOT = Path(__file__).parents[1]


class Params(ctypes.Structure):
    _fields_ = [(n, ctypes.c_uint64) for n in ("a", "b", "c", "out")] + [("n", ctypes.c_int32)]


class Counting(ctypes.Structure):
    _fields_ = [(n, ctypes.c_uint64) for n in ("a", "partials", "counter", "out")]


class Faults(ctypes.Structure):
    _fields_ = [("data", ctypes.c_uint64), ("out", ctypes.c_uint64), ("n", ctypes.c_int32)]


def source(name: str) -> SimpleNamespace:
    return SimpleNamespace(text=(KERNELS / name).read_text())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A clean build directory, with the two test sources compiled in it."""
    folder = tmp_path_factory.mktemp("build")
    compile_many([source("primitives.cu"), source("faults.cu")], root=folder)
    return folder


@pytest.fixture
def primitive(root):
    def run(entry, out, *, grid=1, block=32, shared=0, n=0, **kw):
        options = {k: kw.pop(k) for k in ("seed", "concurrent_ctas") if k in kw}
        launch = Launch(entry, (grid, 1, 1), block, shared)
        emulate(source("primitives.cu"), launch, Params(n=n), kw | {"out": out}, root=root, **options)
        return out

    return run


@pytest.fixture
def fault(root):
    def run(entry, n=0, *, block=32, shared=256, data=None, seed=0, timeout_s=120.0):
        out = np.zeros(block, np.uint32)
        data = np.arange(256, dtype=np.uint8) if data is None else data
        launch = Launch(entry, (1, 1, 1), block, shared)
        buffers = {"data": data, "out": out}
        emulate(source("faults.cu"), launch, Faults(n=n), buffers, root=root, seed=seed, timeout_s=timeout_s)
        return out

    return run


# --- words ------------------------------------------------------------------------------------------------------------


OPERATIONS = (
    *("prmt", "funnel", "add", "sub", "mul", "fma", "pack", "bf2"),
    *("half", "bf16", "low", "high", "e4m3", "ex2", "to_half", "to_bf16"),
    *("to_e4m3", "add_down"),
)


def run_words(primitive, a, b=None, c=None):
    words = [np.ascontiguousarray(np.broadcast_to(0 if x is None else x, a.shape), np.uint32) for x in (a, b, c)]
    n = a.size
    operands = dict(zip("abc", words, strict=True))
    out = primitive("words", np.zeros((len(OPERATIONS), n), np.uint32), grid=-(-n // 128), block=128, n=n, **operands)
    return dict(zip(OPERATIONS, out, strict=True))


def same(result, expected):
    """Equal bits, except that NaNs may differ in theirs."""
    result, expected = np.asarray(result), np.asarray(expected)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(result), nan)
    integer = np.dtype(f"u{result.itemsize}")
    np.testing.assert_array_equal(
        np.ascontiguousarray(result).view(integer)[~nan], np.ascontiguousarray(expected).view(integer)[~nan]
    )


def halves(words):
    return np.ascontiguousarray(words).view(np.uint16).reshape(-1, 2)


def test_every_half_bf16_and_e4m3_converts_exactly(primitive):
    v = np.arange(65536, dtype=np.uint32)
    result = run_words(primitive, v)
    as_half = v.astype(np.uint16).view(np.float16).astype(np.float32)
    same(result["half"].view(np.float32), as_half)
    same(result["low"].view(np.float32), as_half)
    assert (result["high"] == 0).all()
    same(result["bf16"].view(np.float32), (v << 16).view(np.float32))
    bytes_as_half = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float16).numpy()
    same(halves(result["e4m3"])[:, 0].view(np.float16), bytes_as_half[v & 255])
    same(halves(result["e4m3"])[:, 1].view(np.float16), bytes_as_half[v >> 8])
    # And back: a half that becomes a float becomes the same half.
    back = run_words(primitive, as_half.view(np.uint32))
    same(back["to_half"].astype(np.uint16).view(np.float16), v.astype(np.uint16).view(np.float16))


def test_floats_to_e4m3_round_to_nearest_even_and_saturate(primitive):
    rng = np.random.default_rng(2)
    every = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    ties = (every[:-1] + every[1:]) / 2
    extremes = np.float32([448, 464, 465, 1e30, np.inf, np.nan, 2**-10, 1e-40])
    random = (rng.standard_normal(5000) * 2.0 ** rng.integers(-12, 10, 5000)).astype(np.float32)
    a = np.concatenate([every, ties, np.nextafter(ties, np.float32(0)), extremes, random]).astype(np.float32)
    result = run_words(primitive, a.view(np.uint32), (-a).view(np.uint32))["to_e4m3"]
    clamped = torch.from_numpy(np.stack([a, -a])).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    numbers = ~np.isnan(a)
    np.testing.assert_array_equal((result & 255)[numbers], clamped[0][numbers])
    np.testing.assert_array_equal((result >> 8)[numbers], clamped[1][numbers])
    assert (result[~numbers] & 0x7F7F == 0x7F7F).all()


def test_sums_rounded_down_give_the_floor(primitive):
    rng = np.random.default_rng(3)
    whole = np.arange(1, 64, dtype=np.float32)
    a = np.concatenate([whole, np.nextafter(whole, np.float32(0)), rng.uniform(0, 1000, 5000).astype(np.float32)])
    result = run_words(primitive, a.view(np.uint32), np.full(a.shape, 2.0**23, np.float32).view(np.uint32))["add_down"]
    np.testing.assert_array_equal(result & 0x7FFFFF, np.floor(a).astype(np.uint32))


def test_floats_round_once_to_nearest_even(primitive):
    rng = np.random.default_rng(0)
    every_half = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    with np.errstate(all="ignore"):
        ties = (every_half[:-1] + every_half[1:]) / 2
        around = np.concatenate([np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf)])
        values = np.concatenate(
            [
                rng.integers(0, 1 << 32, 60000, dtype=np.uint32).view(np.float32),
                np.float32(
                    [0.0, -0.0, 65504, 65519.996, 65520, -65520, 2**-24, 2**-25, -(2**-25), 1e-45, np.inf, np.nan]
                ),
                rng.choice(ties, 30000),
                rng.choice(around, 30000),
            ]
        ).astype(np.float32)
        result = run_words(primitive, values.view(np.uint32), values[::-1].copy().view(np.uint32))
        same(result["to_half"].astype(np.uint16).view(np.float16), values.astype(np.float16))
        same(halves(result["pack"])[:, 0].view(np.float16), values.astype(np.float16))
        same(halves(result["pack"])[:, 1].view(np.float16), values[::-1].astype(np.float16))
    bf16 = torch.from_numpy(values).bfloat16().float().numpy()
    same((result["to_bf16"] << 16).view(np.float32), bf16)
    same((halves(result["bf2"])[:, 0].astype(np.uint32) << 16).view(np.float32), bf16)
    same((halves(result["bf2"])[:, 1].astype(np.uint32) << 16).view(np.float32), bf16[::-1])


def test_half_arithmetic(primitive):
    rng = np.random.default_rng(1)
    words = [rng.integers(0, 1 << 32, 40000, dtype=np.uint32) for _ in range(3)]
    # Operands of like size too, where sums cancel and round.
    words = [np.concatenate([w, (w & 0x83FF83FF) | 0x3C003C00]) for w in words]
    result = run_words(primitive, *words)
    with np.errstate(all="ignore"):
        a, b, c = (halves(w).view(np.float16).astype(np.longdouble) for w in words)
        for name, exact in {"add": a + b, "sub": a - b, "mul": a * b, "fma": a * b + c}.items():
            same(halves(result[name]).view(np.float16), exact.astype(np.float64).astype(np.float16))


def test_bytes_and_powers_of_two(primitive):
    rng = np.random.default_rng(2)
    a, b, c = (rng.integers(0, 1 << 32, 4000, dtype=np.uint32) for _ in range(3))
    result = run_words(primitive, a, b, c)
    pool = np.concatenate([a[:, None], b[:, None]], 1).view(np.uint8)
    for i in range(4):
        nibble = (c >> (4 * i)) & 15
        byte = pool[np.arange(a.size), nibble & 7]
        byte = np.where(nibble & 8, np.where(byte & 128, 255, 0), byte)
        np.testing.assert_array_equal((result["prmt"] >> (8 * i)) & 255, byte)
    wide = (b.astype(np.uint64) << np.uint64(32)) | a
    np.testing.assert_array_equal(result["funnel"], (wide >> (c & 31).astype(np.uint64)).astype(np.uint32))
    x = np.concatenate([rng.uniform(-130, 10, 4000), [-np.inf, 0, 1, -149]]).astype(np.float32)
    ex2 = run_words(primitive, x.view(np.uint32))["ex2"].view(np.float32)
    expected = np.exp2(x.astype(np.float64))
    np.testing.assert_allclose(ex2, np.where(expected < 2.0**-126, 0, expected), rtol=3e-7)
    assert ex2[-4] == 0 and ex2[-1] == 0


# --- warp and CTA -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_warp_collectives(primitive, seed):
    rng = np.random.default_rng(3)
    n = 64
    a, b = rng.integers(0, 1 << 31, n, dtype=np.uint32), rng.integers(0, 64, n, dtype=np.uint32)
    a |= 0x00800000  # no float becomes a NaN or is flushed on its way
    a &= 0x7F7FFFFF
    out = primitive("warp", np.zeros((10, n), np.uint32), block=n, n=n, a=a, b=b, c=a[40:41].copy(), seed=seed)
    i = np.arange(n)
    lane, base = i & 31, i & ~31
    elements = a.reshape(2, 32).view(np.uint16).reshape(2, 8, 8)
    expected = [
        a[i ^ 5],
        a[i ^ 16],
        a[i ^ 1],
        a[base + (b & 31)],
        a[base + 7],
        a[base + (lane + 1) % 32],
        np.where(lane < 3, a, a[i - 3]),
        np.repeat([sum(int(x & 1) << k for k, x in enumerate(warp)) for warp in a.reshape(2, 32)], 32),
        np.repeat([(warp == a[40]).any() for warp in a.reshape(2, 32)], 32),
        np.ascontiguousarray(elements.transpose(0, 2, 1)).view(np.uint32).reshape(-1),
    ]
    for k, e in enumerate(expected):
        np.testing.assert_array_equal(out[k], e.astype(np.uint32), err_msg=f"operation {k}")


def test_matrix_product(primitive):
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((16, 16)).astype(np.float16), rng.standard_normal((16, 8)).astype(np.float16)
    c = rng.standard_normal((16, 8)).astype(np.float32)
    columns = np.ascontiguousarray(b.T).view(np.uint32)
    out = primitive("matrix", np.zeros((16, 8), np.float32), a=a.view(np.uint32), b=columns, c=c)
    np.testing.assert_array_equal(out, (a.astype(np.float64) @ b.astype(np.float64) + c).astype(np.float32))


@pytest.mark.parametrize("seed", range(4))
def test_asynchronous_copies(primitive, seed):
    a = np.arange(5 * 64 * 4, dtype=np.uint32)
    out = primitive("pipeline", np.zeros_like(a), block=64, shared=2048, n=5, a=a, seed=seed)
    np.testing.assert_array_equal(out.reshape(5, 64, 4), a.reshape(5, 64, 4)[:, ::-1])
    out = primitive("bulk", np.zeros(7 * 128, np.uint32), block=64, shared=1056, n=7, a=a[: 7 * 128].copy(), seed=seed)
    np.testing.assert_array_equal(out, a[: 7 * 128])


def test_partial_copies_end_in_zeros(primitive):
    a = np.random.default_rng(5).integers(1, 1 << 32, (64, 8), dtype=np.uint32)
    out = primitive("partial", np.zeros((64, 7), np.uint32), block=64, shared=2048, a=a)
    expected = a[:, :7].copy().view(np.uint8)
    for i, row in enumerate(expected):
        row[i % 17 : 16] = 0
        row[16 + i % 9 : 24] = 0
        row[24 + i % 5 : 28] = 0
    np.testing.assert_array_equal(out.view(np.uint8), expected)


@pytest.mark.parametrize("seed", range(4))
def test_named_barriers(primitive, seed):
    a = np.arange(128, dtype=np.uint32)
    out = primitive("named", np.zeros_like(a), block=128, shared=512, a=a, seed=seed)
    np.testing.assert_array_equal(out, a ^ 32)


@pytest.mark.parametrize(("seed", "concurrent"), [(0, 1), (0, 3), (1, 4), (2, 12)])
def test_last_cta_reduces_and_resets(root, seed, concurrent):
    a = np.arange(12 * 32, dtype=np.uint32)
    counter, out = np.zeros(1, np.int32), np.zeros(1, np.float32)
    buffers = {"a": a, "partials": np.full(12, np.nan, np.float32), "counter": counter, "out": out}
    launches = [Launch("last_cta", (3, 2, 2), 32)] * 2
    options = {"seed": seed, "concurrent_ctas": concurrent, "root": root}
    emulate(source("primitives.cu"), launches, Counting(), buffers, **options)
    assert out[0] == a.sum() and counter[0] == 0


# --- faults -----------------------------------------------------------------------------------------------------------


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


# --- arguments and building -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (Launch("words", (1, 1, 1), 33), "block of 33 threads"),
        (Launch("words", (1, 65536, 1), 32), "grid"),
        (Launch("words", (1, 1, 1), 32, 300_000), "300000 bytes of shared memory"),
    ],
)
def test_launches_no_gpu_takes(root, launch, message):
    with pytest.raises(UsageError, match=message):
        emulate(source("primitives.cu"), launch, Params(), {}, root=root)


def test_wrong_arguments_are_named(root):
    launch = Launch("last_cta", (1, 1, 1), 32)
    with pytest.raises(UsageError, match="buffer query: Params has no such field"):
        emulate(source("primitives.cu"), launch, Params(), {"query": np.zeros(1)}, root=root)
    with pytest.raises(EmulationError, match="parameters of last_cta have 32 bytes in the source, 40 were given"):
        emulate(source("primitives.cu"), launch, Params(), {}, root=root)
    with pytest.raises(EmulationError, match="no kernel absent in the source"):
        emulate(source("primitives.cu"), Launch("absent", (1, 1, 1), 32), Params(), {}, root=root)


def test_null_pointer(root):
    with pytest.raises(EmulationError, match=r"null pointer.*; line \d+"):
        emulate(source("faults.cu"), Launch("read_byte", (1, 1, 1), 32), Faults(), {"data": None}, root=root)


def test_compiler_errors_and_missing_compilers_are_one_line(root, monkeypatch):
    broken = SimpleNamespace(text='extern "C" __global__ void k(int n) { undeclared(n); }\n')
    with pytest.raises(EmulationError, match=r"kernel\.cu:1:\d+: error: .undeclared."):
        compile_many([broken], root=root)
    with pytest.raises(EmulationError, match="expected extern"):
        compile_many([SimpleNamespace(text="int x;")], root=root)
    static = 'extern "C" __global__ void k(int n) { __shared__ int x[4]; x[0] = n; }\n'
    with pytest.raises(EmulationError, match="static __shared__"):
        compile_many([SimpleNamespace(text=static)], root=root)
    from tuner.emulator import compile as compiling

    monkeypatch.setenv("CXX", "no-such-compiler")
    compiling._compiler.cache_clear()
    compiling._runtime_digest.cache_clear()
    try:
        with pytest.raises(EmulationError, match=r"no g\+\+ found.*install g\+\+"):
            compile_many([broken], root=root)
    finally:
        compiling._compiler.cache_clear()
        compiling._runtime_digest.cache_clear()
    assert not list(root.glob("emulate/tmp-*"))


def test_nothing_is_compiled_twice(root):
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    first, second = compile_many([source("faults.cu")] * 2, root=root)
    assert first == second and first.is_file()
    assert before == {p: p.stat().st_mtime_ns for p in root.rglob("*")}


def signatures(text: str) -> set[tuple[str, ...]]:
    """(name, parameter types...) of each primitive; line numbers, which only the emulator takes, left out."""
    found = set()
    for name, parameters in re.findall(r"^WPH_DEVICE[\w ]*?[ *](\w+)\(([^{;]*)\) \{", text, re.M):
        kinds = [re.sub(r"\s*\w+$|\(&\w+\)", "", x.strip()) for x in parameters.split(",")]
        found.add((name, *filter(None, kinds)))
    return found


def test_gpu_and_emulator_offer_the_same_primitives():
    ours = signatures((ROOT / "tuner/emulator/emulate.h").read_text())
    theirs = signatures((ROOT / "templates/parts/ptx.cuh.j2").read_text())
    # Words and half2 values change into each other on the GPU only.
    theirs -= {("h2_word", "__half2"), ("h2_value", "unsigned")}
    assert len(theirs) > 40
    assert ours == theirs
