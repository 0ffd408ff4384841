"""Runs ``wph_decode`` on the CPU emulator for a reference Case."""

from __future__ import annotations

import torch

from tuner.arguments import decode_params
from tuner.emulate import Launch, emulate
from tuner.geometry import decode_geometry, decode_scratch, reduce_geometry
from tuner.reference import Case
from tuner.render import render
from tuner.space import Config


def emulate_decode(config: Config, case: Case, splits: int = 2, **options: int) -> torch.Tensor:
    """The kernel's output [B, Hq, D]; poisoned with NaN first. Asserts that the counters are zero afterwards."""
    batch, kv_heads = case.query.shape[0], case.kv_heads
    scratch = decode_scratch(config, batch=batch, kv_heads=kv_heads, splits=splits)
    out = torch.full_like(case.query, float("nan"))
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
    emulate(render(config), launches, params, tensors, **options)
    assert not counters.any()
    return out


def worst_head_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest relative error over (request, head): ||out - ref|| / ||ref||; requests of length 0 must be exact."""
    out = out.double()
    difference = (out - expected).norm(dim=-1)
    size = expected.norm(dim=-1)
    error = torch.where(size > 0, difference / size.clamp_min(1e-300), torch.where(difference > 0, torch.inf, 0.0))
    return float("nan") if torch.isnan(out).any() else float(error.max())
