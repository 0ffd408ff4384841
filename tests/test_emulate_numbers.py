"""The emulator's words, halves and bytes: bit by bit what the GPU's instructions give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulated_sources import run_primitive, source

from tuner.emulate import compile_many


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build")
    compile_many([source("primitives.cu")], root=folder)
    return folder


@pytest.fixture
def primitive(root):
    return lambda *args, **kw: run_primitive(root, *args, **kw)


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
