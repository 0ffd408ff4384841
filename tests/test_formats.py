"""tuner.formats: offsets and sizes, against the published tables."""

from __future__ import annotations

import pytest

from tuner.errors import UsageError
from tuner.formats import FORMATS, HEAD_DIMS, SEED_FORMATS, VLLM_PRESETS, RowLayout, get_format, slot_layout

VLLM_SLOT_BYTES = {
    "turboquant_k8v4": {64: 100, 128: 196, 256: 388, 512: 772},
    "turboquant_4bit_nc": {64: 70, 128: 134, 256: 262, 512: 518},
    "turboquant_k3v4_nc": {64: 62, 128: 118, 256: 230, 512: 454},
    "turboquant_3bit_nc": {64: 54, 128: 102, 256: 198, 512: 390},
}


@pytest.mark.parametrize("name", VLLM_PRESETS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_vllm_slots(name: str, head_dim: int) -> None:
    layout = slot_layout(name, head_dim)
    assert layout.slot_bytes == layout.token_bytes == VLLM_SLOT_BYTES[name][head_dim]
    assert layout.value_offset == layout.key.size
    assert (layout.block_d, layout.normal, layout.outliers) == (head_dim, head_dim, 0)
    assert layout.compression == pytest.approx(4 * head_dim / layout.slot_bytes)
    # A page of 16 tokens is copied in 16-byte pieces.
    assert 16 * layout.slot_bytes % 16 == 0 and layout.slot_bytes % 2 == 0


@pytest.mark.parametrize(
    ("name", "head_dim", "outliers", "coefficients", "norm_offset", "content", "slot"),
    [
        ("turboquant_seed", 128, 19, 109, 93, 95, 128),
        ("turboquant_seed", 256, 38, 218, 185, 187, 256),
        ("turboquant_outlier", 128, 19, 128, 102, 104, 128),
        ("turboquant_outlier", 256, 38, 256, 204, 206, 256),
        ("turboquant_seed_dense", 128, 0, 128, 64, 66, 128),
        ("turboquant_seed_dense", 256, 0, 256, 128, 130, 256),
    ],
)
def test_seed_slots(
    name: str, head_dim: int, outliers: int, coefficients: int, norm_offset: int, content: int, slot: int
) -> None:
    layout = slot_layout(name, head_dim)
    row = layout.key
    assert layout.value == row and layout.value_offset == 0
    assert (layout.outliers, row.outliers) == (outliers, outliers)
    assert (row.coefficients, row.norm_offset, row.size) == (coefficients, norm_offset, content)
    assert layout.slot_bytes == slot
    assert layout.token_bytes == 2 * slot
    assert layout.block_d == head_dim


def _fields(row: RowLayout) -> list[tuple[int, int]]:
    """(first byte, bytes) of every field of a row."""
    fields = [(row.indices_offset, row.indices_bytes)]
    if row.outliers_offset is not None:
        fields.append((row.outliers_offset, 2 * row.outliers))
    halves = (row.norm_offset, row.scale_offset, row.zero_offset)
    return sorted(fields + [(offset, 2) for offset in halves if offset is not None])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_fields_tile_the_row(name: str, head_dim: int) -> None:
    layout = slot_layout(name, head_dim)
    for row in (layout.key, layout.value):
        end = 0
        for offset, size in _fields(row):
            assert offset == end
            end += size
        assert end == row.size
        assert 8 * row.indices_bytes - 7 <= row.coefficients * row.bits <= 8 * row.indices_bytes
    assert max(layout.key.size, layout.value_offset + layout.value.size) <= layout.slot_bytes
    assert layout.content_bytes <= layout.token_bytes


def test_families() -> None:
    assert set(VLLM_PRESETS) | set(SEED_FORMATS) == set(FORMATS)
    assert not any(get_format(n).rotates_output or get_format(n).has_signs for n in VLLM_PRESETS)
    assert all(get_format(n).rotates_output and get_format(n).rotates_query for n in SEED_FORMATS)
    assert not get_format("turboquant_k8v4").rotates_query


def test_refusals_name_what_is_known() -> None:
    with pytest.raises(UsageError, match=r"'fp4'.*turboquant_4bit_nc"):
        slot_layout("fp4", 128)
    with pytest.raises(UsageError, match=r"96.*64, 128, 256, 512"):
        slot_layout("turboquant_4bit_nc", 96)
