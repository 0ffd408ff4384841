"""The seed's norm lies at an odd byte: every kernel at every parity of it, on the emulator and on a GPU.

The emulator checks alignment, so a halfword or word at an address that does not allow it ends the run; a GPU ends it
with "misaligned address".
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from emulated import emulate_decode, emulate_dequant, emulate_store, needs_gxx, worst_head_error
from odd_caches import restride

import tuner
from tuner.check import TOLERANCE
from tuner.check_store import StoreCase, compare, store_case
from tuner.emulate import compile_many
from tuner.errors import UsageError
from tuner.formats import HEAD_DIMS, SEED_FORMATS, slot_layout
from tuner.launch import cache_order
from tuner.reference import Case, dequantize, store, synthetic_cache
from tuner.render import render
from tuner.space import Config, Problem, default_config
from tuner.suits import refusal, suited

BASES = (0, 1, 2, 3)
"""Bytes between a multiple of 4 and the cache: with the slots' power-of-two sizes, the residue of every slot."""
CASES = [(name, d) for name in (*SEED_FORMATS, "turboquant_k3v4_nc") for d in HEAD_DIMS]
GQA = 4

every_case = pytest.mark.parametrize(("format_name", "head_dim"), CASES)


def config_of(op: str, format_name: str, head_dim: int) -> Config:
    return default_config(Problem(op, head_dim, GQA if op == "decode" else 1, format_name))


@lru_cache(maxsize=2)
def decode_case(format_name: str, head_dim: int) -> Case:
    return synthetic_cache(slot_layout(format_name, head_dim), (17, 0, 3), q_heads=2 * GQA, kv_heads=2, seed=head_dim)


def at_base(case: Case, base: int) -> Case:
    return replace(case, kv_cache=restride(case.kv_cache, fill=0xFF, base=base))


@pytest.fixture(scope="module")
def compiled() -> None:
    configs = [config_of(op, *case) for case in CASES for op in ("dequant", "store", "decode")]
    compile_many([render(config) for config in configs])


def test_norms_meet_every_residue() -> None:
    """Were the seed's layout to change, the tests below would no longer be about odd norms."""
    offsets = {d: slot_layout("turboquant_seed", d).key.norm_offset for d in HEAD_DIMS}
    assert offsets == {64: 46, 128: 93, 256: 185, 512: 370}
    for format_name, d in CASES:
        layout = slot_layout(format_name, d)
        assert layout.key.norm_offset is not None
        if layout.format.separate_planes:  # slots of a power of two bytes: all at the base's residue
            assert {(base + layout.key.norm_offset) % 4 for base in BASES} == {0, 1, 2, 3}


def assert_rows(case: Case, key: torch.Tensor, value: torch.Tensor) -> None:
    """``key``, ``value``: images of the cache by block id."""
    for side, image, reference in zip("kv", (key, value), dequantize(case.kv_cache, case.codec), strict=True):
        for request, length in enumerate(case.seq_lens.tolist()):
            for token in range(length):
                block, row = int(case.block_table[request, token // 16]), token % 16
                got, want = image[block, row].double(), reference[block, row]
                error = (got - want).norm(dim=-1) / want.norm(dim=-1)
                assert bool((error <= 4e-3).all()), f"{side}, request {request}, token {token}"


def empty_image(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (*case.kv_cache.shape[:1], 16, case.kv_heads, case.layout.head_dim)
    key, value = torch.full((2, *shape), torch.nan, dtype=torch.bfloat16, device=case.query.device)
    return key, value


@needs_gxx
@pytest.mark.usefixtures("compiled")
@every_case
def test_dequant(format_name: str, head_dim: int) -> None:
    config = config_of("dequant", format_name, head_dim)
    for base in BASES:
        case = at_base(decode_case(format_name, head_dim), base)
        key, value = empty_image(case)
        emulate_dequant(
            config,
            case.codec,
            case.kv_cache,
            key,
            value,
            block_table=case.block_table,
            seq_lens=case.seq_lens,
            by_block_id=True,
        )
        assert_rows(case, key, value)


@needs_gxx
@pytest.mark.usefixtures("compiled")
@every_case
def test_decode(format_name: str, head_dim: int) -> None:
    """Both parities of the norm occur at even slots; caches at odd addresses are refused in one line."""
    default = config_of("decode", format_name, head_dim)
    for base in BASES:
        case = at_base(decode_case(format_name, head_dim), base)
        order = cache_order(case.kv_cache)
        config = suited(default, order)
        if base % 2:
            assert "slots are not aligned to 2 bytes" in (refusal(config, order) or "")
        else:
            assert worst_head_error(emulate_decode(config, case), case.expected()) <= TOLERANCE[case.query.dtype]


def assert_stored(case: StoreCase, got: torch.Tensor, base: int) -> None:
    """``got``: ``case.before`` after the store."""
    want = restride(case.before, fill=0xA5, base=base)
    store(want, case.key, case.value, case.slot_mapping, case.codec)
    assert compare(got, want, case).fault is None


@needs_gxx
@pytest.mark.usefixtures("compiled")
@every_case
def test_store(format_name: str, head_dim: int) -> None:
    config = config_of("store", format_name, head_dim)
    plain = store_case(config.problem, 7, seed=head_dim)
    for base in BASES:
        case = replace(plain, before=restride(plain.before, fill=0xA5, base=base))
        got = restride(case.before, fill=0xA5, base=base)
        emulate_store(config, got, case)
        assert_stored(case, got, base)


# From here on a GPU is needed.


@pytest.mark.gpu
@pytest.mark.parametrize("base", BASES)
@every_case
def test_all_kernels_on_a_gpu(format_name: str, head_dim: int, base: int) -> None:
    case = at_base(decode_case(format_name, head_dim), base).to("cuda")
    codec = case.codec
    constants = {"centroids": codec.centroids, "signs": codec.signs, "channels": codec.channels}
    out = empty_image(case)
    tuner.dequantize(
        case.kv_cache,
        case.block_table,
        case.seq_lens,
        cache_format=format_name,
        head_dim=head_dim,
        by_block_id=True,
        out=out,
        **constants,
    )
    assert_rows(case, *out)

    def decoded() -> torch.Tensor:
        arguments = (case.query, case.kv_cache, case.block_table, case.seq_lens)
        return tuner.decode_attention(*arguments, scale=case.scale, cache_format=format_name, **constants)

    if base % 2:
        with pytest.raises(UsageError, match=r"slots are not aligned to 2 bytes; dequantize\(\) can"):
            decoded()
    else:
        assert worst_head_error(decoded(), case.expected()) <= TOLERANCE[case.query.dtype]

    written = store_case(Problem("store", head_dim, 1, format_name), 7, seed=head_dim, device="cuda")
    written = replace(written, before=restride(written.before, fill=0xA5, base=base))
    got = restride(written.before, fill=0xA5, base=base)
    rows = (written.key, written.value, written.slot_mapping)
    layer = written.codec
    tuner.store(
        got, *rows, cache_format=format_name, centroids=layer.centroids, signs=layer.signs, channels=layer.channels
    )
    assert_stored(written, got, base)
