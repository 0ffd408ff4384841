"""The emulator: warps and CTAs as on a GPU, and what is said of arguments and sources that no GPU takes."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from emulated_sources import Counting, Faults, Params, run_primitive, source

from tuner.emulate import EmulationError, Launch, compile_many, emulate
from tuner.errors import UsageError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A clean build directory, with the two test sources compiled in it."""
    folder = tmp_path_factory.mktemp("build")
    compile_many([source("primitives.cu"), source("faults.cu")], root=folder)
    return folder


@pytest.fixture
def primitive(root):
    return lambda *args, **kw: run_primitive(root, *args, **kw)


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
    theirs = signatures("\n".join(path.read_text() for path in sorted(ROOT.glob("templates/parts/ptx*.cuh.j2"))))
    # Words and half2 values change into each other on the GPU only.
    theirs -= {("h2_word", "__half2"), ("h2_value", "unsigned")}
    assert len(theirs) > 40
    assert ours == theirs
