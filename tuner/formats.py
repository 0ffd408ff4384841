"""Byte layout of a compressed KV-cache slot: the single source of every offset.

Two families share this description:

* vLLM's presets keep ``key | value`` of a token and head in one slot of a cache shaped
  ``[num_blocks, block_size, num_kv_heads, slot_bytes]``;
* the seed's formats keep keys and values in two planes of a cache shaped
  ``[num_blocks, 2, block_size, num_kv_heads, slot_bytes]``, both coded alike.

Everything is little endian and bit strings are packed from the low bit up.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from tuner.errors import UsageError

HEAD_DIMS = (64, 128, 256, 512)
OUTLIER_FRACTION = 0.15
"""Share of the channels that the seed keeps in bf16."""


@dataclass(frozen=True)
class CacheFormat:
    """What is stored for a key and for a value, independent of the head dim.

    ``key_bits``/``value_bits`` are bits per stored coefficient. ``codebook_*`` says whether the indices
    select Lloyd-Max levels of a rotated, unit-norm vector (otherwise: FP8 for keys, affine for values).
    ``norm_correction`` divides by the length of the decoded codebook vector. ``outlier_fraction`` is the
    share of channels kept in bf16; ``drops_padding`` marks the seed's flaw: of the padded transform's
    coefficients only as many as there are normal channels are stored.
    """

    name: str
    key_bits: int
    value_bits: int
    key_codebook: bool
    value_codebook: bool
    norm_correction: bool
    separate_planes: bool
    outlier_fraction: float = 0.0
    drops_padding: bool = False

    @property
    def rotates_query(self) -> bool:
        """Keys are stored rotated, so the query is rotated once instead."""
        return self.key_codebook

    @property
    def rotates_output(self) -> bool:
        """Values are stored rotated, so the attention output is rotated back once."""
        return self.value_codebook

    @property
    def has_signs(self) -> bool:
        """The rotation is preceded by a per-layer +-1 diagonal (the seed's formats)."""
        return self.separate_planes


@dataclass(frozen=True)
class RowLayout:
    """One coded vector (a key or a value), offsets in bytes from its first byte; absent fields are None.

    ``coefficients`` indices of ``bits`` bits start at ``indices_offset``; ``outliers`` bf16 values start at
    ``outliers_offset``; ``norm_offset``, ``scale_offset`` and ``zero_offset`` are fp16 fields. ``size`` counts
    the bytes that carry data.
    """

    bits: int
    coefficients: int
    indices_offset: int
    indices_bytes: int
    size: int
    outliers: int = 0
    outliers_offset: int | None = None
    norm_offset: int | None = None
    scale_offset: int | None = None
    zero_offset: int | None = None


@dataclass(frozen=True)
class SlotLayout:
    """A slot of one format at one head dim.

    ``value_offset`` is the value's first byte within the slot (0 where values have a plane of their own).
    ``block_d`` is the length of the Walsh-Hadamard transform, ``normal`` the number of channels that go
    through it. ``slot_bytes`` is the least size of a slot; a cache may space slots further apart.
    """

    format: CacheFormat
    head_dim: int
    block_d: int
    normal: int
    key: RowLayout
    value: RowLayout
    value_offset: int
    slot_bytes: int

    @property
    def outliers(self) -> int:
        return self.head_dim - self.normal

    @property
    def token_bytes(self) -> int:
        """Bytes that one token of one KV head occupies, keys and values, without padding between slots."""
        return self.slot_bytes * (2 if self.format.separate_planes else 1)

    @property
    def content_bytes(self) -> int:
        """Bytes of those that carry data."""
        return self.key.size + self.value.size

    @property
    def compression(self) -> float:
        """How many times fewer bytes than bf16."""
        return 4 * self.head_dim / self.token_bytes


def _preset(name: str, key_bits: int, value_bits: int, key_codebook: bool = True) -> CacheFormat:
    return CacheFormat(name, key_bits, value_bits, key_codebook, False, key_codebook, False)


def _seed(name: str, fraction: float, drops_padding: bool = False) -> CacheFormat:
    return CacheFormat(name, 4, 4, True, True, False, True, fraction, drops_padding)


FORMATS: dict[str, CacheFormat] = {
    f.name: f
    for f in (
        _preset("turboquant_k8v4", 8, 4, key_codebook=False),
        _preset("turboquant_4bit_nc", 4, 4),
        _preset("turboquant_k3v4_nc", 3, 4),
        _preset("turboquant_3bit_nc", 3, 3),
        _seed("turboquant_seed", OUTLIER_FRACTION, drops_padding=True),
        _seed("turboquant_seed_dense", 0.0),
        _seed("turboquant_outlier", OUTLIER_FRACTION),
    )
}
VLLM_PRESETS = tuple(n for n, f in FORMATS.items() if not f.separate_planes)
SEED_FORMATS = tuple(n for n, f in FORMATS.items() if f.separate_planes)


def get_format(name: str) -> CacheFormat:
    """The format called ``name``. Raises UsageError, naming the known ones, for any other."""
    try:
        return FORMATS[name]
    except KeyError:
        raise UsageError(f"unknown cache format {name!r}: expected one of {', '.join(FORMATS)}") from None


def check_head_dim(head_dim: int) -> int:
    """Returns ``head_dim`` if kernels exist for it, else raises UsageError."""
    if head_dim not in HEAD_DIMS:
        expected = ", ".join(map(str, HEAD_DIMS))
        raise UsageError(f"unsupported head dim {head_dim}: expected one of {expected}")
    return head_dim


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _packed_bytes(count: int, bits: int) -> int:
    return (count * bits + 7) // 8


def _vllm_layout(fmt: CacheFormat, d: int) -> SlotLayout:
    key_bytes = _packed_bytes(d, fmt.key_bits)
    norm = key_bytes if fmt.key_codebook else None
    key = RowLayout(fmt.key_bits, d, 0, key_bytes, key_bytes + (2 if fmt.key_codebook else 0), norm_offset=norm)
    value_bytes = _packed_bytes(d, fmt.value_bits)
    value = RowLayout(
        fmt.value_bits, d, 0, value_bytes, value_bytes + 4, scale_offset=value_bytes, zero_offset=value_bytes + 2
    )
    slot = key.size + value.size
    return SlotLayout(fmt, d, d, d, key, value, key.size, slot + slot % 2)


def _seed_layout(fmt: CacheFormat, d: int) -> SlotLayout:
    outliers = max(1, int(d * fmt.outlier_fraction)) if fmt.outlier_fraction else 0
    normal = d - outliers
    block_d = next_power_of_two(normal)
    stored = normal if fmt.drops_padding else block_d
    indices = 2 * outliers
    norm = indices + _packed_bytes(stored, 4)
    row = RowLayout(
        4, stored, indices, norm - indices, norm + 2, outliers, 0 if outliers else None, norm_offset=norm
    )
    return SlotLayout(fmt, d, block_d, normal, row, row, 0, next_power_of_two(row.size))


@cache
def slot_layout(format_name: str, head_dim: int) -> SlotLayout:
    """Layout of ``format_name`` at ``head_dim``. Raises UsageError for an unknown format or head dim."""
    fmt = get_format(format_name)
    check_head_dim(head_dim)
    return (_seed_layout if fmt.separate_planes else _vllm_layout)(fmt, head_dim)
