"""The arguments of each kernel, declared once: as a ctypes structure for callers, as a C struct for templates.

A kernel takes its structure by value as its only parameter (``__grid_constant__``), on the GPU and in the
emulator alike. Pointers are raw addresses; strides are counted in the unit that the field's comment names.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_uint64

_C_NAMES: dict[type, str] = {c_int32: "int", c_int64: "long long", c_float: "float"}

# (name, ctypes type or C pointee, comment)
Field = tuple[str, "type | str", str]

_CACHE: tuple[Field, ...] = (
    ("kv_cache", "const unsigned char", "first byte of the cache"),
    ("block_stride", c_int64, "bytes between blocks"),
    ("plane_stride", c_int64, "bytes from the key plane to the value plane (0: one slot holds both)"),
    ("token_stride", c_int64, "bytes between tokens of a block"),
    ("head_stride", c_int64, "bytes between KV heads"),
    ("block_table", "const void", "block ids [batch, max_blocks], int32 or int64"),
    ("block_table_stride", c_int64, "elements between rows, 0 allowed"),
    ("block_table_bytes", c_int32, "4 or 8: size of a block id"),
    ("max_blocks", c_int32, "columns of the block table"),
    ("seq_lens", "const int", "tokens per request [batch], 0 allowed"),
    ("block_size", c_int32, "tokens per block"),
    ("batch", c_int32, "requests"),
    ("kv_heads", c_int32, "KV heads"),
)
_CODE: tuple[Field, ...] = (
    ("centroids", "const float", "codebook levels, ascending [2^bits], of N(0, 1/BLOCK_D)"),
    ("signs", "const float", "+-1 per normal channel (formats with signs), else null"),
    ("channels", "const int", "channel ids [D]: the normal ones in order, then the outliers; null without outliers"),
)

DECODE_FIELDS: tuple[Field, ...] = (
    *_CACHE,
    *_CODE,
    ("query", "const void", "[batch, Hq, D] bf16 or fp16"),
    ("query_batch_stride", c_int64, "elements"),
    ("query_head_stride", c_int64, "elements"),
    ("out", "void", "[batch, Hq, D], the query's type"),
    ("out_batch_stride", c_int64, "elements"),
    ("out_head_stride", c_int64, "elements"),
    ("is_bf16", c_int32, "1: query and out are bf16, 0: fp16"),
    ("scale", c_float, "softmax scale"),
    ("partials", "float", "scratch for split results, see decode_scratch()"),
    ("counters", "int", "arrival counters, zero before the first launch; the kernel leaves them zero"),
    ("splits", c_int32, "grid schedule: splits per request; stream schedule: CTAs in the grid's x"),
)

DEQUANT_FIELDS: tuple[Field, ...] = (
    *_CACHE,
    *_CODE,
    ("key_out", "void", "bf16 [destination block, block_size, kv_heads, D] or null"),
    ("value_out", "void", "likewise, or null"),
    ("out_block_stride", c_int64, "elements between destination blocks"),
    ("out_token_stride", c_int64, "elements"),
    ("out_head_stride", c_int64, "elements"),
    ("by_block_id", c_int32, "1: destination block = block id; 0: position in the flattened block table"),
    ("dirty", "const void", "slots to decode [batch], in place of a block table (max_blocks is 1), or null"),
    ("dirty_bytes", c_int32, "4 or 8: size of a slot number; negative ones count as none"),
    ("run_tokens", c_int32, "longest run of adjacent dirty slots that one entry decodes"),
)

STORE_FIELDS: tuple[Field, ...] = (
    ("key", "const void", "[>= tokens, kv_heads, D] bf16 or fp16"),
    ("key_token_stride", c_int64, "elements"),
    ("key_head_stride", c_int64, "elements"),
    ("value", "const void", "likewise, of the same type"),
    ("value_token_stride", c_int64, "elements"),
    ("value_head_stride", c_int64, "elements"),
    ("is_bf16", c_int32, "1: key and value are bf16, 0: fp16"),
    ("slot_mapping", "const void", "slots [tokens], int32 or int64: block * block_size + token; negative: none"),
    ("slot_mapping_bytes", c_int32, "4 or 8: size of a slot number"),
    ("tokens", c_int32, "new tokens"),
    ("kv_heads", c_int32, "KV heads"),
    ("kv_cache", "unsigned char", "first byte of the cache"),
    ("block_stride", c_int64, "bytes between blocks"),
    ("plane_stride", c_int64, "bytes from the key plane to the value plane (0: one slot holds both)"),
    ("token_stride", c_int64, "bytes between tokens of a block"),
    ("head_stride", c_int64, "bytes between KV heads"),
    ("block_size", c_int32, "tokens per block"),
    *_CODE,
)


def _structure(name: str, fields: tuple[Field, ...]) -> type[ctypes.Structure]:
    ctypes_fields = [(n, c_uint64 if isinstance(t, str) else t) for n, t, _ in fields]
    return type(name, (ctypes.Structure,), {"_fields_": ctypes_fields, "__doc__": f"Arguments of {name}."})


DecodeParams = _structure("DecodeParams", DECODE_FIELDS)
DequantParams = _structure("DequantParams", DEQUANT_FIELDS)
StoreParams = _structure("StoreParams", STORE_FIELDS)

STRUCTURES: dict[str, tuple[str, tuple[Field, ...]]] = {
    "decode": ("DecodeParams", DECODE_FIELDS),
    "dequant": ("DequantParams", DEQUANT_FIELDS),
    "store": ("StoreParams", STORE_FIELDS),
}


def c_struct(op: str) -> str:
    """C++ text of the parameter structure of ``op``, laid out exactly as its ctypes twin."""
    name, fields = STRUCTURES[op]
    declarations = [
        f"{t} *{n};" if isinstance(t, str) else f"{_C_NAMES[t]} {n};" for n, t, _ in fields
    ]
    width = max(map(len, declarations))
    lines = [f"    {d:<{width}}  // {c}" for d, (_, _, c) in zip(declarations, fields, strict=True)]
    return "\n".join([f"struct {name} {{", *lines, "};"])
