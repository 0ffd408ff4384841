"""Small caches for ``wph_decode`` on the emulator, and what its output may differ by from the reference."""

from __future__ import annotations

import torch
from emulated import emulate_decode, worst_head_error
from torch import Tensor

from tuner.reference import Case, Codec, store, synthetic_cache
from tuner.space import Config, Problem
from tuner.suits import reads_head_major

TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 2e-3}


def check(config: Config, case: Case, splits: int = 3, **options: int) -> None:
    out = emulate_decode(config, case, splits, **options)
    error = worst_head_error(out, case.expected())
    assert error <= TOLERANCE[case.query.dtype], config.describe()


def small_case(config: Config, lengths: tuple[int, ...] = (0, 1, 70, 17), **options: object) -> Case:
    # Bulk copies of token-major caches take all of a cache's heads at once.
    kv_heads = {"bulk": 1, "bulk_rows": 2}.get(config["load"], 0) * config["head_warps"] or 2
    p = config.problem
    by_head = config["load"] == "bulk" and kv_heads % 2 == 0 and reads_head_major(config)
    options.setdefault("order", "head" if by_head else "token")
    return synthetic_cache(p.layout, lengths, q_heads=p.gqa * kv_heads, kv_heads=kv_heads, **options)  # type: ignore[arg-type]


def stored_case(problem: Problem, cache: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Case:
    """One request of one KV head: ``query`` [Hq, D], keys and values [tokens, 1, D] that fill ``cache`` in order."""
    codec, tokens = Codec.for_layout(problem.layout, 0), len(key)
    store(cache, key.bfloat16(), value.bfloat16(), torch.arange(tokens), codec)
    pages, lengths = torch.arange(len(cache), dtype=torch.int32)[None], torch.tensor([tokens], dtype=torch.int32)
    return Case(query.bfloat16()[None].contiguous(), cache, pages, lengths, problem.head_dim**-0.5, codec)
