"""Device functions shared by our Triton kernels: bytes of a slot to numbers. Offsets come from ``formats``.

The cache is addressed by byte because a slot is aligned to two bytes at best (the seed's norm not even to that).
"""

# Triton writes compile-time arguments in capitals and leaves the others without types.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def half_at(address, mask):
    """fp16 whose low byte is at ``address``, as fp32; any alignment."""
    low = tl.load(address, mask=mask, other=0).to(tl.uint16)
    high = tl.load(address + 1, mask=mask, other=0).to(tl.uint16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def bfloat_at(address, mask):
    """bf16 whose low byte is at ``address``, as fp32; any alignment."""
    low = tl.load(address, mask=mask, other=0).to(tl.uint32)
    high = tl.load(address + 1, mask=mask, other=0).to(tl.uint32)
    return ((low << 16) | (high << 24)).to(tl.float32, bitcast=True)


@triton.jit
def nibble_at(address, index, mask):
    """4-bit field ``index`` of the packed string at ``address``, from the one byte that holds it."""
    byte = tl.load(address + index // 2, mask=mask, other=0).to(tl.int32)
    return (byte >> ((index % 2) * 4)) & 15


@triton.jit
def field_at(address, index, mask, BITS: tl.constexpr):
    """``BITS``-bit field ``index`` of the packed string at ``address``, from a window of two bytes.

    The window of the last field ends one byte after the string: a fp16 field must follow it, as in every slot.
    """
    bit = index * BITS
    low = tl.load(address + bit // 8, mask=mask, other=0).to(tl.int32)
    high = tl.load(address + bit // 8 + 1, mask=mask, other=0).to(tl.int32)
    return ((low | (high << 8)) >> (bit % 8)) & ((1 << BITS) - 1)


@triton.jit
def packed_at(address, index, mask, BITS: tl.constexpr):
    """As field_at, but where no field straddles bytes only the one byte is read."""
    return nibble_at(address, index, mask) if BITS == 4 else field_at(address, index, mask, BITS)


@triton.jit
def fp8_at(address, mask):
    """E4M3 at ``address``, as fp32."""
    return tl.load(address, mask=mask, other=0).to(tl.float8e4nv, bitcast=True).to(tl.float32)
