"""Eligibility, prebuilt defaults, the choice of kernels and what becomes of broken files; no GPU, no vLLM."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tuner.errors import TunerError
from tuner.geometry import decode_scratch, dynamic_shared_bytes, split_candidates
from tuner.space import Config, Problem, default_config
from tuner.space.decode_landmarks import direct_variant
from tuner.suits import CacheOrder
from tuner.table import (
    BatchEntry,
    BucketEntry,
    Device,
    Kernel,
    Provenance,
    Table,
    TableError,
    Timing,
    kernel_id,
    write,
)
from tuner.targets import get_target
from tuner.vllm import defaults, log
from tuner.vllm.dispatch import Chosen, Dispatch
from tuner.vllm.eligible import LayerFacts, layer_facts, objection
from tuner.vllm.layer import Layer
from tuner.vllm.scratch import Scratch
from tuner.vllm.startup import prepare
from tuner.vllm.summary import share, summary

ARCH = "sm_90"
TARGET = replace(get_target(ARCH), device_name="NVIDIA untuned")  # a device that no shipped table is for
PROBLEM = Problem("decode", 128, 4, "turboquant_4bit_nc")
CONFIG = default_config(PROBLEM)
ORDER = CacheOrder.standard(CONFIG, kv_heads=8)
ODD = replace(ORDER, address=6, block=ORDER.block + 6)


@dataclass(frozen=True)
class Loaded:
    """What a loader makes of a cubin: the kernel's configuration is all that a choice needs."""

    config: Config


def kernel(config: Config, image: bytes) -> Kernel:
    sha = hashlib.sha256(image).hexdigest()
    return Kernel(kernel_id(ARCH, sha), config.params, "ab" * 32, sha, ARCH, 128, dynamic_shared_bytes(config), 0)


FAST, OTHER = b"\x7fELF fast", b"\x7fELF other"
K_FAST, K_OTHER = kernel(CONFIG, FAST), kernel(CONFIG.with_(warps=8), OTHER)


def timing(context: int) -> Timing:
    return Timing(context, False, 20.0, 19.0, 21.0, 12.0, {"triton": 200.0}, "memory")


def table(name: str = TARGET.device_name, arch: str = ARCH) -> Table:
    kernels = tuple(replace(k, arch=arch, id=kernel_id(arch, k.cubin_sha256)) for k in (K_FAST, K_OTHER))
    by_batch = tuple(BatchEntry(b, kernels[0].id, 12, 1.1, 1.05, (timing(4096),)) for b in (1, 8))
    buckets = tuple(BucketEntry(b, kernels[1].id, s, timing(c)) for b in (1, 8) for c, s in ((1024, 4), (16384, 33)))
    device = Device(name, arch, 132)
    return Table(PROBLEM, 8, device, Provenance("2026-01-01T00:00:00Z", 0), "measured", kernels, by_batch, buckets)


def write_table(folder: Path, t: Table | None = None) -> Path:
    t = t or table()
    return write(t, folder, {k.id: image for k, image in zip(t.kernels, (FAST, OTHER), strict=True)})


def write_defaults(folder: Path) -> Path:
    images = (b"\x7fELF default", b"\x7fELF direct")
    kernels = (kernel(CONFIG, images[0]), kernel(direct_variant(CONFIG), images[1]))
    made = defaults.Defaults(PROBLEM, ARCH, kernels, dict(zip((k.id for k in kernels), images, strict=True)))
    return defaults.write(made, folder)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    monkeypatch.setenv("VLLM_CONFIG_ROOT", str(tmp_path / "none"))
    monkeypatch.setattr(log, "_said", set())
    return tmp_path


def dispatch(kv_heads: int = 8) -> Dispatch:
    return Dispatch(PROBLEM, kv_heads, TARGET, lambda image, config: Loaded(config))  # type: ignore[arg-type,return-value]


def chosen_by(chooser: Dispatch, batch: int, order: CacheOrder = ORDER, context: int | None = None) -> Chosen:
    chosen = chooser.choose(batch, context, 32768, order)
    assert isinstance(chosen, Chosen), chosen
    return chosen


def arguments(**changes: object) -> dict[str, object]:
    base = {"num_heads": 32, "head_size": 128, "scale": 0.1, "num_kv_heads": 8, "kv_cache_dtype": "turboquant_4bit_nc"}
    return base | changes


def test_plain_layer_is_eligible() -> None:
    facts = layer_facts(arguments())
    assert objection(facts) is None
    assert facts.problem == PROBLEM and facts.kv_heads == 8
    assert layer_facts(arguments(num_kv_heads=None)).kv_heads == 32


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"sliding_window": 1024}, "sliding window of 1024"),
        ({"kwargs": {"sinks": torch.zeros(32)}}, "attention sinks"),
        ({"logits_soft_cap": 50.0}, "soft-cap of 50"),
        ({"alibi_slopes": [0.5] * 32}, "ALiBi"),
        ({"attn_type": "encoder_only"}, "attention type encoder_only"),
        ({"kwargs": {"chunk_lookback": 2}}, "chunked attention"),
        ({"head_size": 96}, "unsupported head dim 96"),
        ({"num_kv_heads": 1}, "unsupported group size 32"),
        ({"kv_cache_dtype": "turboquant_5bit"}, "turboquant_5bit"),
        ({"kv_cache_dtype": "turboquant_seed"}, "turboquant_seed"),
    ],
)
def test_layers_that_vllm_keeps(change: dict[str, object], word: str) -> None:
    assert word in (objection(layer_facts(arguments(**change))) or "")


def test_features_that_are_switched_off_do_not_count() -> None:
    facts = layer_facts(arguments(sliding_window=-1, logits_soft_cap=0.0, attn_type="decoder", kwargs={"sinks": None}))
    assert objection(facts) is None


def test_graphs_go_by_batch_and_eager_calls_by_batch_and_context(folder: Path) -> None:
    write_table(folder)
    chooser = dispatch()
    assert chooser.problem_found is None and "measured" in chooser.describe()
    graph = chosen_by(chooser, 8)
    short, long = (chosen_by(chooser, 8, context=context) for context in (1000, 20000))
    assert (graph.splits, short.splits, long.splits) == (12, 4, 33)
    assert graph.kernel.config["warps"] != short.kernel.config["warps"]
    assert chooser.choose(8, None, 32768, ORDER) is graph


def test_a_batch_gets_what_serves_unequal_requests_unless_they_are_known_to_be_equal(folder: Path) -> None:
    plain = table()
    even = plain.by_batch_and_context[-1]
    unequal = replace(even, splits=130, timing=replace(even.timing, ragged=True))
    write_table(folder, replace(plain, by_batch_and_context=(*plain.by_batch_and_context, unequal)))
    chooser, longest = dispatch(), unequal.longest
    tokens = (None, 2 * even.batch * longest // 3, even.batch * longest // 2)
    chosen = [chooser.choose(even.batch, longest, 32768, ORDER, known) for known in tokens]
    assert [c.splits for c in chosen if isinstance(c, Chosen)] == [130, even.splits, 130]
    floats, _ = chooser.requirement(even.batch, 32768)
    config = chosen[-1].kernel.config  # type: ignore[union-attr]
    assert floats >= decode_scratch(config, batch=even.batch, kv_heads=8, splits=130).partial_floats
    graph = chooser.choose(even.batch, None, 32768, ORDER, 1)
    assert graph == chooser.choose(even.batch, None, 32768, ORDER), "a graph is replayed for others"


def test_far_from_the_tuned_range_the_default_runs(folder: Path) -> None:
    write_table(folder)
    write_defaults(folder)
    assert chosen_by(dispatch(), 64).origin == "default kernel"


def test_far_from_the_tuned_range_and_without_a_default_the_nearest_kernel_runs(folder: Path) -> None:
    write_table(folder)
    chosen = chosen_by(dispatch(), 64)
    assert "in another's place" in chosen.origin and chosen.kernel.config == K_FAST.config(PROBLEM)
    assert chosen.splits == split_candidates(
        CONFIG, registers=128, batch=64, kv_heads=8, max_context=32768, target=TARGET
    )[0]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_fewer_heads_than_tuned_get_a_kernel_that_reads_them(folder: Path, kv_heads: int) -> None:
    """The table's kernel for batch 8 copies the pages of eight heads at once; that of batch 1 reads any number."""
    wide = kernel(CONFIG.with_(warps=8, head_warps=8, load="bulk"), OTHER)
    made = table()
    made = replace(
        made,
        kernels=(K_FAST, wide),
        by_batch=(made.by_batch[0], replace(made.by_batch[1], kernel=wide.id)),
        by_batch_and_context=tuple(replace(e, kernel=K_FAST.id) for e in made.by_batch_and_context),
    )
    write_table(folder, made)
    chooser, order = dispatch(kv_heads), CacheOrder.standard(CONFIG, kv_heads=kv_heads)
    for batch in (1, 8 * 8 // kv_heads, 1024):
        chosen = chosen_by(chooser, batch, order)
        assert chosen.kernel.config == CONFIG, "no vLLM kernel, no kernel that cannot read the cache"
    assert "in another's place" in chosen_by(chooser, 8 * 8 // kv_heads, order).origin
    assert f"{kv_heads} KV head" in chooser.describe() and "1 of 2 batch sizes" in chooser.describe()
    assert "KV head" not in dispatch(8).describe()
    assert chosen_by(dispatch(8), 8).kernel.config == wide.config(PROBLEM), "all heads: the table's own choice"


def test_where_no_kernel_reads_the_cache_vllm_runs_and_the_reason_is_told(folder: Path) -> None:
    write_table(folder)
    write_defaults(folder)
    reason = dispatch().choose(8, None, 4096, replace(ORDER, block_size=24))
    assert isinstance(reason, str) and "block size 24" in reason and K_FAST.id in reason
    far = dispatch().choose(1000, None, 4096, replace(ORDER, block_size=24))
    assert isinstance(far, str) and "2 x away" in far


def test_without_a_table_the_default_runs_and_a_misaligned_cache_gets_plain_loads(folder: Path) -> None:
    write_defaults(folder)
    chooser = dispatch()
    assert "default kernel" in chooser.describe()
    plain, odd = (chosen_by(chooser, 4, order) for order in (ORDER, ODD))
    assert plain.kernel.config == CONFIG
    assert odd.kernel.config["load"] == "direct"
    assert "no table" in str(chooser.choose(4, None, 32768, replace(ORDER, block_size=24)))


def test_with_neither_vllm_runs(folder: Path) -> None:
    chooser = dispatch()
    assert not chooser.usable
    assert isinstance(chooser.choose(4, None, 32768, ORDER), str)
    assert TARGET.device_name in (chooser.problem_found or "") and "tune.py" in (chooser.problem_found or "")


@pytest.mark.parametrize("damage", ["truncated", "not json", "cubin bytes", "no cubin", "arch", "link", "empty"])
def test_damage_leaves_everything_to_vllm_and_is_said_once(
    folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_defaults(folder)
    path = write_table(folder, table(arch="sm_121") if damage == "arch" else None)
    cubin = folder / "kernels" / f"{K_FAST.id}.cubin"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "not json":
        path.write_text("{]")
    elif damage == "cubin bytes":
        cubin.write_bytes(b"\x7fELF fasT")
    elif damage == "no cubin":
        cubin.unlink()
    elif damage == "link":
        shutil.move(cubin, folder / "elsewhere")
        cubin.symlink_to(folder / "elsewhere")
    elif damage == "empty":
        path.write_bytes(b"")
    with caplog.at_level(logging.INFO, "vllm.plugins.wph"):
        first, second = dispatch(), dispatch()
    assert not first.usable and first.problem_found == second.problem_found
    assert isinstance(first.choose(8, None, 4096, ORDER), str)
    assert len([r for r in caplog.records if "vLLM's kernel runs" in r.getMessage()]) == 1


def test_a_cubin_that_the_driver_refuses_leaves_everything_to_vllm(folder: Path) -> None:
    write_table(folder)

    def refuse(image: bytes, config: Config) -> Loaded:
        raise TunerError("the driver refuses the kernel")

    chooser = Dispatch(PROBLEM, 8, TARGET, refuse)  # type: ignore[arg-type]
    assert not chooser.usable and "refuses" in (chooser.problem_found or "")


@pytest.mark.parametrize("kv_heads", [8, 1])
@pytest.mark.parametrize("with_defaults", [True, False])
def test_scratch_covers_every_choice(folder: Path, kv_heads: int, with_defaults: bool) -> None:
    write_table(folder)
    if with_defaults:
        write_defaults(folder)
    chooser = dispatch(kv_heads)
    floats, counters = chooser.requirement(48, 32768)
    standard = CacheOrder.standard(CONFIG, kv_heads=kv_heads)
    orders = (standard, replace(standard, address=6)) if with_defaults else (standard,)
    for batch, context, order in itertools.product(range(1, 49), (None, 1, 700, 1500, 9000, 32768), orders):
        chosen = chosen_by(chooser, batch, order, context)
        need = decode_scratch(chosen.kernel.config, batch=batch, kv_heads=kv_heads, splits=chosen.splits)
        assert need.partial_floats <= floats and need.counters <= counters


def test_defaults_round_trip_and_damage(folder: Path) -> None:
    path = write_defaults(folder)
    assert defaults.find(PROBLEM, ARCH) == path
    found = defaults.read(path, PROBLEM, ARCH)
    assert [k.config(PROBLEM) for k in found.kernels] == [CONFIG, direct_variant(CONFIG)]
    with pytest.raises(TableError, match="expected"):
        defaults.read(path, PROBLEM, "sm_100")
    whole = path.read_text()
    for old, new in (('"warps": 4', '"warps": 5'), ('"schema_version": 1', '"schema_version": 2'), ('"arch"', '"ark"')):
        path.write_text(whole.replace(old, new))
        with pytest.raises(TableError):
            defaults.read(path, PROBLEM, ARCH)
    shared = json.loads(whole)["kernels"][0]["shared_bytes"]
    path.write_text(whole.replace(f'"shared_bytes": {shared}', '"shared_bytes": 0'))
    with pytest.raises(TableError, match="made by another version"):
        defaults.read(path, PROBLEM, ARCH)
    for text in ("[]", "3", '{"schema_version": 1}'):
        path.write_text(text)
        with pytest.raises(TableError):
            defaults.read(path, PROBLEM, ARCH)


def test_scratch_without_vllm_has_outputs_apart_from_partials() -> None:
    scratch = Scratch(torch.device("cpu"))
    scratch.reserve(1000, 8, (4, 32, 128), torch.bfloat16)
    partials, out = scratch.take(1000, (4, 32, 128), torch.bfloat16)
    again, _ = scratch.take(10, (1, 32, 128), torch.bfloat16)
    assert again.data_ptr() == partials.data_ptr()
    assert out.shape == (4, 32, 128) and out.is_contiguous() and out.dtype == torch.bfloat16
    out.fill_(1)
    partials.fill_(2)
    assert bool((out == 1).all())
    assert not scratch.counters(8).any()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: this is what happens without one")
def test_a_layer_without_cuda_hands_back_and_says_why() -> None:
    layer = Layer(layer_facts(arguments()))
    layer.prepare(torch.device("cuda", 0), "layers.0")
    assert layer.reason
    query = torch.zeros(1, 32, 128)
    ints = torch.zeros(1, dtype=torch.int32)
    assert layer.decode(query, torch.zeros(1), ints[None], ints, query, 1) is None


def test_summary_groups_layers_and_says_why(folder: Path) -> None:
    windowed = LayerFacts(256, 32, 8, "turboquant_4bit_nc", 0.1, ("sliding window of 1024",))
    layers = {f"layers.{i}": Layer(windowed) for i in range(5)}
    plain = Layer(layer_facts(arguments()))
    write_table(folder)
    plain.dispatch = dispatch()
    lines = summary({**layers, "layers.5": plain})
    assert lines[0] == (
        "5 layers (head dim 256, 32/8 heads, turboquant_4bit_nc): vLLM's kernel: it has sliding window of 1024"
    )
    assert lines[1].startswith(
        "1 layer (head dim 128, 32/8 heads, turboquant_4bit_nc): table of NVIDIA untuned (measured"
    )
    assert "60% (batch" in share(table())
    assert len(summary(layers, detail=True)) == 6


def engine(layers: dict[str, Layer], **model: object) -> SimpleNamespace:
    """The part of vLLM's configuration that start-up reads."""
    return SimpleNamespace(
        compilation_config=SimpleNamespace(
            static_forward_context={n: SimpleNamespace(impl=SimpleNamespace(wph_layer=x)) for n, x in layers.items()}
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=256),
        parallel_config=SimpleNamespace(),
        model_config=SimpleNamespace(max_model_len=4096, dtype=torch.bfloat16, **model),
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: this is what happens without one")
def test_start_up_says_per_kind_of_layer_what_runs(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    layers = {f"layers.{i}": Layer(layer_facts(arguments(sliding_window=64 * (i % 2)))) for i in range(4)}
    with caplog.at_level(logging.INFO, "vllm.plugins.wph"):
        for _ in range(2):
            prepare([*layers, "a layer of another kind"], engine(layers), torch.device("cuda", 0))
    said = [r.getMessage() for r in caplog.records if "layers (" in r.getMessage()]
    assert len(said) == 2 and all(line.startswith("wph: 2 layers (head dim 128") for line in said)
    assert any("sliding window of 64" in line for line in said)


def test_sleep_mode_leaves_everything_to_vllm(folder: Path) -> None:
    layer = Layer(layer_facts(arguments()))
    prepare(["layers.0"], engine({"layers.0": layer}, enable_sleep_mode=True), torch.device("cpu"))
    assert "sleep mode" in (layer.reason or "")
