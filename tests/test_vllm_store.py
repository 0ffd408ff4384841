"""The store seam: which kernels a table gives it, what it leaves to vLLM, and the backend's hook."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.test_vllm_seam import BACKEND, IMPL, package, run  # noqa: F401 (package is a fixture)
from tests.test_vllm_versions import unpacked
from tuner.errors import TunerError
from tuner.geometry import dynamic_shared_bytes
from tuner.reference import store as reference_store
from tuner.space import Config, Problem, default_config
from tuner.table import BatchEntry, BucketEntry, Device, Kernel, Provenance, Table, Timing, kernel_id, write
from tuner.targets import get_target
from tuner.vllm import log, seam
from tuner.vllm.store import StoreDispatch, StoreLayer, prepare_stores

ARCH = "sm_90"
TARGET = replace(get_target(ARCH), device_name="NVIDIA untuned")  # a device that no shipped table is for
PROBLEM = Problem("store", 128, 1, "turboquant_4bit_nc")
CONFIG = default_config(PROBLEM)
IMAGES = (b"\x7fELF few", b"\x7fELF many")


@dataclass(frozen=True)
class Loaded:
    """What a loader makes of a cubin: the kernel's configuration is all that a choice needs."""

    config: Config


def kernel(config: Config, image: bytes, arch: str = ARCH) -> Kernel:
    sha = hashlib.sha256(image).hexdigest()
    return Kernel(kernel_id(arch, sha), config.params, "ab" * 32, sha, arch, 64, dynamic_shared_bytes(config), 0)


def table(device: str = TARGET.device_name, arch: str = ARCH, images: tuple[bytes, bytes] = IMAGES) -> Table:
    few, many = kernel(CONFIG, images[0], arch), kernel(CONFIG.with_(warps=8), images[1], arch)
    timing = Timing(1, False, 4.0, 3.9, 4.1, 0.2, {"vllm_store": 40.0})
    choices = ((1, few), (128, few), (8192, many))
    return Table(
        PROBLEM, 8, Device(device, arch, 132), Provenance("2026-01-01T00:00:00Z", 0), "measured", (few, many),
        tuple(BatchEntry(n, k.id, 1, 1.0, 1.0, (timing,)) for n, k in choices),
        tuple(BucketEntry(n, k.id, 1, timing) for n, k in choices),
    )  # fmt: skip


def write_table(folder: Path, made: Table) -> Path:
    return write(made, folder, {k.id: image for k, image in zip(made.kernels, IMAGES, strict=True)})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    monkeypatch.setenv("VLLM_CONFIG_ROOT", str(tmp_path / "nowhere"))
    monkeypatch.setattr(log, "_said", set())
    return tmp_path


def dispatch(kv_heads: int = 8) -> StoreDispatch:
    return StoreDispatch(PROBLEM, kv_heads, TARGET, lambda image, config: Loaded(config))  # type: ignore[arg-type, return-value]


def test_the_tables_kernel_by_tokens_and_heads(folder: Path) -> None:
    write_table(folder, table())
    found = dispatch()
    assert found.reason is None
    warps = {n: k.config["warps"] if (k := found.choose(n)) else None for n in (1, 200, 8192, 16384, 16385)}
    assert warps == {1: 4, 200: 4, 8192: 8, 16384: 8, 16385: None}
    sharded = dispatch(kv_heads=1).choose(65536)  # an eighth of the heads: as many rows
    assert sharded is not None and sharded.config["warps"] == 8


def test_without_a_table_the_store_is_vllms(folder: Path) -> None:
    found = dispatch()
    assert found.reason is not None and "no table for NVIDIA untuned" in found.reason and "--op store" in found.reason
    assert found.choose(1) is None


@pytest.mark.parametrize("damage", ["cubin", "json", "arch", "driver"])
def test_anything_broken_leaves_the_store_to_vllm_with_one_warning(
    folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_table(folder, table())
    if damage == "cubin":
        next((folder / "kernels").glob("*.cubin")).write_bytes(b"\x7fELF else")
    elif damage == "json":
        path.write_text(path.read_text()[:-40])
    elif damage == "arch":
        path.unlink()
        write_table(folder, table(arch="sm_100"))

    def load(image: bytes, config: Config) -> Loaded:
        if damage == "driver":
            raise TunerError("the driver refuses the kernel")
        return Loaded(config)

    with caplog.at_level(logging.WARNING):
        found = StoreDispatch(PROBLEM, 8, TARGET, load)  # type: ignore[arg-type]
    assert found.reason is not None and found.table is None and found.choose(1) is None
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "vLLM's runs" in caplog.text


def test_what_no_kernel_serves() -> None:
    assert "turboquant_seed" in (StoreLayer(128, 8, "turboquant_seed").reason or "")
    assert "head dim 96" in (StoreLayer(96, 8, "turboquant_4bit_nc").reason or "")
    assert StoreLayer(128, 8, "turboquant_k8v4").reason is None


def test_a_switch_keeps_vllms_store_and_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WPH_STORE", "0")
    layer = StoreLayer(128, 8, "turboquant_4bit_nc")
    layer.prepare(torch.device("cuda"))
    assert layer.reason == "WPH_STORE is 0" and layer.dispatch is None
    rows = torch.zeros(1, 8, 128)
    assert not layer.store(rows, rows, torch.zeros(1, 16, 8, 134), torch.zeros(1, dtype=torch.int64), torch.zeros(16))
    monkeypatch.setenv("WPH_STORE", "1")
    assert StoreLayer(128, 8, "turboquant_4bit_nc").reason is None


def test_calls_that_are_not_ours_say_so_and_write_nothing() -> None:
    layer = StoreLayer(64, 2, "turboquant_4bit_nc")
    key = torch.ones(3, 2, 64, dtype=torch.bfloat16)
    cache, slots = torch.zeros(2, 16, 2, 70, dtype=torch.uint8), torch.arange(3)
    assert layer.store(key, key, cache, slots, torch.zeros(16)) is False  # not on a GPU
    assert layer.store(key, key, cache, slots, None) is False  # vLLM has not made its levels yet
    assert layer.reason is None and not cache.any()


def test_an_exception_ends_our_part_only(folder: Path) -> None:
    layer = StoreLayer(64, 2, "turboquant_4bit_nc")
    broken = SimpleNamespace(device=SimpleNamespace(type="cuda"))  # no tensor: whatever is asked of it, it has not
    assert layer.store(broken, broken, broken, broken, torch.zeros(16)) is False  # type: ignore[arg-type]
    assert layer.reason is not None and "AttributeError" in layer.reason


def test_the_summary_counts_layers(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    layers = [StoreLayer(64, 2, "turboquant_seed") for _ in range(3)]
    context = {f"l{i}": SimpleNamespace(impl=SimpleNamespace(wph_store=s)) for i, s in enumerate(layers)}
    context["other"] = SimpleNamespace()
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=context))
    with caplog.at_level(logging.INFO):
        prepare_stores(list(context), config, torch.device("cpu"))
    assert "store of 3 layers: vLLM's: no store for cache format turboquant_seed" in caplog.text


# --- the backend's hook -----------------------------------------------------------------------------------------------

STORE = """
    def _store_kv(self, {parameters}):
        CALLS.append("store {number}")
"""
CALL = """
impl = build()
tokens = torch.zeros(3, 2, 64)
impl._store_kv({arguments})
say(type(impl.wph_store).__name__, *upstream.CALLS)
"""


def with_store(folder: Path, parameters: str) -> None:
    number = parameters.count(",") + 1
    method = STORE.format(parameters=parameters, number=number)
    (folder / "vllm/v1/attention/backends/turboquant_attn.py").write_text(BACKEND + method)


def test_the_recorded_seam_is_ours_and_what_we_cannot_do_goes_back(package: Path) -> None:  # noqa: F811
    with_store(package, "key, value, kv_cache, slot_mapping, layer")
    for last in ("None", "layer=None"):
        words, output = run(package, IMPL + CALL.format(arguments=f"tokens, tokens, cache, torch.arange(3), {last}"))
        assert words == ["StoreLayer store 5"], output


def test_another_seam_stays_vllms(package: Path) -> None:  # noqa: F811
    with_store(package, "key, value, kv_cache, slot_mapping, layer, scales")
    words, output = run(package, IMPL + CALL.format(arguments="tokens, tokens, cache, torch.arange(3), None, None"))
    assert words == ["NoneType store 6"], output


def test_amds_layout_stays_vllms(package: Path) -> None:  # noqa: F811
    with_store(package, "key, value, kv_cache, slot_mapping, layer")
    code = CALL.format(arguments="tokens, tokens, cache, torch.arange(3), None").replace("build()", "build(soa=1)")
    words, output = run(package, IMPL + code)
    assert words == ["NoneType store 5"], output


@pytest.mark.parametrize("version", sorted(seam.facts()["read_in"]))
def test_the_recorded_seam_is_that_of_released_wheels(version: str) -> None:
    path = unpacked().get(version)
    if path is None:
        pytest.skip("WPH_VLLM_WHEELS names no folder with <version>/vllm/... of this release")
    assert seam.signatures(path.read_text())["TurboQuantAttentionImpl._store_kv"] == seam.facts()["store"]


def test_the_recorded_seam_is_that_of_the_signatures() -> None:
    source = BACKEND + STORE.format(parameters="key, value, kv_cache, slot_mapping, layer", number=5)
    assert seam.signatures(source)["TurboQuantAttentionImpl._store_kv"] == seam.facts()["store"]


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("cache_format", ["turboquant_k8v4", "turboquant_4bit_nc", "turboquant_3bit_nc"])
def test_a_layer_stores_eagerly_and_in_a_graph(
    cache_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuner.build import Built, build
    from tuner.check_store import compare, store_case
    from tuner.kernels import device_arch
    from tuner.render import render
    from tuner.vllm.store import store_dispatch_for

    problem = Problem("store", 128, 1, cache_format)
    config, arch = default_config(problem), device_arch(0)
    source = render(config)
    made = build([source], [arch])[source.digest, arch]
    assert isinstance(made, Built)
    image = made.cubin.read_bytes()
    record = replace(kernel(config, image, arch), registers=made.registers)
    name = torch.cuda.get_device_name()
    timing = Timing(1, False, 4.0, 3.9, 4.1, 0.2, {})
    whole = Table(
        problem, 8, Device(name, arch, 132), Provenance("2026-01-01T00:00:00Z", 0), "measured", (record,),
        (BatchEntry(64, record.id, 1, 1.0, 1.0, (timing,)),), (BucketEntry(64, record.id, 1, timing),),
    )  # fmt: skip
    write(whole, tmp_path, {record.id: image})
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    store_dispatch_for.cache_clear()
    first, later = (store_case(problem, 60, kv_heads=8, seed=s, device="cuda", index_dtype=torch.int64) for s in (1, 2))
    layer = StoreLayer(128, 8, cache_format)
    layer.prepare(torch.device("cuda"))
    assert layer.reason is None, layer.reason

    def call(case: object, cache: torch.Tensor) -> bool:
        return layer.store(case.key, case.value, cache, case.slot_mapping, case.codec.centroids)  # type: ignore[attr-defined]

    got, want = first.before.clone(), first.before.clone()
    assert call(first, got)
    reference_store(want, first.key, first.value, first.slot_mapping, first.codec)
    assert compare(got, want, first).fault is None

    graph, inputs = torch.cuda.CUDAGraph(), replace(first, key=first.key.clone(), value=first.value.clone())
    got, want = first.before.clone(), first.before.clone()
    with torch.cuda.graph(graph):
        assert call(inputs, got)
    for old, new in ((inputs.key, later.key), (inputs.value, later.value), (inputs.slot_mapping, later.slot_mapping)):
        old.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    reference_store(want, later.key, later.value, later.slot_mapping, later.codec)
    assert compare(got, want, replace(later, before=first.before)).fault is None
    assert layer.reason is None
    assert not layer.store(later.key[:1], later.value[:1], got, later.slot_mapping[:1], later.codec.centroids)
