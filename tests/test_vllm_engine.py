"""The engine benchmark without a GPU: its plans, the checkpoint, going on after a stop, and what it calls a failure."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import vllm_engine
from benchmarks.engine import launch, plan
from benchmarks.engine.child import Record, attempts
from benchmarks.engine.compare import accuracy_verdict, agreement, damage_verdict, speed_verdict
from benchmarks.engine.model import ENDING, beginnings, prompts, write_checkpoint

BASE = plan.base("128:32:8", quick=False, compiled=False, kv_cache_gib=80)
FORMAT = "turboquant_4bit_nc"
TINY = replace(BASE.model, layers=2, hidden=64, intermediate=64, q_heads=4, kv_heads=2, head_dim=16)


def step(token: int, logprob: float, second: int = 900, gap: float = 1.0) -> list[tuple[int, float]]:
    return [(token, logprob), (second, logprob - gap)]


def result(shift: float = 0.0, *, tokens: int = 64, sequences: int = 4, **changes: Any) -> dict[str, Any]:
    """An engine whose sequences are distinct and whose logprobs are ``shift`` off."""
    top = [[step(100 * s + i, -1.0 + shift) for i in range(tokens)] for s in range(sequences)]
    entries = [{"set": 0, "attempt": a, "top": top} for a in ("computed", "prefix cached")]
    facts = {"accuracy": entries, "speed": [], "used_ours": True, "our_store": False, "complete": True, "plugin_s": 0.5}
    return facts | {"import_s": 9.0, "start_s": 20.0, "vllm": "0.24.0", "device": "a GPU"} | changes


def parted(at: int, gap: float) -> dict[str, Any]:
    """An engine that leaves ``result()``'s first sequence at ``at`` for the runner-up, which it prefers by ``gap``."""
    changed = json.loads(json.dumps(result()))
    for entry in changed["accuracy"]:
        entry["top"][0][at] = step(900, -1.0, at, gap)
    return changed


def tied(gap: float, at: int = 30, shift: float = 0.0) -> dict[str, Any]:
    """``result(shift)`` with a runner-up ``gap`` behind at one place."""
    changed = result(shift)
    for entry in changed["accuracy"]:
        entry["top"][0][at] = step(at, -1.0 + shift, 900, gap)
    return changed


def test_engines_do_what_is_compared() -> None:
    engines = {kind: plan.engine_for(BASE, kind, FORMAT) for kind in plan.KINDS}
    assert engines["ours"].accuracy == engines["own"].accuracy and engines["ours"].speed == engines["own"].speed
    assert engines["bf16"].options()["kv_cache_dtype"] == "auto" and engines["bf16"].accuracy and engines["bf16"].speed
    assert engines["own_other_splits"].speed == engines["ours_own_store"].speed == ()
    assert engines["own_other_splits"].options()["attention_config"] == {plan.SPLIT_OPTION: plan.OTHER_SPLITS}
    assert engines["ours_speculative"].options()["speculative_config"]["num_speculative_tokens"] == 3
    assert len({e.key for e in engines.values()}) == len(engines)
    assert max(map(max, BASE.accuracy)) + plan.TOKENS <= BASE.model.max_length
    assert max(map(len, BASE.accuracy)) == BASE.max_batch == 32
    assert any(len(s) not in BASE.captured for s in BASE.accuracy)  # runs with padded rows
    assert attempts("own") == ("computed", "prefix cached", "computed again")


def test_graphs_are_full_and_few() -> None:
    options = BASE.options()
    assert options["compilation_config"] == {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 24, 32],
    }
    assert options["kv_cache_memory_bytes"] == 80 << 30
    compiled = replace(BASE, compiled=True, kv_cache_gib=0).options()
    assert compiled["compilation_config"]["cudagraph_mode"] == "FULL_AND_PIECEWISE"
    assert "kv_cache_memory_bytes" not in compiled


def test_a_plan_survives_json() -> None:
    engine = plan.engine_for(BASE, "ours", FORMAT)
    assert plan.from_dict(json.loads(json.dumps(asdict(engine)))) == engine


def test_prompts_differ_and_end_alike() -> None:
    made = prompts((40, 17, 40), 3)
    assert [len(p) for p in made] == [40, 17, 40]
    assert len({tuple(p[-ENDING:]) for p in made}) == 1 and made[0] != made[2]
    assert made == prompts((40, 17, 40), 3) != prompts((40, 17, 40), 4)
    long, short = beginnings(3, 100), beginnings(2, 60)
    assert [p[:60] for p in long[:2]] == short and long[0] != long[1]


@pytest.mark.vllm  # which brings transformers along
def test_the_checkpoint_is_one_that_transformers_reads(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = write_checkpoint(TINY, tmp_path)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert write_checkpoint(TINY, tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = torch.tensor([p[:48] for p in prompts((48, 48), 0)])
    with torch.no_grad():
        logits = model(ids).logits[:, -1].float()
    assert logits.std() > 1.0  # real weights: logits of a size that decides
    assert (logits[0] - logits[1]).abs().max() > 0.5  # only attention can tell the two apart


def test_a_record_goes_on_where_it_stopped(tmp_path: Path) -> None:
    engine = plan.engine_for(BASE, "own", FORMAT)
    path = tmp_path / "one.json"
    record = Record(path, engine)
    record.add("speed", {"batch": 8, "context": 16384, "step_ms": 1.0})
    again = Record(path, engine)
    assert again.has("speed", batch=8, context=16384) and not again.has("speed", batch=1, context=16384)
    assert not launch.is_complete(path)
    again.data["complete"] = True
    again.save()
    assert launch.is_complete(path) and not list(tmp_path.glob("*.writing"))


def test_equal_engines_agree() -> None:
    same = agreement(result(), result(0.01))
    assert (same.sequences, same.equal, same.parting) == (8, 1.0, 0.0)
    assert same.p99_logprob == pytest.approx(0.01) and same.widest_shift == pytest.approx(0.0)


def test_a_difference_is_a_tie_or_a_fault() -> None:
    close = agreement(tied(0.005), parted(30, 0.005))
    assert close.equal == 0.75 and close.parting == pytest.approx(1 / (3 * 64 + 30 + 1))
    assert close.widest_shift == pytest.approx(0.01)  # from 0.005 behind to as much ahead
    assert agreement(tied(0.25), tied(0.75)).widest_shift == pytest.approx(0.5)  # where both choose the same, too
    assert math.isinf(agreement(result(sequences=1), result(sequences=1, accuracy=[
        {"set": 0, "attempt": "computed", "top": [[step(5, -1.0) for _ in range(64)]]}
    ])).widest_shift)  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "word"),
    [
        (tied(0.005, 40, 0.01), None),
        (parted(40, 0.005), None),
        (tied(0.005, 40, 0.2), "logprobs further apart"),
        (tied(0.5, 40), "shifts two candidates"),
        (parted(40, 0.5), "shifts two candidates"),
        (tied(0.005, 40) | {"used_ours": False}, "not in every graph"),
        (None, "an engine is missing"),
    ],
)
def test_the_verdict_on_tokens(ours: dict[str, Any] | None, word: str | None) -> None:
    engines = {"ours": ours, "own": tied(0.005, 40), "own_other_splits": parted(40, 0.005)}
    _, failures = accuracy_verdict({k: v for k, v in engines.items() if v is not None})
    assert [f for f in failures if word is None or word not in f] == []
    assert bool(failures) == (word is not None)


def test_tokens_that_leave_early_fail() -> None:
    early = json.loads(json.dumps(result()))
    for entry in early["accuracy"]:
        entry["top"] = [[step(7, -1.0)] * 64 for _ in entry["top"]]
    _, failures = accuracy_verdict({"ours": early, "own": result(), "own_other_splits": result()})
    assert any("part more often than" in f for f in failures)


def test_our_store_is_held_against_an_uncompressed_cache() -> None:
    """It may leave vLLM's tokens, but those of an uncompressed cache no more often than vLLM's store does."""
    engines = {"own": parted(20, 0.5), "own_other_splits": parted(20, 0.5), "bf16": result()}
    ours = parted(22, 0.5) | {"our_store": True}
    own_store = {"ours_own_store": parted(20, 0.5)}
    assert accuracy_verdict(engines | own_store | {"ours": ours})[1] == []
    far = result(0.5) | {"our_store": True}
    assert accuracy_verdict(engines | own_store | {"ours": far})[1] == [
        "an uncompressed cache and ours have logprobs further apart than that and vLLM's"
    ]
    assert accuracy_verdict(engines | {"ours": ours})[1] == [
        "no engine with our decode kernel and vLLM's store: decoding not compared"
    ]
    del engines["bf16"]
    assert accuracy_verdict(engines | own_store | {"ours": ours})[1] == [
        "no tokens with an uncompressed cache: our store not compared"
    ]


def test_prompts_that_continue_alike_prove_nothing() -> None:
    alike = result(accuracy=[{"set": 0, "attempt": "computed", "top": [[step(5, -1.0)] * 64] * 4}])
    _, failures = accuracy_verdict({"ours": alike, "own": alike, "own_other_splits": alike})
    assert any("attention does not decide" in f and "1 of the 4 prompts of set 0" in f for f in failures)


def test_a_yardstick_that_proves_nothing_is_a_failure() -> None:
    single = result(accuracy=[{"set": 0, "attempt": "computed", "top": [[step(5, -1.0)] * 64]}])
    _, failures = accuracy_verdict({"ours": single, "own": single, "own_other_splits": single})
    assert any("no set has several prompts" in f for f in failures)
    lost = json.loads(json.dumps(result()))
    lost["accuracy"][0]["top"][0][-1] = step(7, -1.0)
    _, failures = accuracy_verdict({"ours": result(), "own": result(), "own_other_splits": lost})
    assert failures == ["vLLM's kernel shifts a candidate of its own out of sight: by how much ours do says nothing"]


def times(*steps: tuple[int, int, float]) -> dict[str, Any]:
    return {"speed": [{"batch": b, "context": c, "step_ms": ms} for b, c, ms in steps]}


def test_the_verdict_on_times() -> None:
    engines = {
        "ours": times((8, 16384, 2.0), (8, 4096, 2.0)),
        "own": times((8, 16384, 3.0), (8, 4096, 2.0)),
        "bf16": times((8, 16384, 1.9), (8, 4096, 1.0)),
    }
    lines, failures = speed_verdict(engines)
    assert "| 8 | 16384 | 2.00 | 3.00 | 1.90 | 1.50 x | 0.95 x |" in lines
    assert failures == [
        "batch 8 x 16384: 1.50 x vLLM's throughput, expected 2",
        "batch 8 x 16384: 0.95 x bf16's throughput, expected 1",
    ]
    assert speed_verdict({"ours": engines["ours"]})[1] == ["no times of own, bf16"]


def test_the_report_says_what_is_missing() -> None:
    engines = {"ours": result(plugin_s=3.0, complete=False), "own": result(), "own_other_splits": result()}
    text, failures = vllm_engine.report({FORMAT: engines}, "128:32:8")
    assert f"{FORMAT}: our start-up took 3.00 s, expected at most 2 s" in failures
    assert f"{FORMAT}: ours is not complete" in failures
    assert all(f"MISSED: {f}" in text for f in failures)


@pytest.mark.parametrize(("our_store", "whose"), [(True, "ours"), (False, "vLLM's")])
def test_vllms_store_runs_apart_where_ours_has_another(
    our_store: bool, whose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []

    def launch_nothing(engine: plan.Engine, *_: Any) -> dict[str, Any]:
        launched.append(engine.kind)
        damaged = engine.kind == "damaged"
        facts = {"our_store": our_store and engine.kind == "ours", "used_ours": not damaged}
        return result(**facts, own_instead=["a layer: vLLM's kernel runs: a cubin"] if damaged else [])

    monkeypatch.setattr(vllm_engine, "launch", launch_nothing)
    monkeypatch.setattr(vllm_engine, "attached_gpu", lambda _: SimpleNamespace(arch="sm_90"))
    for name in ("write_checkpoint", "gather_tables", "add_default_kernels"):
        monkeypatch.setattr(vllm_engine, name, lambda *_: tmp_path)
    args = vllm_engine.parser().parse_args(["--work", str(tmp_path), "--formats", FORMAT])
    found = vllm_engine.run_engines(args, [FORMAT])
    assert launched == list(found[FORMAT]) == [k for k in plan.BY_DEFAULT if our_store or k != "ours_own_store"]
    text, failures = vllm_engine.report(found, "128:32:8")
    assert f"the store is {whose}" in text
    assert not any("compared" in f for f in failures)


@pytest.mark.parametrize(
    ("line", "ours"),
    [
        ("INFO wph: store of 24 layers: table of NVIDIA H100 80GB HBM3 (measured)", True),
        ("INFO wph: store of 1 layer: table of NVIDIA H100 80GB HBM3 (measured)", True),
        ("INFO wph: store of 24 layers: vLLM's: WPH_STORE is 0", False),
    ],
)
def test_the_log_says_whose_store_runs(line: str, ours: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(engine: plan.Engine, out: Path, log: Path, *_: Any) -> None:
        log.write_text(line)
        out.write_text(json.dumps({"complete": False}))

    monkeypatch.setattr(launch, "_run", run)
    found = launch.launch(plan.engine_for(BASE, "ours", FORMAT), tmp_path, tmp_path, tmp_path, 30)
    assert found is not None and found["our_store"] is ours


def test_ours_must_be_in_every_graph() -> None:
    engine = plan.engine_for(replace(BASE, model=replace(BASE.model, layers=6), max_batch=2), "ours", FORMAT)
    lines = [f"INFO wph: layers.{i}: batch {b} in a graph: table, kernel x" for i in (2, 3) for b in (1, 2)]
    assert launch.used_ours("\n".join(lines), engine)
    assert not launch.used_ours("\n".join(lines[:-1]), engine)
    assert not launch.used_ours("\n".join([*lines, "wph: layer 2: vLLM's kernel runs from here on: error"]), engine)


DAMAGED = {"used_ours": False, "own_instead": ["turboquant_4bit_nc at head dim 128: vLLM's kernel runs: a cubin"]}


@pytest.mark.parametrize(
    ("damaged", "own", "failure"),
    [
        (result(**DAMAGED), result(), None),
        (result(**DAMAGED | {"own_instead": []}), result(), "does not say that vLLM's kernels run"),
        (result(**DAMAGED | {"used_ours": True}), result(), "runs kernels of ours"),
        (result(**DAMAGED | {"our_store": True}), result(), "runs kernels of ours"),
        (result(0.001, **DAMAGED), result(), "tokens or logprobs are not those of vLLM's kernel"),
        (parted(20, 0.0) | DAMAGED, result(), "tokens or logprobs are not those of vLLM's kernel"),
        (result(**DAMAGED), None, "not compared"),
        (result(**DAMAGED | {"accuracy": []}), result(), "not compared"),
    ],
)
def test_with_damaged_files_an_engine_is_vllms(
    damaged: dict[str, Any], own: dict[str, Any] | None, failure: str | None
) -> None:
    lines, failures = damage_verdict(damaged, own)
    assert lines or failure
    assert [f for f in failures if failure and failure in f] == failures and bool(failures) == bool(failure)
    engines = {"damaged": damaged} | ({"own": own} if own else {})
    text, missed = vllm_engine.report({FORMAT: engines}, "128:32:8")
    assert all(f"MISSED: {FORMAT}: {f}" in text and f"{FORMAT}: {f}" in missed for f in failures)


def test_what_the_log_says_of_damaged_files() -> None:
    lines = (
        "WARNING wph: turboquant_4bit_nc at head dim 128: vLLM's kernel runs: table x: kernel y: not the hash\n"
        "WARNING wph: store of turboquant_4bit_nc at head dim 128: vLLM's runs: table x: kernel y: not the hash\n"
        "INFO wph: layers.2: batch 1 in a graph: table, kernel z\n"
    )
    assert [line.partition(":")[0] for line in launch.runs_instead(lines)] == [
        "store of turboquant_4bit_nc at head dim 128",
        "turboquant_4bit_nc at head dim 128",
    ]
    assert launch.runs_instead("INFO wph: store of 24 layers: vLLM's: WPH_STORE is 0\n") == []


def test_a_damaged_engine_sees_copies(tmp_path: Path) -> None:
    tables = tmp_path / "mine"
    (tables / "kernels").mkdir(parents=True)
    (tables / "kernels" / "sm_90-0.cubin").write_bytes(bytes(3000))
    (tables / "t.json").write_text("{}")
    engine = plan.engine_for(BASE, "damaged", FORMAT)
    assert engine.accuracy == BASE.accuracy[:3] and not engine.speed
    env = launch.environment(engine, tables, tmp_path / "work")
    first, second, *_ = map(Path, env["PYTHONPATH"].split(os.pathsep))
    folder = Path(env["VLLM_TUNED_CONFIG_FOLDER"])
    assert second == launch.ROOT and env["PYTHONSAFEPATH"] == "1" and "WPH_DISABLE" not in env
    cubins = [*first.rglob("*.cubin")]
    whole = [*(launch.ROOT / "tuner").rglob("*.cubin"), *tables.rglob("*.cubin")]
    assert len(cubins) == len(whole) > 100 and {p.stat().st_size for p in cubins} == {1000}
    assert (folder / "kernels" / "sm_90-0.cubin") in cubins and (folder / "t.json").read_text() == "{}"
    assert min(p.stat().st_size for p in whole) > 1000
    found = "import sys, tuner; print(tuner.__file__); import benchmarks.engine.plan"
    done = subprocess.run([sys.executable, "-c", found], env=env, cwd=launch.ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == str(first / "tuner" / "__init__.py"), done.stderr


def test_only_ours_sees_the_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WPH_DISABLE", "1")
    monkeypatch.setenv("WPH_STORE", "0")
    ours = launch.environment(plan.engine_for(BASE, "ours", FORMAT), tmp_path / "tables", tmp_path)
    own = launch.environment(plan.engine_for(BASE, "own", FORMAT), tmp_path / "tables", tmp_path)
    assert "WPH_DISABLE" not in ours and own["WPH_DISABLE"] == "1"
    own_store = launch.environment(plan.engine_for(BASE, "ours_own_store", FORMAT), tmp_path / "tables", tmp_path)
    assert "WPH_STORE" not in ours and own_store["WPH_STORE"] == "0" and "WPH_DISABLE" not in own_store
    assert ours["VLLM_TUNED_CONFIG_FOLDER"] == str(tmp_path / "tables")
    found = [p for p in ours["PYTHONPATH"].split(os.pathsep) if (Path(p) / "wph_tuner-0.dist-info").is_dir()]
    assert bool(found) != launch.installed()


def test_an_engine_that_fails_or_hangs_is_said_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = plan.engine_for(BASE, "ours", FORMAT)
    tmp = tmp_path / "checkpoint"
    monkeypatch.setattr(launch.sys, "executable", "/bin/false")
    assert launch.launch(engine, tmp_path, tmp, tmp_path, 30) is None
    assert "not complete" in capfd.readouterr().out
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(launch.sys, "executable", str(sleeper))
    start = time.monotonic()
    assert launch.launch(engine, tmp_path, tmp, tmp_path, 0.5) is None
    assert time.monotonic() - start < 15 and "stopped after" in capfd.readouterr().out


def test_bad_kinds_are_refused() -> None:
    command = [sys.executable, str(vllm_engine.ROOT / "benchmarks/vllm_engine.py"), "--kinds", "ours,theirs"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "--kinds theirs: expected some of ours, own" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: this is what happens without one")
def test_without_a_gpu_one_line_before_anything_is_written(tmp_path: Path) -> None:
    command = [sys.executable, str(vllm_engine.ROOT / "benchmarks/vllm_engine.py"), "--work", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("error: no GPU 0") and done.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())
