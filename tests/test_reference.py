"""tuner.reference, from first principles: definitions written out slowly, properties, and hand-made bytes."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tuner.formats import FORMATS, HEAD_DIMS, SEED_FORMATS, VLLM_PRESETS, slot_layout
from tuner.reference import (
    Codec,
    codebook,
    dequantize_key,
    dequantize_value,
    hadamard,
    midpoints,
    outlier_channels,
    quantize_key,
    quantize_value,
    rotation_signs,
)

BITS = (3, 4)
DISTORTION = {3: 0.03454, 4: 0.009497}
"""Mean squared error of the optimal quantiser of N(0, 1), by bits: Max (1960), table I."""
CODEBOOK_FORMATS = tuple(n for n in VLLM_PRESETS if FORMATS[n].key_codebook)


def codec_of(name: str, head_dim: int = 64) -> Codec:
    return Codec.for_layout(slot_layout(name, head_dim), seed=3)


def rows(head_dim: int, count: int = 50) -> torch.Tensor:
    return torch.randn(count, head_dim, generator=torch.Generator().manual_seed(count)).double()


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


# --- codebook and rotation ---


def normal_cell_mean(a: float, b: float) -> float:
    """E[x | a < x < b] of N(0, 1)."""

    def density(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    def distribution(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    return (density(a) - density(b)) / (distribution(b) - distribution(a))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_levels_are_the_means_of_their_cells(bits: int, dim: int) -> None:
    levels = codebook(bits, dim) * dim**0.5
    assert levels.dtype == torch.float64 and len(levels) == 2**bits
    edges = [-math.inf, *midpoints(levels).tolist(), math.inf]
    means = [normal_cell_mean(a, b) for a, b in pairwise(edges)]
    assert torch.allclose(levels, torch.tensor(means, dtype=torch.float64), atol=2e-3)
    assert torch.allclose(levels, -levels.flip(0), atol=1e-12)
    assert (levels.diff() > 0).all()


@pytest.mark.parametrize("bits", BITS)
def test_distortion_is_that_of_the_optimal_quantiser(bits: int) -> None:
    levels = codebook(bits, 64) * 8
    x = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    nearest = levels[torch.bucketize(x, midpoints(levels))]
    density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    assert torch.trapezoid((x - nearest) ** 2 * density, x).item() == pytest.approx(DISTORTION[bits], rel=2e-3)


@pytest.mark.parametrize("n", [1, 2, 8, 64, 128])
def test_hadamard_is_the_sylvester_matrix(n: int) -> None:
    ids = torch.arange(n)
    parity = torch.tensor([[bin(i & j).count("1") % 2 for j in ids.tolist()] for i in ids.tolist()])
    matrix = (1 - 2 * parity).double() / n**0.5
    x = rows(n).reshape(5, 10, n)
    assert torch.allclose(hadamard(x), x @ matrix)
    assert torch.allclose(hadamard(hadamard(x)), x)
    assert hadamard(x.float()).dtype == torch.float32


def test_hadamard_refuses_other_lengths() -> None:
    with pytest.raises(ValueError, match="power of two"):
        hadamard(torch.zeros(3, 12))


@pytest.mark.parametrize("name", SEED_FORMATS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_layer_constants(name: str, head_dim: int) -> None:
    layout = slot_layout(name, head_dim)
    codec = Codec.for_layout(layout, seed=1)
    assert codec.signs is not None and codec.signs.shape == (layout.normal,)
    assert set(codec.signs.tolist()) == {-1.0, 1.0}
    assert not torch.equal(rotation_signs(layout, 1), rotation_signs(layout, 2))
    assert (codec.channels is None) == (layout.outliers == 0)
    normal, outliers = outlier_channels(layout, 1)
    assert len(outliers) == layout.outliers
    assert sorted([*normal.tolist(), *outliers.tolist()]) == list(range(head_dim))
    assert (normal.diff() > 0).all() and (outliers.diff() > 0).all()


@pytest.mark.parametrize("name", VLLM_PRESETS)
def test_vllm_formats_have_no_layer_constants(name: str) -> None:
    codec = codec_of(name)
    assert codec.signs is None and codec.channels is None
    assert codec.centroids.dtype == torch.float32
    assert len(codec.centroids) == (2 ** FORMATS[name].key_bits if FORMATS[name].key_codebook else 1)


# --- bytes, against the format written out value by value ---


def bits_of(data: list[int], offset: int, count: int) -> int:
    """``count`` bits from bit ``offset`` of a byte string, low bit first."""
    return (int.from_bytes(bytes(data), "little") >> offset) & (2**count - 1)


def half_at(data: list[int], offset: int) -> float:
    return torch.tensor(data[offset : offset + 2], dtype=torch.uint8).view(torch.float16).item()


@pytest.mark.parametrize("name", CODEBOOK_FORMATS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_key_bytes(name: str, head_dim: int) -> None:
    codec = codec_of(name, head_dim)
    row = codec.layout.key
    levels = codec.centroids.tolist()
    x = rows(head_dim, 4)
    for data, key in zip(quantize_key(x, codec).tolist(), x, strict=True):
        assert len(data) == row.size
        assert half_at(data, row.indices_bytes) == key.norm().half().item()
        rotated = hadamard(key / key.norm()).tolist()
        for d, y in enumerate(rotated):
            nearest = min(range(len(levels)), key=lambda i, y=y: abs(levels[i] - y))
            assert bits_of(data, row.bits * d, row.bits) == nearest


@pytest.mark.parametrize("name", VLLM_PRESETS)
def test_value_bytes(name: str) -> None:
    codec = codec_of(name)
    row = codec.layout.value
    x = rows(64, 4).float()
    top = 2**row.bits - 1
    for data, value in zip(quantize_value(x, codec).tolist(), x, strict=True):
        scale = (value.max() - value.min()) / top
        assert half_at(data, row.indices_bytes) == scale.half().item()
        assert half_at(data, row.indices_bytes + 2) == value.min().half().item()
        indices = [bits_of(data, row.bits * d, row.bits) for d in range(64)]
        assert (min(indices), max(indices)) == (0, top)
        expected = ((value - value.min()) / scale + 0.5).floor().int().tolist()
        assert indices == expected


@pytest.mark.parametrize("name", SEED_FORMATS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_seed_bytes(name: str, head_dim: int) -> None:
    codec = codec_of(name, head_dim)
    layout, row = codec.layout, codec.layout.key
    assert codec.signs is not None
    levels = codec.centroids.tolist()
    normal, outliers = outlier_channels(layout, seed=3)
    x = rows(head_dim, 3)
    assert torch.equal(quantize_key(x, codec), quantize_value(x, codec))
    for data, vector in zip(quantize_key(x, codec).tolist(), x, strict=True):
        assert len(data) == row.size
        stored = torch.tensor(data[: 2 * layout.outliers], dtype=torch.uint8).view(torch.bfloat16)
        assert torch.equal(stored, vector[outliers.long()].bfloat16())
        kept = vector[normal.long()]
        assert half_at(data, row.size - 2) == kept.norm().half().item()
        padded = torch.zeros(layout.block_d, dtype=torch.float64)
        padded[: layout.normal] = kept / kept.norm() * codec.signs
        for i, y in enumerate(hadamard(padded).tolist()[: row.coefficients]):
            nearest = min(range(16), key=lambda j, y=y: abs(levels[j] - y))
            assert bits_of(data, 16 * layout.outliers + 4 * i, 4) == nearest


def test_nothing_is_divided_by_a_plain_number() -> None:
    """On a GPU torch turns that into a product with the reciprocal (exact for 2), and ties would move."""

    class Divisions(TorchDispatchMode):
        divisors: list[object] = []  # noqa: RUF012

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func.overloadpacket is torch.ops.aten.div:
                self.divisors.append(args[1])
            return func(*args, **(kwargs or {}))

    codecs = [codec_of(name) for name in FORMATS]
    with Divisions() as seen:
        for codec in codecs:
            quantize_key(rows(64), codec)
            quantize_value(rows(64), codec)
    assert len(seen.divisors) > len(FORMATS)
    assert all(d.dim() > 0 if isinstance(d, torch.Tensor) else d == 2 for d in seen.divisors)


def test_fp8_keys_are_the_nearest_e4m3_even_on_ties_saturating() -> None:
    codec = codec_of("turboquant_k8v4")
    table = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()  # 0 to 448, ascending
    ties = (table[:-1] + table[1:]) / 2
    x = torch.cat([table, ties, ties * (1 + 1e-3), ties * (1 - 1e-3), torch.tensor([460.0, 465.0, 1e6])])
    x = torch.nn.functional.pad(x, (0, -len(x) % 64)).reshape(-1, 64)
    upper = torch.bucketize(x.clamp(max=448), table)
    lower = (upper - 1).clamp(min=0)
    below, above = x - table[lower], table[upper] - x
    expected = torch.where((above < below) | ((above == below) & (upper % 2 == 0)), upper, lower)
    expected = torch.where(x >= 448, 126, expected)
    assert torch.equal(quantize_key(x, codec).long(), expected)
    assert torch.equal(quantize_key(-x, codec).long() & 0x7F, expected)


def test_e4m3_nan_bytes_decode_to_nan() -> None:
    codec = codec_of("turboquant_k8v4")
    data = torch.zeros(1, 64, dtype=torch.uint8)
    data[0, :4] = torch.tensor([0x7F, 0xFF, 0x7E, 0xFE])
    key = dequantize_key(data, codec)[0]
    assert key[:2].isnan().all() and key[2:4].tolist() == [448.0, -448.0] and (key[4:] == 0).all()


@pytest.mark.parametrize("name", FORMATS)
def test_fp16_fields_saturate_and_survive_zero(name: str) -> None:
    codec = codec_of(name)
    for x in (torch.zeros(1, 64), torch.full((1, 64), 1e-12), torch.full((1, 64), -3e5), rows(64, 1) * 3e5):
        decoded = dequantize_value(quantize_value(x, codec), codec)
        assert decoded.isfinite().all()
        key = dequantize_key(quantize_key(x, codec), codec)
        assert key.isfinite().all()
        if not x.any():
            assert decoded.abs().max() <= 1e-7 and key.abs().max() <= 1e-7
    if FORMATS[name].key_codebook:
        norm = codec.layout.key.norm_offset
        assert norm is not None
        assert half_at(quantize_key(torch.full((1, 64), 3e5), codec)[0].tolist(), norm) == 65504


# --- round trips ---

# Root of the distortion per coefficient for codebooks; affine steps span a Gaussian row's range of about 5 sigma.
KEY_ERROR = {"turboquant_k8v4": 0.03, "turboquant_4bit_nc": 0.1, "turboquant_k3v4_nc": 0.19, "turboquant_3bit_nc": 0.19}
VALUE_ERROR = {3: 0.3, 4: 0.14}


@pytest.mark.parametrize("name", VLLM_PRESETS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_vllm_round_trip(name: str, head_dim: int) -> None:
    codec = codec_of(name, head_dim)
    x = rows(head_dim)
    key = dequantize_key(quantize_key(x, codec), codec)
    value = dequantize_value(quantize_value(x, codec), codec)
    assert KEY_ERROR[name] / 3 < relative_error(key, x) < KEY_ERROR[name]
    assert relative_error(value, x) < VALUE_ERROR[codec.layout.value.bits]
    if FORMATS[name].norm_correction:
        assert torch.allclose(key.norm(dim=-1), x.norm(dim=-1).half().double(), rtol=1e-12)


@pytest.mark.parametrize("name", SEED_FORMATS)
@pytest.mark.parametrize("head_dim", [128, 256])
def test_seed_round_trip(name: str, head_dim: int) -> None:
    """Squared error of the normal channels, relative: quantisation alone, or most of the share that is dropped."""
    codec = codec_of(name, head_dim)
    layout = codec.layout
    x = rows(head_dim, 400)
    decoded = dequantize_key(quantize_key(x, codec), codec)
    normal, outliers = (ids.long() for ids in outlier_channels(layout, seed=3))
    assert torch.equal(decoded[:, outliers], x[:, outliers].bfloat16().double())
    error = relative_error(decoded[:, normal], x[:, normal]) ** 2
    # The error spreads evenly over BLOCK_D positions, of which the padding is thrown away.
    quantisation = DISTORTION[4] * layout.normal / layout.block_d
    if FORMATS[name].drops_padding:
        assert error == pytest.approx(0.135, rel=0.05)
    else:
        assert error == pytest.approx(quantisation, rel=0.03)
