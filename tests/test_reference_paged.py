"""tuner.reference on paged caches: storing, attention, and the cases that everything else is checked with."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from tuner.errors import UsageError
from tuner.formats import FORMATS, slot_layout
from tuner.reference import (
    Case,
    Codec,
    attend,
    bulk_cache,
    bulk_case,
    dequantize,
    dequantize_key,
    dequantize_value,
    make_cache,
    quantize_key,
    quantize_value,
    store,
    synthetic_cache,
)


def codec_of(name: str, head_dim: int = 64) -> Codec:
    return Codec.for_layout(slot_layout(name, head_dim), seed=3)


# --- caches ---


@pytest.mark.parametrize("order", ["token", "head"])
@pytest.mark.parametrize("name", ["turboquant_3bit_nc", "turboquant_seed"])
def test_cache_memory(name: str, order: str) -> None:
    layout = slot_layout(name, 64)
    cache = make_cache(layout, 5, 16, 3, order=order, padding=48)
    planes = (2,) if layout.format.separate_planes else ()
    assert cache.shape == (5, *planes, 16, 3, layout.slot_bytes)
    assert (cache == 0xFF).all() and cache.stride(-1) == 1
    assert cache.stride(0) == 48 * layout.token_bytes + 48
    token, head = cache.stride()[-3:-1]
    slot = layout.slot_bytes
    assert (token, head) == ((3 * slot, slot) if order == "token" else (slot, 16 * slot))
    if planes:
        assert cache.stride(1) == 48 * slot
    random = make_cache(layout, 5, 16, 3, generator=torch.Generator().manual_seed(0))
    assert len(random.unique()) > 200


def test_unknown_order_is_refused() -> None:
    with pytest.raises(UsageError, match="'page'"):
        make_cache(slot_layout("turboquant_seed", 64), 1, 16, 1, order="page")


@pytest.mark.parametrize("order", ["token", "head"])
@pytest.mark.parametrize("name", FORMATS)
def test_store_writes_its_slots_and_nothing_else(name: str, order: str) -> None:
    codec = codec_of(name)
    cache = make_cache(codec.layout, 3, 4, 2, order=order, padding=7)
    key, value = torch.randn(2, 4, 2, 64, generator=torch.Generator().manual_seed(0))
    store(cache, key, value, torch.tensor([9, -1, 0, 6]), codec)
    keys, values = dequantize(cache, codec)
    assert keys.shape == values.shape == (3, 4, 2, 64)
    for token, (block, offset) in {0: (2, 1), 2: (0, 0), 3: (1, 2)}.items():
        assert torch.equal(keys[block, offset], dequantize_key(quantize_key(key[token], codec), codec))
        assert torch.equal(values[block, offset], dequantize_value(quantize_value(value[token], codec), codec))
    memory = torch.empty(0, dtype=torch.uint8).set_(cache.untyped_storage())
    untouched = make_cache(codec.layout, 3, 4, 2, order=order, padding=7)
    written = (memory != torch.empty(0, dtype=torch.uint8).set_(untouched.untyped_storage())).sum()
    assert 0 < written <= 3 * 2 * codec.layout.content_bytes


# --- attention ---


def slow_attention(case: Case) -> torch.Tensor:
    """Attention of every request and head by itself, over the cache decoded as a whole."""
    keys, values = dequantize(case.kv_cache, case.codec)
    out = torch.zeros(case.query.shape, dtype=torch.float64)
    group = case.query.shape[1] // case.kv_heads
    for b, length in enumerate(case.seq_lens.tolist()):
        where = [(int(case.block_table[b, t // case.block_size]), t % case.block_size) for t in range(length)]
        for h in range(case.query.shape[1] if length else 0):
            k = torch.stack([keys[block, t, h // group] for block, t in where])
            v = torch.stack([values[block, t, h // group] for block, t in where])
            out[b, h] = torch.softmax(k @ case.query[b, h].double() * case.scale, 0) @ v
    return out


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(2, 2), (10, 2)])
def test_attention(name: str, q_heads: int, kv_heads: int) -> None:
    case = synthetic_cache(
        slot_layout(name, 64), [5, 0, 1, 16, 17], q_heads=q_heads, kv_heads=kv_heads, order="head", padding=16
    )
    out = case.expected()
    assert out.dtype == torch.float64 and out.isfinite().all()
    assert (out[1] == 0).all()
    assert torch.allclose(out, slow_attention(case), rtol=1e-10, atol=1e-12)


def test_attention_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    case = synthetic_cache(slot_layout("turboquant_4bit_nc", 64), [100, 33], q_heads=4, kv_heads=2)
    whole = case.expected()
    monkeypatch.setattr("tuner.reference.attention._CHUNK_ELEMENTS", 2 * 16 * 2 * 64)
    assert torch.allclose(case.expected(), whole, rtol=1e-12, atol=1e-14)


def test_attention_of_uncompressed_data_is_close() -> None:
    """One block without paging: the compressed answer approaches the exact one."""
    codec = codec_of("turboquant_k8v4", 128)
    key, value = torch.randn(2, 16, 2, 128, generator=torch.Generator().manual_seed(0)).double()
    query = torch.randn(1, 2, 128, generator=torch.Generator().manual_seed(1)).double()
    cache = make_cache(codec.layout, 1, 16, 2)
    store(cache, key, value, torch.arange(16), codec)
    out = attend(query, cache, torch.zeros(1, 1, dtype=torch.int32), torch.tensor([16]), 128**-0.5, codec)
    by_head = (x.transpose(0, 1) for x in (query, key, value))
    exact = torch.nn.functional.scaled_dot_product_attention(*by_head).transpose(0, 1)
    assert (out - exact).norm() < 0.15 * exact.norm()


def test_attention_refuses_what_it_cannot_read() -> None:
    case = synthetic_cache(slot_layout("turboquant_4bit_nc", 64), [3], q_heads=2, kv_heads=2)
    for cache in (case.kv_cache.int(), case.kv_cache[..., :60], case.kv_cache[None]):
        with pytest.raises(UsageError, match="turboquant_4bit_nc"):
            attend(case.query, cache, case.block_table, case.seq_lens, 1.0, case.codec)
    with pytest.raises(UsageError, match="3 query heads cannot share 2"):
        attend(torch.zeros(1, 3, 64), case.kv_cache, case.block_table, case.seq_lens, 1.0, case.codec)


# --- cases ---


def synthetic(**changes: Any) -> Case:
    layout = slot_layout(changes.pop("name", "turboquant_4bit_nc"), 64)
    options = {"q_heads": 4, "kv_heads": 2, "block_size": 16, "seed": 7} | changes
    return synthetic_cache(layout, options.pop("lengths", [40, 0, 3]), **options)


def test_pages_are_shuffled_disjoint_and_poisoned_where_unused() -> None:
    case = synthetic(spare_blocks=5, lengths=[200, 0, 3])
    first = case.block_table[0, :13].tolist()
    ids = [*first, int(case.block_table[2, 0])]
    assert len(set(ids)) == 14 and len(case.kv_cache) == 19
    assert first != sorted(first) and max(b - a for a, b in pairwise(first)) > 1
    spare = sorted(set(range(19)) - set(ids))
    assert (case.kv_cache[spare] == 0xFF).all()
    assert (case.kv_cache[ids[12], 8:] == 0xFF).all() and not (case.kv_cache[ids[12], :8] == 0xFF).all(-1).any()
    keys, values = dequantize(case.kv_cache[spare], case.codec)
    assert keys.isnan().all() and values.isnan().all()


def test_stale_entries() -> None:
    stale, clean = synthetic(lengths=[40] + [1] * 20), synthetic(lengths=[40] + [1] * 20, stale_table=False)
    padding = stale.block_table[1:, 1:]
    assert ((padding < 0) | (padding >= len(stale.kv_cache))).any()
    assert (clean.block_table[1:, 1:] == 0).all()
    assert stale.expected().isfinite().all()


@pytest.mark.parametrize("name", FORMATS)
def test_options(name: str) -> None:
    case = synthetic(name=name, query_dtype=torch.float16, index_dtype=torch.int64, block_size=32, padding=32)
    assert (case.query.dtype, case.block_table.dtype, case.seq_lens.dtype) == (torch.float16, torch.int64, torch.int32)
    assert (case.block_size, case.kv_heads, case.layout.format.name) == (32, 2, name)
    assert case.kv_cache.stride(0) == 32 * 2 * case.layout.token_bytes + 32
    again, other = synthetic(name=name), synthetic(name=name, seed=8)
    assert torch.equal(again.kv_cache, synthetic(name=name).kv_cache)
    assert not torch.equal(again.kv_cache, other.kv_cache)
    assert torch.allclose(synthetic(name=name, peak=8.0).query.float(), again.query.float() * 8)


def test_rows_have_loud_channels_where_the_format_expects_them() -> None:
    case = synthetic(name="turboquant_outlier", lengths=[400])
    keys, _ = dequantize(case.kv_cache[case.block_table[0, :25].long()], case.codec)
    loudness = keys.flatten(0, 2).std(0)
    assert case.codec.channels is not None
    loud = set(loudness.topk(4).indices.tolist())
    assert loud <= set(case.codec.channels[case.layout.normal :].tolist())
    assert loudness.topk(5).values[3] > 4 * loudness.topk(5).values[4]


@pytest.mark.parametrize("make", [synthetic_cache, bulk_case])
def test_moving_a_case_keeps_its_strides(make: Callable[..., Case]) -> None:
    case = make(slot_layout("turboquant_seed", 64), [20, 3], q_heads=4, kv_heads=2, order="head", padding=64)
    moved = case.to("cpu")
    assert moved.kv_cache.stride() == case.kv_cache.stride()
    assert torch.equal(moved.kv_cache, case.kv_cache) and torch.equal(moved.expected(), case.expected())
    assert case.to("meta").kv_cache.stride() == case.kv_cache.stride()


@pytest.mark.parametrize("name", ["turboquant_k8v4", "turboquant_outlier"])
def test_bulk_cache_is_full_of_real_data(name: str) -> None:
    layout = slot_layout(name, 64)
    cache = bulk_cache(layout, 150, 16, 2, "cpu", seed=1, padding=16)
    keys, values = dequantize(cache, Codec.for_layout(layout, 1))
    assert keys.isfinite().all() and values.isfinite().all()
    assert torch.equal(cache[:22], cache[128:150]) and not torch.equal(cache[0], cache[1])
    assert cache.stride(0) == 32 * layout.token_bytes + 16


def test_bulk_case() -> None:
    case = bulk_case(slot_layout("turboquant_4bit_nc", 64), [1000, 0, 17], q_heads=4, kv_heads=2, block_size=32)
    used = [*case.block_table[0, :32].tolist(), int(case.block_table[2, 0])]
    assert sorted(used) == list(range(33)) == list(range(len(case.kv_cache)))
    assert used != sorted(used)
    out = case.expected()
    assert out.isfinite().all() and (out[1] == 0).all() and out[0].norm() > 0
