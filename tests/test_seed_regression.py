"""The seed's regression cases, and head dims 64 and 512: against float64 *and* against the vectors that were stored.

The seed held one kernel against another. Both lost the same 14.8% of the coefficients, so they agreed. Here every case
runs through store, dequantisation and decode attention, and the error against the original vectors must be what the
format allows: the codebook's distortion alone, or, for the seed's own format, its known loss, no more and no less.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from emulated import emulate_decode, emulate_dequant, emulate_store, needs_gxx, worst_head_error

import tuner
from tuner.check import TOLERANCE
from tuner.check_store import StoreCase
from tuner.emulate import compile_many
from tuner.formats import SlotLayout, slot_layout
from tuner.reference import Case, Codec, dequantize, make_cache
from tuner.render import render
from tuner.space import Problem, default_config

DISTORTION = 0.0095
"""Mean squared error of 16 Lloyd-Max levels for a standard normal variable (Max 1960, table I)."""
GQA = 4


@dataclass(frozen=True)
class SeedCase:
    """One case: ``tokens`` keys and values of ``kv_heads`` heads, coded in ``cache_format``."""

    head_dim: int
    cache_format: str
    tokens: int = 8
    kv_heads: int = 2

    @property
    def layout(self) -> SlotLayout:
        return slot_layout(self.cache_format, self.head_dim)

    @property
    def expected_error(self) -> float:
        """Of the normal channels' energy: the share that the format loses, and the distortion of what it keeps.

        Stored are ``kept`` of the transform's coefficients; of what is lost, ``normal`` shows in the normal channels.
        """
        layout = self.layout
        kept, normal = layout.key.coefficients / layout.block_d, layout.normal / layout.block_d
        return (1 - kept) * normal + DISTORTION * kept * normal

    def originals(self, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """bf16 keys and values [tokens, Hk, D]."""
        generator = torch.Generator().manual_seed(42)
        shape = (2, self.tokens, self.kv_heads, self.head_dim)
        key, value = torch.randn(shape, generator=generator).bfloat16().to(device)
        return key, value


def _cases() -> list[SeedCase]:
    """The seed's six in its order, then the head dims that it lacked; outliers in both formats that have them."""
    cases = []
    for head_dim, outliers, tokens, kv_heads in (
        (256, True, 8, 2),
        (256, True, 16, 4),
        (256, False, 8, 2),
        (128, True, 8, 2),
        (128, False, 8, 2),
        (256, True, 64, 4),
        (64, True, 64, 4),
        (64, False, 64, 4),
        (512, True, 64, 4),
        (512, False, 64, 4),
    ):
        names = ("turboquant_seed", "turboquant_outlier") if outliers else ("turboquant_seed_dense",)
        cases += [SeedCase(head_dim, name, tokens, kv_heads) for name in names]
    return cases


every_case = pytest.mark.parametrize(
    "case", _cases(), ids=lambda c: f"{c.cache_format.removeprefix('turboquant_')}-{c.head_dim}-{c.tokens}x{c.kv_heads}"
)


@lru_cache(maxsize=1)
def compile_all() -> None:
    problems = {(op, c.head_dim, c.cache_format) for c in _cases() for op in ("store", "dequant")}
    compile_many([render(default_config(Problem(op, d, 1, name))) for op, d, name in sorted(problems)])


def normal_channels(codec: Codec) -> torch.Tensor:
    layout = codec.layout
    ids = torch.arange(layout.head_dim, dtype=torch.int32) if codec.channels is None else codec.channels
    return ids[: layout.normal].long()


def check_rows(case: SeedCase, cache: torch.Tensor, codec: Codec, rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    """``rows``: bf16 keys and values of all blocks, as the kernel decoded them from ``cache``."""
    for side, got, exact, original in zip(
        "kv", rows, dequantize(cache, codec), case.originals(str(cache.device)), strict=True
    ):
        got, exact = got.flatten(0, 1)[: case.tokens].double(), exact.flatten(0, 1)[: case.tokens]
        deviation = (got - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert bool((deviation <= 4e-3).all()), f"{side}: {float(deviation.max()):.1e} off the float64 reference"

        x, normal = original.double(), normal_channels(codec).to(cache.device)
        error = float((got - x)[..., normal].square().sum() / x[..., normal].square().sum())
        assert error == pytest.approx(case.expected_error, rel=0.12), f"{side}: of the energy, {error:.4f} are lost"
        if codec.channels is not None:
            outliers = codec.channels[case.layout.normal :].long()
            assert torch.equal(got[..., outliers], x[..., outliers]), f"{side}: outliers are stored as they are"


@needs_gxx
@every_case
def test_rows_on_the_emulator(case: SeedCase) -> None:
    compile_all()
    codec = Codec.for_layout(case.layout, seed=0)
    cache = make_cache(case.layout, case.tokens // 2, 2, case.kv_heads)  # blocks of two tokens, as the seed has it
    config = default_config(Problem("store", case.head_dim, 1, case.cache_format))
    emulate_store(config, cache, StoreCase(*case.originals("cpu"), torch.arange(case.tokens), cache, codec))
    key, value = torch.full((2, *cache.shape[:1], 2, case.kv_heads, case.head_dim), torch.nan, dtype=torch.bfloat16)
    table = torch.arange(case.tokens // 2, dtype=torch.int32)[None]
    lengths = torch.tensor([case.tokens], dtype=torch.int32)
    config = default_config(Problem("dequant", case.head_dim, 1, case.cache_format))
    emulate_dequant(config, codec, cache, key, value, block_table=table, seq_lens=lengths)
    check_rows(case, cache, codec, (key, value))


def attend_originals(case: SeedCase, query: torch.Tensor) -> torch.Tensor:
    """Attention of one request over the stored vectors themselves, float64 [1, Hq, D]."""
    key, value = (x.double() for x in case.originals(str(query.device)))
    grouped = query[0].double().unflatten(0, (case.kv_heads, GQA))
    weights = torch.softmax(torch.einsum("hgd,thd->hgt", grouped, key) * case.head_dim**-0.5, dim=-1)
    return torch.einsum("hgt,thd->hgd", weights, value).flatten(0, 1)[None]


def check_attention(case: SeedCase, device: str, decode: Callable[[Case], torch.Tensor]) -> None:
    codec = Codec.for_layout(case.layout, seed=0).to(device)
    cache = make_cache(case.layout, -(-case.tokens // 16), 16, case.kv_heads, device=device)
    tuner.store(
        cache,
        *case.originals(device),
        torch.arange(case.tokens, device=device),
        cache_format=case.cache_format,
        centroids=codec.centroids,
        signs=codec.signs,
        channels=codec.channels,
    )
    query = torch.randn(1, GQA * case.kv_heads, case.head_dim, generator=torch.Generator().manual_seed(7))
    call = Case(
        query=query.bfloat16().to(device),
        kv_cache=cache,
        block_table=torch.arange(cache.shape[0], dtype=torch.int32, device=device)[None],
        seq_lens=torch.tensor([case.tokens], dtype=torch.int32, device=device),
        scale=case.head_dim**-0.5,
        codec=codec,
    )
    out = decode(call)
    assert worst_head_error(out, call.expected()) <= TOLERANCE[torch.bfloat16]
    original = attend_originals(case, call.query)
    error = float((out.double() - original).norm() / original.norm())
    # The values' error, root of the energy lost, and that of the keys in the weights on top of it.
    layout = case.layout
    values = (case.expected_error * layout.normal / layout.head_dim) ** 0.5
    assert 0.8 * values <= error <= 1.6 * values, f"{error:.3f} against values' {values:.3f}"


@needs_gxx
@every_case
def test_attention_on_the_emulator(case: SeedCase) -> None:
    config = default_config(Problem("decode", case.head_dim, GQA, case.cache_format))
    check_attention(case, "cpu", lambda call: emulate_decode(config, call))


# From here on a GPU is needed.


@pytest.mark.gpu
@every_case
def test_rows_on_a_gpu(case: SeedCase) -> None:
    codec = Codec.for_layout(case.layout, seed=0).to("cuda")
    constants = {"centroids": codec.centroids, "signs": codec.signs, "channels": codec.channels}
    cache = make_cache(case.layout, case.tokens // 2, 2, case.kv_heads, device="cuda")
    slots = torch.arange(case.tokens, device="cuda")
    tuner.store(cache, *case.originals("cuda"), slots, cache_format=case.cache_format, **constants)
    table = torch.arange(case.tokens // 2, dtype=torch.int32, device="cuda")[None]
    lengths = torch.tensor([case.tokens], dtype=torch.int32, device="cuda")
    key, value = tuner.dequantize(
        cache, table, lengths, cache_format=case.cache_format, head_dim=case.head_dim, **constants
    )
    assert key is not None and value is not None
    check_rows(case, cache, codec, (key, value))


@pytest.mark.gpu
@every_case
def test_attention_on_a_gpu(case: SeedCase) -> None:
    codec = Codec.for_layout(case.layout, seed=0).to("cuda")

    def decode(call: Case) -> torch.Tensor:
        return tuner.decode_attention(
            call.query,
            call.kv_cache,
            call.block_table,
            call.seq_lens,
            scale=call.scale,
            cache_format=case.cache_format,
            centroids=codec.centroids,
            signs=codec.signs,
            channels=codec.channels,
        )

    check_attention(case, "cuda", decode)
