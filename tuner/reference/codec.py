"""Vectors to bytes and back, for every format: formats.py says where the bytes lie, this module what they mean."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tuner.formats import RowLayout, SlotLayout
from tuner.reference.lloyd_max import codebook, midpoints
from tuner.reference.rotation import hadamard, outlier_channels, rotation_signs

FP16_MAX = 65504.0
FP8_MAX = 448.0
_MIN_SCALE = 1e-8
_NORM_EPS = 1e-8  # added to the norm that a key is divided by
_SEED_NORM_EPS = 1e-16  # added to the sum of squares


@dataclass(frozen=True)
class Codec:
    """Constants of one layer: exactly what the kernels' three code pointers refer to (abi.py).

    ``centroids`` fp32 [2^bits] ascending (one zero where keys have no codebook); ``signs`` fp32 [normal], +-1, or
    None; ``channels`` int32 [D], the normal channels in order and then the outliers, or None without outliers.
    """

    layout: SlotLayout
    centroids: torch.Tensor
    signs: torch.Tensor | None
    channels: torch.Tensor | None

    @staticmethod
    def for_layout(layout: SlotLayout, seed: int = 0) -> Codec:
        """The constants of layer ``seed``, on the CPU."""
        fmt = layout.format
        levels = codebook(fmt.key_bits, layout.block_d).float() if fmt.key_codebook else torch.zeros(1)
        signs = rotation_signs(layout, seed).float() if fmt.has_signs else None
        channels = torch.cat(outlier_channels(layout, seed)) if layout.outliers else None
        return Codec(layout, levels, signs, channels)

    def to(self, device: torch.device | str) -> Codec:
        """The same constants on ``device``."""
        signs, channels = self.signs, self.channels
        return replace(
            self,
            centroids=self.centroids.to(device),
            signs=None if signs is None else signs.to(device),
            channels=None if channels is None else channels.to(device),
        )


def quantize_key(x: torch.Tensor, codec: Codec) -> torch.Tensor:
    """Keys [..., D], any float dtype -> bytes uint8 [..., layout.key.size]."""
    layout = codec.layout
    if layout.format.separate_planes:
        return _encode_seed(x, codec)
    if not layout.format.key_codebook:
        return x.float().clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    y, norm = coefficients(x, codec)
    return torch.cat([_pack(_nearest(y, codec), layout.key.bits), _fp16_bytes(norm)], dim=-1)


def quantize_value(x: torch.Tensor, codec: Codec) -> torch.Tensor:
    """Values [..., D], any float dtype -> bytes uint8 [..., layout.value.size]."""
    layout = codec.layout
    if layout.format.separate_planes:
        return _encode_seed(x, codec)
    # fp32 step by step, not float64: the format fixes this arithmetic, so the bytes must agree without exception.
    x = x.float()
    top = 2**layout.value.bits - 1
    zero = x.amin(-1, keepdim=True)
    # A divisor that is a number, torch replaces on a GPU by a product with its reciprocal, and ties move.
    scale = (x.amax(-1, keepdim=True) - zero) / torch.full_like(zero, top)
    scale = torch.where(scale > _MIN_SCALE, scale, _MIN_SCALE)
    indices = ((x - zero) / scale + 0.5).floor().clamp(0, top).nan_to_num().to(torch.uint8)
    return torch.cat([_pack(indices, layout.value.bits), _fp16_bytes(scale), _fp16_bytes(zero)], dim=-1)


def dequantize_key(data: torch.Tensor, codec: Codec) -> torch.Tensor:
    """Bytes uint8 [..., >= layout.key.size] -> keys float64 [..., D] in the original space."""
    layout = codec.layout
    row = layout.key
    if layout.format.separate_planes:
        return _decode_seed(data, codec)
    if not layout.format.key_codebook:
        return data[..., : row.size].clone(memory_format=torch.contiguous_format).view(torch.float8_e4m3fn).double()
    rotated = codec.centroids.double()[unpack_indices(data, row)]
    if layout.format.norm_correction:
        rotated = rotated / rotated.norm(dim=-1, keepdim=True)
    return hadamard(rotated) * _fp16_at(data, row.norm_offset)


def dequantize_value(data: torch.Tensor, codec: Codec) -> torch.Tensor:
    """Bytes uint8 [..., >= layout.value.size], the first being the value's -> values float64 [..., D]."""
    layout = codec.layout
    row = layout.value
    if layout.format.separate_planes:
        return _decode_seed(data, codec)
    return unpack_indices(data, row) * _fp16_at(data, row.scale_offset) + _fp16_at(data, row.zero_offset)


def coefficients(x: torch.Tensor, codec: Codec) -> tuple[torch.Tensor, torch.Tensor]:
    """What a row [..., D] of a format with a codebook is coded from, before any rounding, float64.

    The rotated vector of length one, [..., layout.block_d], and the length [..., 1] of what was rotated.
    """
    layout = codec.layout
    x = x.double()
    if not layout.format.separate_planes:
        norm = x.norm(dim=-1, keepdim=True)
        return hadamard(x / (norm + _NORM_EPS)), norm
    assert codec.signs is not None
    if codec.channels is not None:
        x = x[..., codec.channels.long()[: layout.normal]]
    norm = (x.square().sum(-1, keepdim=True) + _SEED_NORM_EPS).sqrt()
    padded = torch.nn.functional.pad(x / norm * codec.signs.double(), (0, layout.block_d - layout.normal))
    return hadamard(padded), norm


def _encode_seed(x: torch.Tensor, codec: Codec) -> torch.Tensor:
    """One vector of the seed's formats: outliers in bf16, the rest normalised, signed, rotated, coded."""
    layout = codec.layout
    row = layout.key
    parts = []
    if codec.channels is not None:
        outliers = x[..., codec.channels.long()[layout.normal :]].float().bfloat16()
        parts.append(outliers.contiguous().view(torch.uint8))
    y, norm = coefficients(x, codec)
    indices = _nearest(y, codec)[..., : row.coefficients]
    return torch.cat([*parts, _pack(indices, row.bits), _fp16_bytes(norm)], dim=-1)


def _decode_seed(data: torch.Tensor, codec: Codec) -> torch.Tensor:
    layout = codec.layout
    row = layout.key
    assert codec.signs is not None
    levels = codec.centroids.double()[unpack_indices(data, row)]
    padded = torch.nn.functional.pad(levels, (0, layout.block_d - row.coefficients))
    normal = hadamard(padded)[..., : layout.normal] * codec.signs.double() * _fp16_at(data, row.norm_offset)
    if codec.channels is None:
        return normal
    outliers = data[..., : 2 * row.outliers].clone(memory_format=torch.contiguous_format).view(torch.bfloat16).double()
    out = torch.empty(*normal.shape[:-1], layout.head_dim, dtype=torch.float64, device=data.device)
    out[..., codec.channels.long()] = torch.cat([normal, outliers], dim=-1)
    return out


def _nearest(y: torch.Tensor, codec: Codec) -> torch.Tensor:
    """Index of the level nearest to each of ``y``: the number of fp32 thresholds that are <= y."""
    return torch.bucketize(y, midpoints(codec.centroids).double(), right=True).to(torch.uint8)


def _pack(indices: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [..., n] of ``bits`` bits each -> bit string, low bit first, uint8 [..., ceil(n * bits / 8)]."""
    places = torch.arange(bits, dtype=torch.uint8, device=indices.device)
    string = ((indices[..., None] >> places) & 1).flatten(-2)
    string = torch.nn.functional.pad(string, (0, -string.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (string << torch.arange(8, dtype=torch.uint8, device=indices.device)).sum(-1, dtype=torch.uint8)


def unpack_indices(data: torch.Tensor, row: RowLayout) -> torch.Tensor:
    """The row's indices, int64 [..., coefficients]."""
    packed = data[..., row.indices_offset : row.indices_offset + row.indices_bytes]
    string = ((packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=data.device)) & 1).flatten(-2)
    string = string[..., : row.coefficients * row.bits].unflatten(-1, (row.coefficients, row.bits))
    places = torch.arange(row.bits, dtype=torch.uint8, device=data.device)
    return (string << places).sum(-1, dtype=torch.int64)


def _fp16_bytes(x: torch.Tensor) -> torch.Tensor:
    """[..., 1] -> its fp16 bytes, uint8 [..., 2]. Too large values saturate rather than become infinite."""
    return x.clamp(-FP16_MAX, FP16_MAX).float().half().contiguous().view(torch.uint8)


def _fp16_at(data: torch.Tensor, offset: int | None) -> torch.Tensor:
    """The fp16 field at byte ``offset``, odd ones too, float64 [..., 1]."""
    assert offset is not None
    return data[..., offset : offset + 2].clone(memory_format=torch.contiguous_format).view(torch.float16).double()
