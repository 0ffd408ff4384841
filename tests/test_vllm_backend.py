"""Our backend class inside a real vLLM, on the CPU: what it declares, and the seam itself with our emulated kernel.

vLLM's own forward, prefill and continuation code runs unmodified around the emulated launch. Storing goes through the
reference, because vLLM's Triton store needs a GPU.
"""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.emulated import emulate_decode
from tuner.reference import Case, Codec, attend, make_cache, store
from tuner.space import default_config
from tuner.vllm import versions

if versions.objection(versions.installed()) is not None:
    pytest.skip(f"no supported vLLM: {versions.objection(versions.installed())}", allow_module_level=True)

from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends import turboquant_attn as upstream

from tuner.vllm import backend
from tuner.vllm.eligible import LayerFacts
from tuner.vllm.layer import Layer

pytestmark = pytest.mark.vllm
HEADS, KV_HEADS, DIM, FORMAT = 8, 2, 64, "turboquant_4bit_nc"
TOLERANCE = 5e-3


class EmulatedLayer(Layer):
    """Launches on the CPU emulator; ``calls`` lists the batch sizes that came, ``known`` their longest and sum."""

    def __init__(self, facts: LayerFacts) -> None:
        super().__init__(facts)
        self.calls: list[int] = []
        self.known: list[tuple[int | None, int | None]] = []

    def decode(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        centroids: torch.Tensor,
        context: int | None,
        tokens: int | None = None,
    ) -> torch.Tensor | None:
        if self.reason is not None:
            return None
        self.calls.append(query.shape[0])
        self.known.append((context, tokens))
        codec = Codec(self.facts.problem.layout, centroids, None, None)
        case = Case(query, kv_cache, block_table, seq_lens, self.facts.scale, codec)
        return emulate_decode(default_config(self.facts.problem), case)


def build(**changes: Any) -> backend.WphTurboQuantImpl:
    arguments = {
        "num_heads": HEADS, "head_size": DIM, "scale": DIM**-0.5, "num_kv_heads": KV_HEADS, "alibi_slopes": None,
        "sliding_window": None, "kv_cache_dtype": FORMAT,
    }  # fmt: skip
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu"))):
        return backend.WphTurboQuantImpl(**(arguments | changes))


def filled(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, Codec]:
    """A cache with random tokens, its block table, and the codec with vLLM's own levels."""
    generator = torch.Generator().manual_seed(1)
    layout = LayerFacts(DIM, HEADS, KV_HEADS, FORMAT, 1.0).problem.layout
    codec = Codec(layout, get_centroids(DIM, 4).float(), None, None)
    blocks = [-(-n // 16) for n in lengths]
    cache = make_cache(layout, sum(blocks) + 1, 16, KV_HEADS, generator=generator)
    table = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    ids = torch.randperm(sum(blocks), generator=generator).int()
    for row, (length, count) in enumerate(zip(lengths, blocks, strict=True)):
        table[row, :count], ids = ids[:count], ids[count:]
        slots = (table[row, torch.arange(length) // 16] * 16 + torch.arange(length) % 16).long()
        keys, values = (torch.randn(length, KV_HEADS, DIM, generator=generator) for _ in range(2))
        store(cache, keys, values, slots, codec)
    return cache, table, codec


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (out.double() - expected).norm(dim=-1)
    return float((difference / expected.norm(dim=-1)).max())


def metadata(lengths: torch.Tensor, table: torch.Tensor, query_lens: list[int], decodes: int) -> Any:
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    return upstream.TurboQuantMetadata(
        seq_lens=lengths,
        slot_mapping=torch.zeros(int(starts[-1]), dtype=torch.int64),
        block_table=table,
        query_start_loc=starts,
        num_actual_tokens=int(starts[-1]),
        max_query_len=max(query_lens),
        max_seq_len=int(lengths.max()),
        is_prefill=max(query_lens) > 1,
        num_decodes=decodes,
        num_decode_tokens=decodes,
        query_start_loc_cpu=starts,
        seq_lens_cpu=lengths,
    )


def test_what_the_backend_declares() -> None:
    cls = backend.WphTurboQuantBackend
    assert cls.get_name() == "TURBOQUANT"
    assert issubclass(cls.get_impl_cls(), upstream.TurboQuantAttentionImpl)
    builder = cls.get_builder_cls()
    assert issubclass(builder, upstream.TurboQuantMetadataBuilder)
    support = builder.get_cudagraph_support(None, None)
    assert support is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    assert upstream.TurboQuantMetadataBuilder._cudagraph_support is AttentionCGSupport.UNIFORM_BATCH
    for name in ("get_kv_cache_shape", "get_supported_kernel_block_sizes", "supports_head_size"):
        assert hasattr(cls, name) and name not in vars(cls)


def test_layers_know_what_they_want() -> None:
    plain = build()
    assert plain.wph_layer.reason is None
    assert plain.wph_layer.facts == LayerFacts(DIM, HEADS, KV_HEADS, FORMAT, DIM**-0.5)
    assert "window of 512" in build(sliding_window=512).wph_layer.reason
    assert "soft-cap" in build(logits_soft_cap=30.0).wph_layer.reason
    assert "ALiBi" in build(alibi_slopes=[0.1] * HEADS).wph_layer.reason
    assert "sinks" in build(sinks=torch.zeros(HEADS)).wph_layer.reason
    assert "head dim 96" in build(head_size=96).wph_layer.reason


def test_decode_batch_goes_through_our_kernel_and_into_the_output() -> None:
    impl = build()
    layer = impl.wph_layer = EmulatedLayer(impl.wph_layer.facts)
    lengths = torch.tensor([37, 1, 80], dtype=torch.int32)
    cache, table, codec = filled((37, 1, 80))
    query = torch.randn(3, HEADS * DIM).bfloat16()
    owner = SimpleNamespace()
    output = torch.zeros(3, HEADS * DIM, dtype=torch.bfloat16)
    step = metadata(lengths, table, [1, 1, 1], 3)
    impl.forward(owner, query, query, query, cache, step, output)
    expected = attend(query.view(3, HEADS, DIM), cache, table, lengths, impl.scale, codec)
    assert layer.calls == [3] and layer.known == [(80, 118)]
    lengths += 1  # not looked at again by another layer of the step
    assert backend._tokens(step, 3) == 118 and backend._tokens(step, 2) == 40
    assert backend._tokens(SimpleNamespace(), 3) is None, "versions that leave no lengths on the host"
    sealed = namedtuple("Sealed", "seq_lens_cpu")(lengths)
    assert backend._tokens(sealed, 3) == 121, "metadata that takes no notes"
    lengths -= 1
    assert torch.equal(owner._tq_centroids, codec.centroids)
    assert error(output.view(3, HEADS, DIM), expected) <= TOLERANCE


def test_small_continuation_chunks_go_through_our_kernel() -> None:
    impl = build()
    layer = impl.wph_layer = EmulatedLayer(impl.wph_layer.facts)
    lengths = torch.tensor([60], dtype=torch.int32)
    cache, table, codec = filled((60,))
    chunk = 5
    query = torch.randn(chunk, HEADS * DIM).bfloat16()
    kv = torch.randn(chunk, KV_HEADS * DIM).bfloat16()
    output = torch.zeros(chunk, HEADS * DIM, dtype=torch.bfloat16)
    impl.forward(SimpleNamespace(), query, kv, kv, cache, metadata(lengths, table, [chunk], 0), output)
    rows = torch.arange(56, 61, dtype=torch.int32)
    expected = attend(query.view(chunk, HEADS, DIM), cache, table.expand(chunk, -1), rows, impl.scale, codec)
    assert layer.calls == [chunk]
    assert error(output.view(chunk, HEADS, DIM), expected) <= TOLERANCE


def test_mixed_batches_split_between_both_calls() -> None:
    impl = build()
    layer = impl.wph_layer = EmulatedLayer(impl.wph_layer.facts)
    lengths = torch.tensor([20, 33], dtype=torch.int32)
    cache, table, codec = filled((20, 33))
    query = torch.randn(4, HEADS * DIM).bfloat16()
    kv = torch.randn(4, KV_HEADS * DIM).bfloat16()
    output = torch.zeros(4, HEADS * DIM, dtype=torch.bfloat16)
    impl.forward(SimpleNamespace(), query, kv, kv, cache, metadata(lengths, table, [1, 3], 1), output)
    rows, tables = torch.tensor([20, 31, 32, 33], dtype=torch.int32), table[[0, 1, 1, 1]]
    expected = attend(query.view(4, HEADS, DIM), cache, tables, rows, impl.scale, codec)
    assert layer.calls == [1, 3]
    assert error(output.view(4, HEADS, DIM), expected) <= TOLERANCE


@pytest.mark.parametrize("queries", [1, 3])
def test_what_we_decline_reaches_upstreams_kernel(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    impl = build(sliding_window=512)
    seen: list[torch.Size] = []

    def kernel(**call: Any) -> torch.Tensor:
        seen.append(call["query"].shape)
        return torch.ones_like(call["query"])

    monkeypatch.setattr(backend, "_upstream_decode", kernel)
    cache, table, _ = filled((40,))
    query = torch.randn(queries, HEADS * DIM).bfloat16()
    kv = torch.randn(queries, KV_HEADS * DIM).bfloat16()
    output = torch.zeros(queries, HEADS * DIM, dtype=torch.bfloat16)
    lengths = torch.tensor([40], dtype=torch.int32)
    impl.forward(
        SimpleNamespace(), query, kv, kv, cache, metadata(lengths, table, [queries], int(queries == 1)), output
    )
    assert seen == [(queries, HEADS, DIM)]
    assert bool((output == 1).all())


def test_the_hook_can_be_taken_back() -> None:
    assert upstream.triton_turboquant_decode_attention is backend._continuation_decode
    backend.unhook()
    try:
        assert upstream.triton_turboquant_decode_attention is backend._upstream_decode
    finally:
        backend.hook()


def test_the_codebook_is_the_one_our_formats_expect() -> None:
    for dim in (64, 128, 256, 512):
        for bits in (3, 4):
            name = "turboquant_4bit_nc" if bits == 4 else "turboquant_3bit_nc"
            ours = Codec.for_layout(LayerFacts(dim, 8, 8, name, 1.0).problem.layout).centroids
            levels = get_centroids(dim, bits).float()
            assert bool((levels[1:] > levels[:-1]).all())
            torch.testing.assert_close(levels, ours, rtol=0, atol=1e-6)


def test_the_builder_prepares_the_layers_that_vllm_constructed() -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    config = VllmConfig(device_config=DeviceConfig("cpu"))
    impl = build(sliding_window=512)
    config.compilation_config.static_forward_context["layers.3.attn"] = SimpleNamespace(impl=impl)
    spec = FullAttentionSpec(block_size=16, num_kv_heads=KV_HEADS, head_size=DIM, dtype=torch.bfloat16)
    # Without a model vLLM's configuration lacks what we read: the builder must come up all the same.
    builder = backend.WphTurboQuantMetadataBuilder(spec, ["layers.3.attn"], config, torch.device("cpu"))
    assert builder.reorder_batch_threshold == 1
    config.model_config = SimpleNamespace(max_model_len=4096, dtype=torch.bfloat16, enable_sleep_mode=False)
    backend.WphTurboQuantMetadataBuilder(spec, ["layers.3.attn"], config, torch.device("cpu"))
    assert impl.wph_layer.name == "layers.3.attn"
    assert "window of 512" in impl.wph_layer.reason


@pytest.mark.parametrize("serves", [True, False])
def test_new_keys_and_values_are_offered_to_our_store_first(serves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ours: list[dict[str, Any]] = []
    theirs: list[torch.Tensor] = []

    def store(**call: Any) -> bool:
        ours.append(call)
        return serves

    impl = build()
    assert impl.wph_store is not None and impl.wph_store.reason is None
    impl.wph_store = SimpleNamespace(store=store)
    monkeypatch.setattr(upstream, "triton_turboquant_store", lambda key, *rest, **options: theirs.append(key))
    cache, _, codec = filled((40,))
    key, value = (torch.randn(5, KV_HEADS * DIM).bfloat16() for _ in range(2))
    slots = torch.tensor([3, 17, -1], dtype=torch.int64)  # of a batch padded to 5
    impl.do_kv_cache_update(SimpleNamespace(), key, value, cache, slots)
    (call,) = ours
    assert call["key"].shape == call["value"].shape == (3, KV_HEADS, DIM)
    assert call["slot_mapping"] is slots and call["kv_cache"] is cache
    assert torch.equal(call["centroids"], codec.centroids)
    assert len(theirs) == (0 if serves else 1)
