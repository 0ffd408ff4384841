"""Benchmarks of whole models: whose kernel races, and what is said where nothing can be timed."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_fitted import printed

from tuner.bench import BF16, OURS, ROLES, TRITON, StepRow, _added, _contestants, bench_model, our_kernel, to_json
from tuner.cli.bench import ASSUMED_SHARES, command
from tuner.errors import TunerError
from tuner.formats import slot_layout
from tuner.geometry import dynamic_shared_bytes
from tuner.measure import FIRST_STEP, Failure, Race, Sample
from tuner.measure.two_step import dequantize_then_attend
from tuner.reference import dequantize, synthetic_cache
from tuner.report import terminal
from tuner.space import Problem, default_config
from tuner.table import BatchEntry, Device, Kernel, Provenance, Table, Timing, kernel_id, write
from tuner.targets import attached, get_target
from tuner.workload import Bucket, Shape, Workload, load_model

TARGET = get_target("sm_90")
FORMAT = "turboquant_4bit_nc"
SHAPE = Shape(128, 32, 8)
PROBLEM = Problem("decode", 128, 4, FORMAT)
IMAGE = b"\x7fELF tuned"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path / "tuned"))
    monkeypatch.setenv("VLLM_CONFIG_ROOT", str(tmp_path / "none"))
    return tmp_path / "tuned"


def write_table(folder: Path, problem: Problem = PROBLEM) -> Table:
    sha = hashlib.sha256(IMAGE).hexdigest()
    config = default_config(problem).with_(warps=8)
    shared = dynamic_shared_bytes(config)
    kernel = Kernel(kernel_id("sm_90", sha), config.params, "ab" * 32, sha, "sm_90", 128, shared, 0)
    timing = Timing(4096, False, 20.0, 19.0, 21.0, 12.0, {"triton": 200.0}, "memory")
    entry = BatchEntry(8, kernel.id, 5, 1.1, 1.05, (timing,))
    device = Device(TARGET.device_name, "sm_90", 132)
    table = Table(problem, 8, device, Provenance("2026-01-01T00:00:00Z", 0), "measured", (kernel,), (entry,), ())
    write(table, folder, {kernel.id: IMAGE})
    return table


def test_the_tables_kernel_races_where_there_is_one(folder: Path, tmp_path: Path) -> None:
    table = write_table(folder)
    ours, source = our_kernel(SHAPE, FORMAT, Bucket(8, 4096), TARGET, tmp_path / "build")
    assert source == "table" and ours.name == OURS and ours.splits == 5
    assert ours.config == table.kernels[0].config(PROBLEM)
    assert ours.cubin is not None and ours.cubin.read_bytes() == IMAGE
    assert not (tmp_path / "build").exists()  # nothing was compiled


def test_a_table_of_another_device_is_not_ours(folder: Path, tmp_path: Path) -> None:
    write_table(folder)
    other = replace(TARGET, device_name="NVIDIA something else")
    ours, source = our_kernel(Shape(64, 8, 2), FORMAT, Bucket(2, 16384), other, tmp_path / "build")
    assert source == "default"
    assert ours.config == default_config(Problem("decode", 64, 4, FORMAT))
    assert ours.cubin is not None and ours.cubin.read_bytes().startswith(b"\x7fELF")
    assert ours.splits > 1  # two long requests on 132 SMs


def test_a_damaged_table_is_an_error_and_not_a_default(folder: Path, tmp_path: Path) -> None:
    write_table(folder)
    (path,) = folder.glob("*.json")
    path.write_text(path.read_text()[:100])
    with pytest.raises(TunerError, match="JSON"):
        our_kernel(SHAPE, FORMAT, Bucket(8, 4096), TARGET, tmp_path)


def test_a_cubin_that_is_not_the_tables_never_races(folder: Path, tmp_path: Path) -> None:
    table = write_table(folder)
    (folder / "kernels" / f"{table.kernels[0].id}.cubin").write_bytes(IMAGE[:-1])
    with pytest.raises(TunerError, match="SHA-256"):
        our_kernel(SHAPE, FORMAT, Bucket(8, 4096), TARGET, tmp_path)


def test_dequantisation_races_with_what_the_api_runs(folder: Path, tmp_path: Path) -> None:
    """``dequantize`` reads no lengths: contexts beyond the table's do not change its kernel."""
    write_table(folder, Problem("dequant", 128, 1, FORMAT))
    for context in (4096, 1 << 20):
        ours, source = our_kernel(SHAPE, FORMAT, Bucket(8, context), TARGET, tmp_path, op="dequant")
        assert source == "table" and ours.config == default_config(Problem("dequant", 128, 1, FORMAT)).with_(warps=8)


def test_a_model_of_sliding_layers_alone_has_nothing_to_time() -> None:
    workload = load_model("gemma-4-31b")
    sliding = tuple((s, n) for s, n in workload.shapes if s.wants)
    assert sliding and len(sliding) < len(workload.shapes)
    with pytest.raises(TunerError, match="every layer of gemma"):
        bench_model(Workload("gemma", sliding, workload.buckets), FORMAT, [1], [1024], TARGET)


def test_without_a_gpu_the_bucket_and_the_reason_are_named(folder: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: this is the message without one")
    write_table(folder)
    with pytest.raises(TunerError, match=r"b8_c4096: error: no NVIDIA GPU"):
        bench_model(load_model("llama-3.1-8b"), FORMAT, [8], [4096], TARGET, root=tmp_path)


def test_the_seeds_path_races_with_every_bf16_attention_at_hand(folder: Path, tmp_path: Path) -> None:
    write_table(folder)
    found, source, missing = _contestants(SHAPE, FORMAT, Bucket(8, 4096), TARGET, tmp_path / "build", 0)
    by_name = {contestant.name: contestant for contestant in found}
    assert source == "table" and by_name[OURS].splits == 5
    assert by_name["sdpa_bf16"].config is None
    first = by_name[f"{FIRST_STEP}sdpa_bf16"]
    assert first.config is not None and first.config.problem == Problem("dequant", 128, 1, FORMAT)
    assert first.cubin is not None and first.cubin.read_bytes().startswith(b"\x7fELF")
    assert {f"{FIRST_STEP}{n}" for n in by_name if n in BF16} == {n for n in by_name if n.startswith(FIRST_STEP)}
    assert set(by_name) | set(missing) >= {*BF16, *TRITON}
    assert all(reason for reason in missing.values()) and "fa3_fp8" not in by_name


# --- what is made of the times ----------------------------------------------------------------------------------------


def row(batch: int = 4, context: int = 4096) -> StepRow:
    """12 layers: bf16 600 us, the seed's path 1500, Triton 3000, ours 400."""
    per_layer = {"sdpa_bf16": 80.0, "fa3_bf16": 50.0, f"{FIRST_STEP}fa3_bf16": 125.0, "triton": 250.0, OURS: 100 / 3}
    samples = {name: Sample(t, 0.9 * t, 1.1 * t, 20) for name, t in per_layer.items()}
    failures = {"vllm_triton": Failure("resource", "out of memory")}
    empty = StepRow(batch, context, 12, {}, 0.0, "")
    return _added(empty, Race({}, samples, failures), 12, 20.0, "table", {"flashinfer_bf16": "not installed"})


def test_a_step_is_all_layers_and_a_role_its_fastest() -> None:
    found = row()
    assert [found.role_us(role) for role in ROLES] == pytest.approx([600, 1500, 3000, 400])
    assert found.times["fa3_bf16"].ci_low_us == pytest.approx(540) and found.limit_us == 240
    assert found.missing == {"flashinfer_bf16": "not installed", "vllm_triton": "resource: out of memory"}


def test_a_contestant_that_misses_one_shape_has_no_time() -> None:
    without = Race({}, {OURS: Sample(10.0, 9.0, 11.0, 20)}, {"fa3_bf16": Failure("error", "at most 256")})
    both = _added(row(), without, 10, 5.0, "default", {})
    assert set(both.times) == {OURS} and both.role_us("bf16") is None and both.step_ratio("wph", 0.5) is None
    assert both.role_us("wph") == pytest.approx(500) and both.source == "table and default"
    assert both.missing["fa3_bf16"] == "error: at most 256" and both.limit_us == 290


@pytest.mark.parametrize(
    ("race", "words"),
    [
        (Failure("crash", "illegal address"), "b4_c4096: crash: illegal address"),
        (Race({}, {}, {OURS: Failure("resource", "registers")}), "our kernel failed: resource: registers"),
    ],
)
def test_nothing_is_made_up_where_ours_failed(race: Race | Failure, words: str) -> None:
    with pytest.raises(TunerError, match=words):
        _added(StepRow(4, 4096, 12, {}, 0.0, ""), race, 12, 20.0, "table", {})


def test_a_whole_step_follows_from_the_assumed_share_alone() -> None:
    found = row()
    assert found.step_ratio("bf16", 0.3) == pytest.approx(1)
    assert found.step_ratio("wph", 0.3) == pytest.approx(0.7 + 0.3 * 400 / 600)
    assert found.step_ratio("seed", 1.0) == pytest.approx(2.5)


def test_the_table_has_a_row_per_context_and_batch_and_assumes_nothing() -> None:
    rows = [row(1), row(4), row(1, 32768)]
    text = printed(terminal.steps("qwen3.5-122b", "NVIDIA H200 (sm_90)", rows), 132)
    data = [line for line in text.splitlines() if "│" in line and "600" in line]
    assert len(data) == 3 and "32k" in data[2] and "measured" in text and "12 layers" in text
    for cell in ("600", "1500", "3000", "400", "1.50 x", "3.75 x", "7.50 x", "60%", "table"):
        assert cell in data[0]
    assert "assum" not in text.lower() and "t/s" not in text
    narrow = printed(terminal.steps("m", "d", rows), 80)
    assert max(map(len, narrow.splitlines())) <= 80 and "…" not in narrow and "600" in narrow


def test_whole_steps_stand_apart_and_are_called_assumed() -> None:
    missing = _added(row(1, 32768), Race({}, {OURS: Sample(10.0, 9.0, 11.0, 20)}, {}), 10, 5.0, "table", {})
    text = printed(terminal.assumed_steps([row(4), missing], (0.1, 0.3, 1.0)), 80)
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    words = " ".join(text.split())
    assert "ASSUMED" in words and "Assumed, not measured" in words and "us" not in words.split() and "t/s" not in words
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if "%" in line]
    assert cells == [
        ["4k", "4", "10%", "1.15 x", "1.40 x", "0.97 x"],
        ["4k", "4", "30%", "1.45 x", "2.20 x", "0.90 x"],
        ["4k", "4", "100%", "2.50 x", "5.00 x", "0.67 x"],
        *(["32k", "1", share, "-", "-", "-"] for share in ("10%", "30%", "100%")),
    ]


def test_the_plain_command_assumes_shares_and_names_them() -> None:
    """What the command has where --attention-share is not given, and that its help calls it an assumption."""
    plain = command.make_context("bench", ["--model", "qwen3.5-122b", "--concurrency", "1,2,4"])
    assert plain.params["attention_shares"] == ASSUMED_SHARES == (0.1, 0.2, 0.4)
    given = command.make_context("bench", ["--model", "qwen3.5-122b", "--attention-share", "0.25,0.5,0.25"])
    assert given.params["attention_shares"] == (0.25, 0.5)
    help_text = " ".join(command.get_help(plain).split())
    assert "attention is assumed to take" in help_text and "0.1,0.2,0.4" in help_text


def test_the_json_keeps_what_was_measured_apart_from_what_was_assumed() -> None:
    workload = load_model("qwen3.5-122b")
    data = json.loads(json.dumps(to_json(workload, FORMAT, TARGET, [row()], (0.3, 0.6))))
    assert data["evidence"] == "measured" and data["rows"][0]["roles_us"]["wph"] == pytest.approx(400)
    assert data["rows"][0]["times"]["triton"] == pytest.approx(
        {"median_us": 3000, "ci_low_us": 2700, "ci_high_us": 3300}
    )
    assert data["assumed"]["attention_shares_of_bf16_step"] == [0.3, 0.6]
    first, second = data["assumed"]["step_time_over_bf16"]
    assert (first["batch"], first["context"]) == (second["batch"], second["context"]) == (4, 4096)
    assert (first["attention_share"], second["attention_share"]) == (0.3, 0.6)
    assert first["wph"] == pytest.approx(0.9) and second["wph"] == pytest.approx(0.8)
    assert not any("assumed" in key or "share" in key for key in data["rows"][0])


# --- the seed's path --------------------------------------------------------------------------------------------------


def both_steps(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the two steps give with the reference's dequantisation as the first, and what they should."""
    case = synthetic_cache(slot_layout(FORMAT, 64), lengths, q_heads=8, kv_heads=2, stale_table=False)
    key, value = (torch.full((case.block_table.numel(), 16, 2, 64), float("nan")).bfloat16() for _ in range(2))

    def first() -> None:
        for out, rows in zip((key, value), dequantize(case.kv_cache, case.codec), strict=True):
            out.copy_(rows[case.block_table.flatten().long()].nan_to_num())

    return dequantize_then_attend(first, key, value, case, "sdpa_bf16")(), case.expected()


def test_the_second_step_reads_what_the_first_wrote() -> None:
    got, expected = both_steps((70, 70, 70))
    assert float((got.double() - expected).norm() / expected.norm()) < 5e-3
    with pytest.raises(TunerError, match="different lengths"):
        both_steps((70, 33))


@pytest.mark.gpu
def test_every_role_is_timed_on_a_gpu(tmp_path: Path) -> None:
    target = attached()
    assert target is not None
    told: list[str] = []
    workload = load_model("nemotron-h-120b")
    (found,) = bench_model(workload, FORMAT, [2], [2048], target, budget_s=5, root=tmp_path, tell=told.append)
    assert told == ["race 1 of 1: head dim 128, 2 x 2048 tokens"]
    times = {role: found.role_us(role) for role in ROLES}
    assert all(times.values()), (times, found.missing)
    assert times["seed"] > times["bf16"]  # type: ignore[operator]


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--attention-share 0", "--attention-share is 0.0"),
        ("--attention-share 0.2,1.5", "--attention-share is 1.5"),
        ("--attention-share nan", "--attention-share is nan"),
        ("--attention-share most", "'most' is not a list of shares"),
        ("--budget 0", "--budget is 0.0"),
        ("--context 4096,0", "at least 1"),
        ("--json taken/x.json", "cannot write to taken"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(arguments: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    tune = Path(__file__).resolve().parents[1] / "tune.py"
    argv = [sys.executable, str(tune), "bench", "--model", "qwen3-4b", *arguments.split()]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode in (1, 2) and words in done.stderr and len(done.stderr.splitlines()) == 1
