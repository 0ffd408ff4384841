"""Tensors to kernel arguments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tuner.arguments import decode_params, dequant_params
from tuner.errors import UsageError
from tuner.formats import slot_layout
from tuner.reference import Case, synthetic_cache


def make_case(cache_format: str = "turboquant_4bit_nc", **options: Any) -> Case:
    return synthetic_cache(slot_layout(cache_format, 64), (5, 20), q_heads=8, kv_heads=2, **options)


def decode(case: Case, **changes: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    codec = case.codec
    arguments: dict[str, Any] = {
        "query": case.query,
        "kv_cache": case.kv_cache,
        "block_table": case.block_table,
        "seq_lens": case.seq_lens,
        "out": torch.empty_like(case.query),
        "cache_format": case.layout.format.name,
        "scale": case.scale,
        "splits": 3,
        "partials": torch.empty(10),
        "counters": torch.zeros(4, dtype=torch.int32),
        "centroids": codec.centroids,
        "signs": codec.signs,
        "channels": codec.channels,
    }
    return decode_params(**(arguments | changes))


def test_strides_of_a_padded_head_major_cache() -> None:
    case = make_case(order="head", padding=48, block_size=32, index_dtype=torch.int64)
    params, tensors = decode(case)
    slot = case.layout.slot_bytes
    assert params.token_stride == slot
    assert params.head_stride == 32 * slot
    assert params.block_stride == 2 * 32 * slot + 48
    assert params.plane_stride == 0
    assert (params.block_size, params.kv_heads, params.batch) == (32, 2, 2)
    assert (params.block_table_bytes, params.max_blocks) == (8, case.block_table.shape[1])
    assert params.kv_cache == tensors["kv_cache"].data_ptr()
    assert params.is_bf16 == 1
    assert params.splits == 3
    assert params.signs is None or params.signs == 0
    assert params.scale == pytest.approx(0.125)


def test_separate_planes_and_layer_constants() -> None:
    case = make_case("turboquant_outlier")
    params, tensors = decode(case)
    assert params.plane_stride == case.kv_cache.stride(1) == 16 * 2 * case.layout.slot_bytes
    assert params.signs == tensors["signs"].data_ptr()
    assert params.channels == tensors["channels"].data_ptr()


def test_strided_query_and_shared_table_row() -> None:
    case = make_case(query_dtype=torch.float16)
    query = torch.zeros(2, 3, 8, 64, dtype=torch.float16)[:, 1]
    table = case.block_table[:1].expand(2, -1)
    out = torch.zeros(2, 9, 64, dtype=torch.float16)[:, :8]
    params, _ = decode(replace(case, query=query, block_table=table), out=out)
    assert (params.query_batch_stride, params.query_head_stride) == (3 * 8 * 64, 64)
    assert (params.out_batch_stride, params.out_head_stride) == (9 * 64, 64)
    assert params.block_table_stride == 0
    assert params.is_bf16 == 0


def test_dequant_destinations() -> None:
    case = make_case()
    rows = torch.empty(case.block_table.numel(), 16, 2, 64, dtype=torch.bfloat16)
    layout = {"cache_format": "turboquant_4bit_nc", "head_dim": 64, "centroids": case.codec.centroids}
    params, _ = dequant_params(case.kv_cache, case.block_table, case.seq_lens, None, rows, **layout)
    assert params.key_out == 0
    assert params.value_out == rows.data_ptr()
    assert (params.out_block_stride, params.out_token_stride, params.out_head_stride) == (2048, 128, 64)
    with pytest.raises(UsageError, match="neither"):
        dequant_params(case.kv_cache, case.block_table, case.seq_lens, None, None, **layout)
    with pytest.raises(UsageError, match="at least"):
        dequant_params(case.kv_cache, case.block_table, case.seq_lens, rows[1:], None, **layout)
    with pytest.raises(UsageError, match="strides"):
        wide = torch.empty(*rows.shape[:3], 128, dtype=torch.bfloat16)[..., :64]
        dequant_params(case.kv_cache, case.block_table, case.seq_lens, rows, wide, **layout)


def bad(case: Case) -> dict[str, tuple[dict[str, Any], str]]:
    """Changes of one argument and what the message says about them."""
    return {
        "query type": ({"query": case.query.float()}, "query is float32: expected bfloat16 or float16"),
        "query shape": ({"query": case.query[0]}, "query has shape"),
        "query stride": ({"query": case.query.transpose(1, 2).contiguous().transpose(1, 2)}, "last stride"),
        "out type": ({"out": case.query.half()}, "out is float16: expected bfloat16"),
        "out shape": ({"out": case.query[:, :4]}, "expected that of query"),
        "cache type": ({"kv_cache": case.kv_cache.view(torch.int8)}, "kv_cache is int8"),
        "cache dims": ({"kv_cache": case.kv_cache[0]}, "expected 4 dimensions"),
        "slot": ({"kv_cache": case.kv_cache[..., :-2]}, "expected at least 70 for turboquant_4bit_nc at head dim 64"),
        "lengths type": ({"seq_lens": case.seq_lens.long()}, "seq_lens is int64"),
        "rows": ({"seq_lens": case.seq_lens[:1], "block_table": case.block_table[:1]}, "query has 2"),
        "table rows": ({"block_table": case.block_table[:1]}, "block_table has 1 rows"),
        "table type": ({"block_table": case.block_table.float()}, "block_table is float32"),
        "group": ({"query": case.query[:, :5], "out": case.query[:, :5]}, "5 query heads over 2 KV heads"),
        "levels": ({"centroids": torch.zeros(8)}, "centroids has 8 levels: expected 16"),
        "format": ({"cache_format": "turboquant_5bit"}, "unknown cache format"),
        "splits": ({"splits": 0}, "splits is 0"),
        "device": ({"counters": torch.zeros(4, dtype=torch.int32, device="meta")}, "expected one device"),
    }


@pytest.mark.parametrize("name", list(bad(make_case())))
def test_bad_arguments(name: str) -> None:
    case = make_case()
    changes, message = bad(case)[name]
    with pytest.raises(UsageError, match=message):
        decode(case, **changes)


def test_scratch_is_aligned() -> None:
    with pytest.raises(UsageError, match=r"partials start off a multiple of 16 bytes"):
        decode(make_case(), partials=torch.empty(11)[1:])
    with pytest.raises(UsageError, match=r"counters start off a multiple of 8 bytes"):
        decode(make_case(), counters=torch.zeros(11, dtype=torch.int32)[1:])


def test_missing_layer_constants() -> None:
    case = make_case("turboquant_outlier")
    with pytest.raises(UsageError, match="signs is missing: turboquant_outlier needs 55"):
        decode(case, signs=None)
    with pytest.raises(UsageError, match="channels has 3 elements: expected 64"):
        decode(case, channels=case.codec.channels[:3])
