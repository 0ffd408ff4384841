"""One compilation: what is published where, what is tried again, and what ptxas says; with the real compiler."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels_for_build import BROKEN, GREEDY, tiny
from tuner import nvcc_job

PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'wph_decode' for 'sm_90'
ptxas info    : Function properties for helper
    64 bytes stack frame, 60 bytes spill stores, 60 bytes spill loads
ptxas info    : Function properties for wph_decode
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 2048 bytes smem, 384 bytes cmem[0]
ptxas info    : Compiling entry function 'other' for 'sm_90'
"""


def job(folder: Path, text: str, **changes: Any) -> dict[str, Any]:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    (folder / "staging").mkdir(exist_ok=True)
    (folder / "source.cu").write_text(text)
    return {
        "final": str(folder / "final" / "key"),
        "failed": str(folder / "failed" / "key"),
        "staging": str(folder / "staging"),
        "source": str(folder / "source.cu"),
        "command": [nvcc, "-cubin", "-arch=sm_90", "-Xptxas=-v"],
        "entry": "wph_decode",
        "timeout_s": 100.0,
        "lock": str(folder / "lock"),
    } | changes


def failure(folder: Path) -> dict[str, Any]:
    """What was published as failed; nothing else may be left."""
    assert not (folder / "final" / "key").exists()
    assert list((folder / "staging").iterdir()) == []
    result: dict[str, Any] = json.loads((folder / "failed" / "key" / nvcc_job.RESULT).read_text())
    return result


def test_ptxas_counts_the_entry_and_not_its_helpers() -> None:
    assert nvcc_job.parse_ptxas(PTXAS) == {
        "wph_decode": {"registers": 40, "spill_bytes": 20, "shared_bytes": 2048, "stack_bytes": 16},
        "other": {"registers": 0, "spill_bytes": 0, "shared_bytes": 0, "stack_bytes": 0},
    }
    assert nvcc_job.parse_ptxas("") == {}


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("note: x\nk.cu(3): error: nothing\nmore", "k.cu(3): error: nothing"),
        ("nvcc FATAL : no such arch", "nvcc FATAL : no such arch"),
        ("\n  something odd \nmore", "something odd"),
        (" \n", "the compiler failed without a message"),
    ],
)
def test_the_line_that_says_what_is_wrong(log: str, line: str) -> None:
    assert nvcc_job.first_error(log) == line


def test_results_that_do_not_count(tmp_path: Path) -> None:
    def written(**result: Any) -> dict[str, Any] | None:
        (tmp_path / nvcc_job.RESULT).write_text(json.dumps(result))
        return nvcc_job.read_result(tmp_path)

    assert nvcc_job.read_result(tmp_path / "none") is None
    failure = {"kind": "compile", "message": "error: no"}
    assert written(**failure, retry=True) is None
    assert written(**failure, retry=False) == failure | {"retry": False}
    sha = hashlib.sha256(b"x").hexdigest()
    whole = {"cubin_sha256": sha, "entries": {"wph_decode": {}}}
    assert written(**whole) is None  # no cubin beside it
    (tmp_path / "kernel.cubin").write_bytes(b"x")
    assert written(**whole) == whole
    assert written(cubin_sha256=sha) is None
    (tmp_path / "kernel.cubin").write_bytes(b"y")
    assert written(**whole) is None
    (tmp_path / nvcc_job.RESULT).write_text("{")
    assert nvcc_job.read_result(tmp_path) is None


def test_a_cubin_is_published_once(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job(tmp_path, tiny(1).text)))
    assert nvcc_job.main(str(path)) == 0
    final = tmp_path / "final" / "key"
    result = nvcc_job.read_result(final)
    assert result is not None and result["entries"]["wph_decode"]["registers"] > 0
    assert (final / "kernel.cubin").read_bytes().startswith(b"\x7fELF")
    assert list((tmp_path / "staging").iterdir()) == []
    before = (final / "kernel.cubin").stat().st_mtime_ns
    path.write_text(json.dumps(job(tmp_path, tiny(1).text, command=["/no/such/compiler"])))
    assert nvcc_job.main(str(path)) == 0  # the result is there: no compiler is started
    assert (final / "kernel.cubin").stat().st_mtime_ns == before


def test_failures_say_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job(tmp_path, BROKEN.text)))
    assert nvcc_job.main(str(path)) == 1
    result = failure(tmp_path)
    assert result["kind"] == "compile" and "nothing" in result["message"] and not result["retry"]
    assert nvcc_job.main(str(path)) == 0  # known: not compiled again


def test_too_much_shared_memory_is_a_matter_of_resources(tmp_path: Path) -> None:
    assert not nvcc_job.compile_one(job(tmp_path, GREEDY.text))
    result = failure(tmp_path)
    assert result["kind"] == "resource" and "too much shared data" in result["message"]


def test_a_kernel_of_another_name(tmp_path: Path) -> None:
    assert not nvcc_job.compile_one(job(tmp_path, tiny(2).text, entry="wph_other"))
    assert failure(tmp_path)["message"] == "the source has no kernel named wph_other"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("kill -9 $$", "without a message"),
        ("echo 'k.cu: error: No space left on device'; exit 1", "No space left"),
        ("exit 137", "without a message"),
        ("sleep 60", "longer than 0.3 s"),
    ],
)
def test_what_says_nothing_about_the_source_is_tried_again(tmp_path: Path, script: str, message: str) -> None:
    timeout_s = 0.3 if "sleep" in script else 60.0
    made = job(tmp_path, tiny(3).text, command=["/bin/sh", "-c", script], timeout_s=timeout_s)
    assert not nvcc_job.compile_one(made)
    result = failure(tmp_path)
    assert result["retry"] and message in result["message"]
    assert nvcc_job.read_result(tmp_path / "failed" / "key") is None
    assert nvcc_job.compile_one(job(tmp_path, tiny(3).text))


def test_an_attempt_that_does_not_count_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "final" / "key").mkdir(parents=True)
    (tmp_path / "final" / "key" / "rest").write_text("of an attempt without a cubin")
    assert nvcc_job.compile_one(job(tmp_path, tiny(4).text))
    assert not (tmp_path / "final" / "key" / "rest").exists()


def test_a_folder_removed_under_the_compiler_blames_nobody(tmp_path: Path) -> None:
    script = "rm -r ../nvcc-*; exit 1"
    assert not nvcc_job.compile_one(job(tmp_path, tiny(5).text, command=["/bin/sh", "-c", script]))
    assert not (tmp_path / "failed").exists()


def test_the_script_needs_nothing_but_the_standard_library(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job(tmp_path, BROKEN.text)))
    done = subprocess.run([sys.executable, "-I", "-S", nvcc_job.__file__, str(path)], check=False)
    assert done.returncode == 1
    assert failure(tmp_path)["kind"] == "compile"
