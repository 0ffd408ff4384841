"""The command line as its users meet it: real processes, exit codes, and one clear line for every mistake."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import ROOT, TUNE, Done, make_table, refused, tune

# --- speed ------------------------------------------------------------------------------------------------------------


def seconds(*command: str) -> float:
    """Least processor time of three runs: what a machine that is not busy takes. Coverage stays out of it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COV")}
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True, env=environment, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


def test_help_is_quick() -> None:
    assert seconds(sys.executable, str(TUNE), "--help") < 0.5


def test_import_is_quick_and_light() -> None:
    assert seconds(sys.executable, "-c", "import tuner") < 0.3
    heavy = "{'torch', 'triton', 'optuna', 'cupy', 'jinja2', 'numpy', 'rich'}"
    code = f"import sys, tuner, tuner.cli; print(*{heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""


# --- help -------------------------------------------------------------------------------------------------------------


def test_help_teaches_options_examples_and_verbs(tmp_path: Path) -> None:
    done = tune("--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    verbs = ("export", "install", "bench", "verify", "explain", "report", "space", "doctor")
    options = ("model", "head-dim", "kv-cache-dtype", "kv-heads")
    options += ("gqa", "op", "arch", "warps", "trials", "timeout", "race-timeout")
    options += ("recordings", "tensor-parallel-size")
    options += ("workers", "gpus", "storage", "resume", "no-resume", "seed", "output", "debug")
    for word in (*verbs, *(f"--{option}" for option in options), "python tune.py --head-dim 256"):
        assert word in done.stdout
    # Options alone mean the verb tune, so its help is the same page.
    assert tune("--op", "dequant", "--help", cwd=tmp_path).stdout == done.stdout


@pytest.mark.parametrize(
    "verb", ["tune", "export", "install", "bench", "verify", "explain", "report", "space", "doctor"]
)
def test_every_verb_explains_itself(verb: str, tmp_path: Path) -> None:
    done = tune(verb, "--help", cwd=tmp_path)
    assert done.returncode == 0 and "--debug" in done.stdout


def test_version(tmp_path: Path) -> None:
    from tuner import __version__

    assert __version__ in tune("--version", cwd=tmp_path).stdout


# --- bad usage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("", ("neither", "--head-dim", "--model")),
        ("--head-dim 96", ("head dim 96", "64, 128, 256, 512")),
        ("--head-dim many", ("many", "--head-dim")),
        ("--head-dim 256 --model qwen3-4b", ("both",)),
        ("--model no-such-model", ("no-such-model", "qwen3-4b", "config.json")),
        ("--model qwen3-4b --gqa 4", ("--gqa", "--model")),
        ("--head-dim 256 --gqa 17", ("group size 17",)),
        ("--head-dim 256 --gqa 0", ("group size 0",)),
        ("--head-dim 256 --kv-cache-dtype fp8", ("fp8", "turboquant_4bit_nc")),
        ("--head-dim 256 --op prefill", ("prefill", "decode, dequant")),
        ("--head-dim 256 --arch sm_70", ("sm_70", "sm_121")),
        ("--head-dim 256 --warps 3", ("warps", "3")),
        ("--head-dim 256 --warps 1,,2", ("1,,2",)),
        ("--head-dim 256 --trials 0", ("--trials", "0")),
        ("--head-dim 256 --trials -5", ("--trials", "-5")),
        ("--head-dim 256 --trials 999999999", ("--trials", "100000")),
        ("--head-dim 256 --timeout 0", ("--timeout",)),
        ("--head-dim 256 --timeout nan", ("--timeout",)),
        ("--head-dim 256 --timeout inf", ("--timeout", "a week")),
        ("--head-dim 256 --gpus -1", ("GPU -1", "not attached")),
        ("--head-dim 256 --race-timeout 0", ("--race-timeout", "0")),
        ("--head-dim 256 --workers 0", ("--workers",)),
        ("--head-dim 256 --seed -1", ("--seed",)),
        ("--head-dim 256 --gpus 99", ("GPU 99", "not attached")),
        ("--head-dim 256 --no-such-option", ("--no-such-option",)),
        ("--head-dim 256 --op store --arch sm_100", ("static model knows decode and dequant only", "to tune store")),
        ("--head-dim 256 --op dequant --warps 1,4 --gpus 0,1", ("one GPU", "--gpus")),
        ("--head-dim 256 --op store --warps 4,8 --gpus 0,99", ("GPU", "not attached")),
        ("--model qwen3-4b --kv-heads 8", ("--kv-heads", "--model")),
        ("--head-dim 128 --kv-heads 0", ("0 KV heads",)),
        ("--model qwen3-4b -tp 3", ("32 query and 8 KV heads", "3 GPUs")),
        ("install --model qwen3-4b --tensor-parallel-size 0", ("0 GPUs",)),
        ("frobnicate", ("frobnicate", "doctor")),
        ("space --head-dim 100", ("head dim 100",)),
        ("bench --model qwen3-4b --concurrency 0", ("at least 1",)),
        ("explain --batch 0", ("--batch",)),
        ("verify no/such/table.json", ("no/such/table.json",)),
        ("install --model nope", ("nope", "config.json")),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(args: str, words: tuple[str, ...], tmp_path: Path) -> None:
    refused(tune(*args.split(), cwd=tmp_path), 2, *words)
    assert not any(tmp_path.iterdir()), "nothing may be written for a request that is wrong"


def test_config_without_attention_fields(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "resnet", "num_channels": 3}')
    refused(tune("--model", config, cwd=tmp_path), 2, "config.json")


def test_debug_keeps_the_traceback(tmp_path: Path) -> None:
    done = tune("--head-dim", "96", "--debug", cwd=tmp_path)
    assert done.returncode != 0 and "Traceback" in done.stderr and "UsageError" in done.stderr


# --- what the machine lacks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["file/tables", "/proc/tables"])
def test_unwritable_output_is_told_before_anything_is_built(output: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(tune("--head-dim", 256, "--output", output, cwd=tmp_path), 1, "cannot write", output)
    assert (tmp_path / "file").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_no_compiler(tmp_path: Path) -> None:
    empty = tmp_path / "bin"
    empty.mkdir()
    refused(tune("--head-dim", 256, cwd=tmp_path, PATH=str(empty), CUDA_HOME="", CUDA_PATH=""), 1, "nvcc")


@pytest.mark.parametrize("url", ["not a url", "sqlite:///FOLDER/file/study.db", "postgresql://nobody@127.0.0.1:9/none"])
def test_storage_that_does_not_answer(url: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file, so nothing can be made in it")
    url = url.replace("FOLDER", str(tmp_path))
    done = tune("--head-dim", 256, "--trials", 1, "--storage", url, cwd=tmp_path)
    refused(done, 2 if url == "not a url" else 1, "storage")


def test_bench_without_a_gpu_says_so(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here: what is tested is a machine without one")
    refused(tune("bench", "--model", "qwen3-4b", cwd=tmp_path), 1, "GPU 0", "doctor")


def test_space_counts_and_gives_reasons(tmp_path: Path) -> None:
    for op, word in (("decode", "idle_head_warps"), ("dequant", "shared_memory"), ("store", "row_too_wide")):
        done = tune("space", "--head-dim", 128, "--arch", "sm_121", "--op", op, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        for expected in ("axes", "warps", "constraints", word, "left to search"):
            assert expected in done.stdout, op


def test_doctor_answers_without_a_gpu_and_without_a_compiler(tmp_path: Path) -> None:
    done = tune("doctor", cwd=tmp_path, PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    for word in ("nvcc", "g++", "GPU", "torch", "->"):
        assert word in done.stdout


def test_output_that_nobody_reads_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} {TUNE} space --head-dim 128 --arch sm_121 --op dequant | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


# --- a search, without a GPU ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """A finished search of four kernels for an absent GPU, and the folder it ran in."""
    folder = tmp_path_factory.mktemp("search")
    return folder, tune("--head-dim", 128, "--arch", "sm_121", "--trials", 4, cwd=folder, timeout=300)


def test_search_ends_with_winners_and_the_tables_path(searched: tuple[Path, Done]) -> None:
    folder, done = searched
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    (path,) = (folder / "build/tables").glob("turboquant_decode,head_dim=128,*.json")
    assert lines[-1] == f"dispatch table: {path.relative_to(folder)}"
    assert any("trial 4/4" in line for line in lines)
    rows = [line for line in lines if line.count(" x") and "predicted" in line and "│" in line]
    table = json.loads(path.read_text())
    assert table["evidence"] == "predicted" and len(rows) == len(table["by_batch_and_context"])
    assert tune("verify", cwd=folder).returncode == 0


def kernels(folder: Path) -> dict[Path, int]:
    """When each of the search's cubins was written."""
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*.cubin") if "tables" not in p.parts}


@pytest.fixture(scope="module")
def searched_again(searched: tuple[Path, Done]) -> tuple[Path, dict[Path, int]]:
    """The folder after the same search once more, with recordings, and the cubins that were there before."""
    folder, _ = searched
    before = kernels(folder)
    done = tune("--head-dim", 128, "--arch", "sm_121", "--trials", 4, "--recordings", "kept", cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, before


def test_recordings_hold_every_trial(searched_again: tuple[Path, dict[Path, int]]) -> None:
    folder, _ = searched_again
    (recording,) = (folder / "kept").iterdir()
    trials = json.loads(recording.read_text())["trials"]
    assert len(trials) == 4 and all(len(t["timings"]) == 46 for t in trials if t["score"])


def test_a_comparison_has_no_recordings(tmp_path: Path) -> None:
    done = tune("--head-dim", 128, "--arch", "sm_121", "--warps", "2,4", "--recordings", "kept", cwd=tmp_path)
    assert done.returncode == 2 and "--recordings is given with several --warps" in done.stderr
    assert not any(tmp_path.iterdir())


def test_second_search_compiles_nothing(searched_again: tuple[Path, dict[Path, int]]) -> None:
    folder, before = searched_again
    assert before and before == kernels(folder)


def test_a_missing_host_compiler_is_told_before_anything_is_tried(tmp_path: Path) -> None:
    refused(tune("--head-dim", 128, "--trials", 2, cwd=tmp_path, CXX="/no/such/g++"), 1, "/no/such/g++")
    assert not (tmp_path / "build" / "study.db").exists()


def test_a_folder_is_no_file_to_write(tmp_path: Path) -> None:
    path = make_table(tmp_path / "tables")
    refused(tune("report", path, "--html", tmp_path, cwd=tmp_path), 2, "is a folder")
    refused(tune("bench", "--model", "qwen3-4b", "--json", tmp_path, cwd=tmp_path), 2, "is a folder")


def test_interrupt_says_how_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, str(TUNE), "--head-dim", "128", "--arch", "sm_121", "--trials", "64"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.readline()  # the heading: the search is about to begin
    time.sleep(3)
    os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does: the whole group gets it
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    # click ends the line that the terminal's ^C stands on, hence strip.
    assert len(error.strip().splitlines()) == 1 and "goes on from there" in error
