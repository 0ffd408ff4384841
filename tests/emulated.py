"""Runs ``wph_decode``, ``wph_dequant`` and ``wph_store`` on the CPU emulator."""

from __future__ import annotations

import shutil

import pytest
import torch

from tuner.arguments import decode_params, dequant_params, store_params
from tuner.check_store import StoreCase
from tuner.emulate import Launch, emulate
from tuner.geometry import decode_geometry, decode_scratch, reduce_geometry
from tuner.launch import dequant_launches, store_launches
from tuner.reference import Case, Codec
from tuner.render import Source, render
from tuner.space import Config

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the emulated kernels with")


def emulate_decode(
    config: Config,
    case: Case,
    splits: int = 2,
    *,
    into: torch.Tensor | None = None,
    source: Source | None = None,
    **options: int,
) -> torch.Tensor:
    """The kernel's output [B, Hq, D], ``into`` where given; poisoned with NaN first. Asserts that the counters are zero
    afterwards. ``source`` runs in the place of what ``config`` renders to.
    """
    batch, kv_heads = case.query.shape[0], case.kv_heads
    scratch = decode_scratch(config, batch=batch, kv_heads=kv_heads, splits=splits)
    out = (torch.empty_like(case.query) if into is None else into).fill_(float("nan"))
    partials = torch.full((max(scratch.partial_floats, 1),), float("nan"), dtype=torch.float32)
    counters = torch.zeros(max(scratch.counters, 1), dtype=torch.int32)
    codec = case.codec
    params, tensors = decode_params(
        case.query,
        case.kv_cache,
        case.block_table,
        case.seq_lens,
        out,
        cache_format=config.problem.cache_format,
        scale=case.scale,
        splits=splits,
        partials=partials,
        counters=counters,
        centroids=codec.centroids,
        signs=codec.signs,
        channels=codec.channels,
    )
    geometry = decode_geometry(config, batch=batch, kv_heads=kv_heads, splits=splits)
    launches = [Launch("wph_decode", geometry.grid, geometry.block, geometry.shared_bytes)]
    if config["reduction"] == "kernel":
        reduce = reduce_geometry(config, batch=batch, kv_heads=kv_heads)
        launches.append(Launch("wph_decode_reduce", reduce.grid, reduce.block, reduce.shared_bytes))
    emulate(source or render(config), launches, params, tensors, **options)
    assert not counters.any()
    return out


def emulate_dequant(
    config: Config,
    codec: Codec,
    kv_cache: torch.Tensor,
    key_out: torch.Tensor | None,
    value_out: torch.Tensor | None,
    *,
    block_table: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    dirty: torch.Tensor | None = None,
    by_block_id: bool = False,
    **options: int,
) -> None:
    """One launch, into the outputs."""
    params, tensors = dequant_params(
        kv_cache,
        block_table,
        seq_lens,
        key_out,
        value_out,
        cache_format=config.problem.cache_format,
        head_dim=config.problem.head_dim,
        centroids=codec.centroids,
        signs=codec.signs,
        channels=codec.channels,
        by_block_id=by_block_id,
        dirty=dirty,
    )
    launches = [
        Launch(entry, g.grid, g.block, g.shared_bytes)
        for entry, g in dequant_launches(config, kv_cache, block_table, dirty)
    ]
    emulate(render(config), launches, params, tensors, **options)


def emulate_store(config: Config, kv_cache: torch.Tensor, case: StoreCase, **options: int) -> None:
    """One launch, of the case's rows into ``kv_cache``."""
    codec = case.codec
    params, tensors = store_params(
        kv_cache,
        case.key,
        case.value,
        case.slot_mapping,
        cache_format=config.problem.cache_format,
        centroids=codec.centroids,
        signs=codec.signs,
        channels=codec.channels,
    )
    launches = [
        Launch(entry, g.grid, g.block, g.shared_bytes)
        for entry, g in store_launches(config, kv_cache, case.slot_mapping)
    ]
    emulate(render(config), launches, params, tensors, **options)


def worst_head_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest relative error over (request, head): ||out - ref|| / ||ref||; requests of length 0 must be exact."""
    out = out.double()
    difference = (out - expected).norm(dim=-1)
    size = expected.norm(dim=-1)
    error = torch.where(size > 0, difference / size.clamp_min(1e-300), torch.where(difference > 0, torch.inf, 0.0))
    return float("nan") if torch.isnan(out).any() else float(error.max())
