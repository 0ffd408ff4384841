"""The public calls on a machine without a GPU: the store's reference path, and refusals in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tuner.api import decode_attention, dequantize, load_tables, store
from tuner.errors import TunerError, UsageError
from tuner.formats import slot_layout
from tuner.kernels import Tables
from tuner.launch import LoadedKernel, Workspace, require_layout, shared_workspace, store_launches
from tuner.reference import Codec, make_cache, synthetic_cache
from tuner.reference import store as reference_store
from tuner.space import Problem, default_config

FORMAT = "turboquant_4bit_nc"
LAYOUT = slot_layout(FORMAT, 64)

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: this is what happens without one")


def rows(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    key, value = (torch.randn(count, 2, 64, generator=generator).bfloat16() for _ in range(2))
    return key, value, torch.randperm(48, generator=generator)[:count]


def test_store_on_the_cpu_is_the_reference() -> None:
    key, value, slots = rows(20)
    slots[3] = -1
    ours, theirs = (make_cache(LAYOUT, 3, 16, 2, generator=torch.Generator().manual_seed(2)) for _ in range(2))
    before = ours.clone()
    store(ours, key, value, slots, cache_format=FORMAT)
    reference_store(theirs, key, value, slots, Codec.for_layout(LAYOUT))
    assert torch.equal(ours, theirs)
    assert (ours != before).any(dim=-1).any(dim=-1).sum() == 19  # as many tokens as slots that are not negative


def test_a_layers_own_levels_replace_the_default_ones() -> None:
    key, value, slots = rows(20)
    default, scaled = (make_cache(LAYOUT, 3, 16, 2, generator=torch.Generator().manual_seed(2)) for _ in range(2))
    store(default, key, value, slots, cache_format=FORMAT)
    levels = Codec.for_layout(LAYOUT).centroids * 3
    store(scaled, key, value, slots, cache_format=FORMAT, centroids=levels)
    assert not torch.equal(default, scaled)


def test_the_gpus_calls_refuse_tensors_on_the_cpu() -> None:
    case = synthetic_cache(LAYOUT, (20, 3), q_heads=8, kv_heads=2)
    with pytest.raises(UsageError, match="kv_cache is on cpu: expected a CUDA device"):
        decode_attention(
            case.query, case.kv_cache, case.block_table, case.seq_lens, scale=case.scale, cache_format=FORMAT
        )
    arguments = (case.kv_cache, case.block_table, case.seq_lens)
    with pytest.raises(UsageError, match="kv_cache is on cpu"):
        dequantize(*arguments, cache_format=FORMAT, head_dim=64)
    with pytest.raises(UsageError, match="which is 'keys': expected 'both', 'key' or 'value'"):
        dequantize(*arguments, cache_format=FORMAT, head_dim=64, which="keys")


def test_formats_that_do_not_exist_are_named() -> None:
    key, value, slots = rows(2)
    with pytest.raises(UsageError, match="turboquant_9bit"):
        store(make_cache(LAYOUT, 1, 16, 2), key, value, slots, cache_format="turboquant_9bit")


@without_gpu
def test_tables_and_kernels_need_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(TunerError, match="no NVIDIA GPU"):
        load_tables(tmp_path)
    with pytest.raises(TunerError, match="the emulator runs without"):
        LoadedKernel.load(b"", default_config(Problem("decode", 64, 4, FORMAT)))
    with pytest.raises((RuntimeError, AssertionError)):  # torch's own words
        Tables(tmp_path, device=0).select(Problem("decode", 64, 4, FORMAT), batch=1, kv_heads=2)


def test_scratch_grows_and_keeps_what_a_graph_may_hold() -> None:
    space = Workspace("cpu")
    first = space.counters(10)
    assert space.counters(1000) is first and not first.any()
    grown = space.counters(first.numel() + 1)
    assert grown.numel() == 2 * first.numel() and not grown.any()
    assert space.partials(1).dtype == torch.float32
    assert shared_workspace(torch.device("cpu")) is shared_workspace(torch.device("cpu"))


def test_constants_of_another_layout_are_refused() -> None:
    config = default_config(Problem("store", 128, 1, FORMAT))
    with pytest.raises(
        UsageError, match=f"constants of {FORMAT} at head dim 64 for a kernel of {FORMAT} at head dim 128"
    ):
        require_layout(config, Codec.for_layout(LAYOUT))


def test_a_store_without_tokens_launches_nothing() -> None:
    config = default_config(Problem("store", 64, 1, FORMAT))
    cache = make_cache(LAYOUT, 3, 16, 2)
    assert store_launches(config, cache, torch.empty(0, dtype=torch.int64)) == []
    ((entry, geometry),) = store_launches(config, cache, torch.arange(5))
    assert entry == "wph_store" and geometry.grid[0] > 0
