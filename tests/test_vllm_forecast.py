"""What is said before vLLM serves: the forecast for a model, the doctor's vLLM part, and a layer without a GPU."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from tests.test_vllm_dispatch import CONFIG, PROBLEM, TARGET, dispatch, write_defaults, write_table
from tests.test_vllm_prepared import Recorder
from tuner.cli.install import command as install
from tuner.errors import TunerError, UsageError
from tuner.launch import cache_order
from tuner.reference import synthetic_cache
from tuner.space.decode_landmarks import direct_variant
from tuner.vllm import diagnose, log, plugin, versions
from tuner.vllm.defaults import build_defaults, find, read, write
from tuner.vllm.dispatch import Chosen
from tuner.vllm.eligible import LayerFacts
from tuner.vllm.forecast import BOUNDARY, forecast
from tuner.vllm.layer import Layer
from tuner.vllm.scratch import Scratch
from tuner.vllm.timing import Timings
from tuner.workload import load_model

FORMAT = PROBLEM.cache_format
FACTS = LayerFacts(128, 32, 8, FORMAT, 0.1)

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: this is what happens without one")
without_vllm = pytest.mark.skipif(versions.installed() is not None, reason="vLLM is installed: this is without it")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    monkeypatch.setenv("VLLM_CONFIG_ROOT", str(tmp_path / "none"))
    monkeypatch.setattr(log, "_said", set())
    return tmp_path


def llama(cache_format: str = FORMAT, ranks: int = 1) -> str:
    """The forecast's line for the one kind of layer that the model has."""
    (line, boundary) = forecast(load_model("llama-3.1-8b").shard(ranks), cache_format, TARGET)
    assert boundary == BOUNDARY
    return line


def test_forecast_names_the_table_and_its_share(folder: Path) -> None:
    path = write_table(folder)
    assert llama().startswith(
        f"32 layers (head dim 128, 32/8 heads, {FORMAT}): 2 kernels of {path.name}; measured share"
    )


def test_forecast_tells_where_fewer_heads_than_tuned_change_the_choice(folder: Path) -> None:
    write_table(folder)
    assert "4 KV heads where 8 were tuned: 2 of 2 batch sizes run as chosen" in llama(ranks=2)
    assert "1 KV head where 8 were tuned: 1 of 2 batch sizes run as chosen" in llama(ranks=8)


def test_forecast_names_the_default_kernel(folder: Path) -> None:
    path = write_defaults(folder)
    assert llama().endswith(f"default kernel of {path.name}")


def test_forecast_says_what_vllm_runs_and_why(folder: Path) -> None:
    assert "vLLM's kernel: no kernel for cache format turboquant_seed" in llama("turboquant_seed")
    path = write_table(folder)
    path.write_text("{")
    assert "vLLM's kernel: " in llama() and str(path.name) in llama()
    lines = forecast(load_model("gemma-4-31b"), FORMAT, TARGET)
    assert any(line.endswith("vLLM's kernel: it has a sliding window") for line in lines)


@without_vllm
def test_the_plugin_steps_aside_in_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, folder: Path
) -> None:
    monkeypatch.delenv("WPH_DISABLE", raising=False)
    assert "vLLM is not installed" in (plugin.objection() or "")
    monkeypatch.setenv("WPH_DISABLE", "0")
    assert "vLLM is not installed" in (plugin.objection() or "")
    monkeypatch.setenv("WPH_DISABLE", "1")
    assert plugin.objection() == "WPH_DISABLE is set"
    with caplog.at_level(logging.INFO, "vllm.plugins.wph"):
        plugin.register()
        plugin.register()
    (message,) = caplog.messages
    assert "stepping aside" in message and message.endswith("WPH_DISABLE is set")


@without_vllm
@without_gpu
def test_the_doctor_finds_neither_vllm_nor_gpu_and_says_what_to_do(folder: Path) -> None:
    found = {name: check() for name, check in diagnose.checks()}
    assert [f.name for f in found.values()] == list(found)
    assert not found["vLLM"].ok and versions.SUPPORTED in found["vLLM"].advice
    assert found["vLLM seam"].detail == "no vLLM to look at"
    assert found["vLLM kernels"].detail == "no GPU to load them on"
    assert found["vLLM tables"].ok and found["vLLM tables"].detail.endswith("tables with the package")


def test_the_doctor_counts_tables_and_names_broken_ones(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, prebuilt = write_table(folder), write_defaults(folder)
    finding = dict(diagnose.checks())["vLLM tables"]()
    assert finding.ok and f"1 tables and 1 sets of default kernels in {folder}, " in finding.detail
    assert "with the package" in finding.detail
    monkeypatch.setattr("tuner.table.store.PACKAGE_TABLES", folder / "nowhere")  # the package's are many, and whole
    path.write_text(path.read_text()[:-20])
    finding = dict(diagnose.checks())["vLLM tables"]()
    assert not finding.ok and path.name in finding.detail and "install" in finding.advice
    path.unlink()
    assert dict(diagnose.checks())["vLLM tables"]().ok
    for cubin in (folder / "kernels").glob("*.cubin"):
        cubin.write_bytes(b"\x7fELF else")
    finding = dict(diagnose.checks())["vLLM tables"]()
    assert not finding.ok and f"is not what {prebuilt.name} names" in finding.detail


def test_the_doctor_misses_tables_where_none_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.table.store.PACKAGE_TABLES", folder / "nowhere")
    finding = dict(diagnose.checks())["vLLM tables"]()
    assert not finding.ok and finding.detail.startswith(f"none in {folder}, ") and "tune.py" in finding.advice


def test_the_doctor_sees_what_hides_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    visible = dict(diagnose.checks())["vLLM plugin"]
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.delenv("WPH_DISABLE", raising=False)
    if "not installed" in visible().detail:
        pytest.skip("this package is not pip-installed here, so its entry point does not exist")
    assert visible().ok
    monkeypatch.setenv("VLLM_PLUGINS", "another,wph")
    assert visible().ok
    monkeypatch.setenv("WPH_DISABLE", "1")
    assert visible().detail == "WPH_DISABLE is set"
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    assert visible().detail == "VLLM_PLUGINS=another leaves it out"


def test_defaults_are_the_default_configuration_and_its_plain_variant(folder: Path, tmp_path: Path) -> None:
    (made,) = build_defaults([PROBLEM], "sm_90", tmp_path / "build")
    assert [k.config(PROBLEM) for k in made.kernels] == [CONFIG, direct_variant(CONFIG)]
    assert all(made.cubins[k.id].startswith(b"\x7fELF") for k in made.kernels)
    assert find(PROBLEM, "sm_90") is None
    path = write(made, folder)
    assert find(PROBLEM, "sm_90") == path
    assert read(path, PROBLEM, "sm_90") == made


@without_gpu
def test_a_layer_without_a_gpu_hands_every_call_back(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    layer = Layer(FACTS)
    assert layer.reason is None
    layer.reserve(8, torch.bfloat16)  # nothing is loaded yet: nothing to make room for
    assert layer.reason is None
    with caplog.at_level(logging.WARNING, "vllm.plugins.wph"):
        layer.prepare(torch.device("cuda", 0), "layers.0", 4096)
    assert layer.reason == "UsageError: there is no CUDA device 0"
    assert "vLLM's kernel runs from here on" in caplog.text
    case = synthetic_cache(PROBLEM.layout, (20,), q_heads=32, kv_heads=8)
    arguments = (case.query, case.kv_cache, case.block_table, case.seq_lens, case.codec.centroids, 20)
    assert layer.decode(*arguments) is None
    fresh = Layer(FACTS)
    assert fresh.decode(*arguments) is None and fresh.reason is None  # tensors on the CPU say nothing about the layer


def test_an_error_in_a_call_ends_our_part_of_the_layer(folder: Path) -> None:
    layer = Layer(FACTS)
    none = torch.empty(0)
    assert layer.decode(None, none, none, none, none, 1) is None  # type: ignore[arg-type]
    assert layer.reason is not None and layer.reason.startswith("AttributeError")


def test_a_launch_is_prepared_for_the_chosen_kernel(folder: Path) -> None:
    write_table(folder)
    layer = Layer(FACTS)
    layer.dispatch, layer._scratch = dispatch(), Scratch(torch.device("cpu"))
    layer._max_context = 4096
    layer.reserve(4, torch.bfloat16)
    assert layer.reason is None
    case = synthetic_cache(PROBLEM.layout, (20, 700), q_heads=32, kv_heads=8)
    chosen = layer.dispatch.choose(2, 700, 4096, cache_order(case.kv_cache))
    assert isinstance(chosen, Chosen)
    recorder = Recorder(chosen.kernel.config)
    out = torch.empty_like(case.query)
    tensors = (case.query, case.kv_cache, case.block_table, case.seq_lens, out)
    partials, counters = torch.zeros(1 << 20), torch.zeros(1 << 10, dtype=torch.int32)
    chosen = replace(chosen, kernel=recorder)  # type: ignore[arg-type]
    prepared = layer._prepare_launch(chosen, tensors, partials, counters, case.codec.centroids)
    names = ("query", "kv_cache", "block_table", "seq_lens", "out")
    prepared.launch(**dict(zip(names, tensors, strict=True)), partials=partials, counters=counters)
    (seen,) = recorder.seen
    assert (seen["query"], seen["out"], seen["splits"]) == (case.query.data_ptr(), out.data_ptr(), chosen.splits)
    assert seen["centroids"] == case.codec.centroids.data_ptr()


def test_timings_are_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, enabled in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv("WPH_TIMING", value)
        assert Timings.from_environment().enabled is enabled
    off, on = Timings(False), Timings(True)
    ran = []
    with off.call(FACTS, 4, capturing=False):
        ran.append("off")
    with on.call(FACTS, 4, capturing=True):  # a replay would repeat the events
        ran.append("captured")
    assert ran == ["off", "captured"] and off.report() == on.report() == []


def test_timings_are_reported_by_shape_and_batch() -> None:
    timings = Timings(True)
    timings._times_us[FACTS.describe(), 8].extend([30.0, 10.0, 20.0])
    timings._times_us[FACTS.describe(), 1].append(5.0)
    first, second = timings.report()
    assert "batch 1: median 5.0 us of 1 calls" in first
    assert "batch 8: median 20.0 us of 3 calls" in second


def test_what_does_not_compile_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TunerError):
        build_defaults([PROBLEM], "sm_20", tmp_path)


def test_install_needs_no_tables_for_default_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shipped tables are found where they are: some are predicted, and nobody asked to install those."""
    monkeypatch.chdir(folder)
    refused = CliRunner().invoke(install, [])
    assert isinstance(refused.exception, UsageError) and "add --model" in str(refused.exception)
    planned = CliRunner().invoke(install, ["--model", "qwen3-4b", "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert planned.output.startswith("no tables of your own") and "36 layers" in planned.output
    assert not list(folder.iterdir())
