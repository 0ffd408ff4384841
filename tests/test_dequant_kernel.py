"""wph_dequant on the emulator, against the float64 reference: the matrix of layouts, then each hazard by itself."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from functools import cache

import pytest
import torch

from tuner import emulate, geometry
from tuner.arguments import dequant_params
from tuner.build import build
from tuner.formats import FORMATS, HEAD_DIMS, slot_layout
from tuner.reference import Case, dequantize, synthetic_cache
from tuner.render import render
from tuner.space import Config, Problem, default_config, get_space, seed_config
from tuner.targets import get_target

TARGET = get_target("sm_121")
SPACE = get_space("dequant")
WARPS = (1, 2, 4, 8, 16)
UNTOUCHED = 0x7FC5
"""A bf16 NaN that no kernel produces."""

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the emulated kernels with")


def covering_configs(format_name: str, head_dim: int) -> list[Config]:
    """One allowed configuration per warp count; over them the other axes' values appear as often as chance allows."""
    rng = random.Random(f"{format_name} {head_dim}")
    problem = Problem("dequant", head_dim, 1, format_name)
    seen: set[tuple[str, object]] = set()
    chosen = []
    for warps in WARPS:
        best: tuple[int, Config] | None = None
        for _ in range(150):
            values = {a.name: rng.choice(a.values) for a in SPACE.axes} | {"warps": warps}
            if problem.layout.format.name == "turboquant_k8v4":
                values |= {"transform": "shuffle", "lookup": "table", "dim_warps": 1}
            config = SPACE.config(problem, values)
            if SPACE.refusals(config, TARGET):
                continue
            new = len(set(config.params) - seen)
            if best is None or new > best[0]:
                best = new, config
        assert best is not None
        chosen.append(best[1])
        seen |= set(best[1].params)
    return chosen


@cache
def compiled(*configs: Config) -> None:
    """Compiles all emulated kernels of a test at once."""
    emulate.compile_many([render(c) for c in configs])


def poisoned_outputs(case: Case, by_block_id: bool, gap: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value outputs, every element UNTOUCHED; ``gap`` elements lie between heads."""
    blocks = case.kv_cache.shape[0] if by_block_id else case.block_table.numel()
    row = case.layout.head_dim
    full = torch.full((2, blocks, case.block_size, case.kv_heads, row + gap), UNTOUCHED, dtype=torch.int16)
    key, value = full[..., :row].view(torch.bfloat16)
    return key, value


def run(
    config: Config,
    case: Case,
    *,
    by_block_id: bool = False,
    sides: str = "kv",
    gap: int = 0,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value outputs of one emulated launch; a side that is not asked for stays poisoned."""
    key, value = poisoned_outputs(case, by_block_id, gap)
    codec = case.codec
    params, tensors = dequant_params(
        case.kv_cache,
        case.block_table,
        case.seq_lens,
        key if "k" in sides else None,
        value if "v" in sides else None,
        cache_format=case.layout.format.name,
        head_dim=case.layout.head_dim,
        centroids=codec.centroids,
        signs=codec.signs,
        channels=codec.channels,
        by_block_id=by_block_id,
    )
    g = geometry.dequant_geometry(
        config, entries=case.block_table.numel(), block_size=case.block_size, kv_heads=case.kv_heads
    )
    launch = emulate.Launch("wph_dequant", g.grid, g.block, g.shared_bytes)
    emulate.emulate(render(config), launch, params, tensors, seed=seed)
    return key, value


def expected_rows(case: Case, by_block_id: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float64 keys and values where the outputs have them, and a mask [blocks, block_size] of the decoded tokens."""
    # The reference only reads what was stored: poisoned slots would make NaN.
    keys, values = dequantize(case.kv_cache, case.codec)
    blocks = case.kv_cache.shape[0] if by_block_id else case.block_table.numel()
    k = torch.zeros(blocks, *keys.shape[1:], dtype=torch.float64)
    v = torch.zeros_like(k)
    decoded = torch.zeros(blocks, case.block_size, dtype=torch.bool)
    columns = case.block_table.shape[1]
    for request, length in enumerate(case.seq_lens.tolist()):
        for column in range(-(-length // case.block_size)):
            block = int(case.block_table[request, column])
            to = block if by_block_id else request * columns + column
            n = min(case.block_size, length - column * case.block_size)
            k[to, :n], v[to, :n] = keys[block, :n], values[block, :n]
            decoded[to, :n] = True
    return k, v, decoded


def check(config: Config, case: Case, outputs: tuple[torch.Tensor, torch.Tensor], *, by_block_id: bool = False, sides: str = "kv") -> None:
    *references, decoded = expected_rows(case, by_block_id)
    fmt = case.layout.format
    rotated = {"k": fmt.key_codebook, "v": fmt.value_codebook}
    for side, out, ref in zip("kv", outputs, references, strict=True):
        touched = decoded if side in sides else torch.zeros_like(decoded)
        left = out[~touched].contiguous().view(torch.int16)
        assert bool((left == UNTOUCHED).all()), f"{side}: wrote outside of the decoded tokens"
        got, want = out[touched], ref[touched]
        if not rotated[side]:
            same = got == want.float().bfloat16()
            assert bool((same | (got.isnan() & want.isnan())).all()), f"{side}: not bit-exact"
            continue
        error = (got.double() - want).norm(dim=-1)
        length = want.norm(dim=-1)
        assert bool((error <= 4e-3 * length).all()), f"{side}: relative error {(error / length).max():.2e}"
        if config["transform"] == "shuffle" and config["lookup"] in ("table", "shuffle"):
            step = want.abs() * 2**-7 + length[..., None] * 1e-6  # one unit in the last place, and fp32 cancellation
            assert bool(((got.double() - want).abs() <= step).all()), f"{side}: more than one step of bf16 off"


def small_case(format_name: str, head_dim: int, **changes: object) -> Case:
    options: dict[str, object] = {"q_heads": 2, "kv_heads": 2, "block_size": 16, "seed": head_dim}
    return synthetic_cache(slot_layout(format_name, head_dim), (17, 0, 5), **options | changes)  # type: ignore[arg-type]


MATRIX = {(f, d): covering_configs(f, d) for f in FORMATS for d in HEAD_DIMS}


def test_matrix_covers_every_axis_value() -> None:
    seen = {pair for configs in MATRIX.values() for config in configs for pair in config.params}
    missing = {(a.name, v) for a in SPACE.axes for v in a.values} - seen
    assert missing == {("warps", 32)}  # test_widest_cta


@needs_gxx
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("format_name", FORMATS)
def test_matrix(format_name: str, head_dim: int) -> None:
    configs = MATRIX[format_name, head_dim]
    compiled(*configs)
    case = small_case(format_name, head_dim)
    for i, config in enumerate(configs):
        check(config, case, run(config, case, seed=i))
