"""Builds: content-addressed, atomic, safe against kills and rivals. All compilers here are real."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.kernels_for_build import BROKEN, GREEDY, LOOPS, tiny
from tuner import toolchain
from tuner.build import BuildFailure, Built, build, cache_key
from tuner.cubin import read_cubin
from tuner.errors import TunerError, UsageError
from tuner.nvcc_job import first_error, parse_ptxas

REPO = Path(__file__).resolve().parent.parent
DRIVER = """
import sys
from pathlib import Path
from tests.kernels_for_build import tiny
from tuner.build import Built, build
results = build([tiny(n) for n in range(int(sys.argv[2]))], ["sm_90"], root=Path(sys.argv[1]), jobs=2)
print(sum(isinstance(r, Built) for r in results.values()))
"""


@pytest.fixture
def compiler_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A log with one line per compilation: CUDA_HOME's nvcc notes each and hands over to the real one."""
    nvcc = toolchain.find().nvcc
    log = tmp_path / "runs.txt"
    log.touch()
    (tmp_path / "toolkit" / "bin").mkdir(parents=True)
    wrapper = tmp_path / "toolkit" / "bin" / "nvcc"
    wrapper.write_text(f'#!/bin/sh\ncase "$*" in *"-o kernel.cubin"*) echo run >> {log};; esac\nexec {nvcc} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    return log


def runs(log: Path) -> int:
    return len(log.read_text().splitlines())


def start(root: Path, number: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(root), str(number)],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def descendants(pid: int) -> list[int]:
    """All processes below ``pid``, whatever their session."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [pid]
    for parent in found:
        found += [child for child, above in parents.items() if above == parent]
    return found


def test_one_graph_for_good_and_bad(tmp_path: Path, compiler_runs: Path) -> None:
    """Good kernels come back with resources, bad ones with their message and files; nothing runs a second time."""
    steps: list[tuple[int, int]] = []
    sources = [LOOPS, BROKEN, GREEDY]
    results = build(sources, ["sm_90", "sm_121"], root=tmp_path / "b", progress=lambda *step: steps.append(step))
    assert list(results) == [(s.digest, a) for s in sources for a in ("sm_90", "sm_121")]
    assert steps == [(i, 6) for i in range(7)]
    assert runs(compiler_runs) == 6
    for arch in ("sm_90", "sm_121"):
        good = results[LOOPS.digest, arch]
        assert isinstance(good, Built)
        assert (good.entry, good.shared_bytes, good.spill_bytes) == ("wph_decode", 4096, 0)
        assert set(good.entries) == {"wph_decode", "wph_decode_reduce"}
        cubin = read_cubin(good.cubin)
        assert cubin.arch == arch
        for name, entry in good.entries.items():
            kernel = cubin.kernel(name)
            assert (kernel.registers, kernel.shared_bytes) == (entry.registers, entry.shared_bytes)
        assert (good.cubin.parent / "kernel.cu").read_text() == LOOPS.text

        bad = results[BROKEN.digest, arch]
        assert isinstance(bad, BuildFailure)
        assert (bad.kind, bad.message) == ("compile", 'kernel.cu(2): error: identifier "nothing" is undefined')
        assert bad.message in bad.log.read_text()
        assert (bad.log.parent / "kernel.cu").read_text() == BROKEN.text

        greedy = results[GREEDY.digest, arch]
        assert isinstance(greedy, BuildFailure)
        assert greedy.kind == "resource"
        assert "shared" in greedy.message

    assert build(sources, ["sm_90", "sm_121"], root=tmp_path / "b") == results
    assert runs(compiler_runs) == 6
    assert not list((tmp_path / "b" / "staging").iterdir())

    # One more kernel compiles one more kernel.
    build([*sources, tiny(0)], ["sm_90"], root=tmp_path / "b")
    assert runs(compiler_runs) == 7


def test_killed_in_the_middle(tmp_path: Path) -> None:
    """SIGKILL to the builder and all its children; what is there is whole, and the next build does the rest."""
    number, root = 6, tmp_path / "b"
    process = start(root, number)
    deadline = time.monotonic() + 60
    while not list(root.glob("cubins/sm_90/*/result.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in reversed(descendants(process.pid)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.communicate()
    before = {p.parent.name: p.stat().st_mtime_ns for p in root.glob("cubins/sm_90/*/kernel.cubin")}
    assert 1 <= len(before) < number
    assert all((root / "cubins/sm_90" / key / "result.json").is_file() for key in before)

    sources = [tiny(n) for n in range(number)]
    again = build(sources, ["sm_90"], root=root)
    clean = build(sources, ["sm_90"], root=tmp_path / "clean")
    for place, built in again.items():
        fresh = clean[place]
        assert isinstance(built, Built)
        assert isinstance(fresh, Built)
        assert built.cubin.parent.name == fresh.cubin.parent.name
        assert read_cubin(built.cubin) == read_cubin(fresh.cubin)
        assert built.entries == fresh.entries
    after = {p.parent.name: p.stat().st_mtime_ns for p in root.glob("cubins/sm_90/*/kernel.cubin")}
    assert after.items() >= before.items()


def test_two_builders_of_the_same_sources(tmp_path: Path, compiler_runs: Path) -> None:
    rivals = [start(tmp_path / "b", 4) for _ in range(2)]
    assert [r.communicate()[0].strip() for r in rivals] == ["4", "4"]
    assert runs(compiler_runs) == 4


def test_a_cancelled_build_ends_its_compilers(tmp_path: Path, compiler_runs: Path) -> None:
    cancel, sources = threading.Event(), [tiny(n) for n in range(40)]
    timer = threading.Timer(2.0, cancel.set)
    timer.start()
    start_s = time.monotonic()
    with pytest.raises(TunerError, match="cancelled with"):
        build(sources, ["sm_90"], root=tmp_path, jobs=2, cancel=cancel)
    begun = runs(compiler_runs)
    assert 0 < begun < len(sources) and not list((tmp_path / "staging").glob("graph-*"))
    with pytest.raises(TunerError, match="cancelled with"):  # nor does it begin others
        build(sources, ["sm_90"], root=tmp_path, jobs=2, cancel=cancel)
    assert time.monotonic() - start_s < 15 and runs(compiler_runs) <= begun + 2


def test_timeout_is_reported_and_tried_again(tmp_path: Path, compiler_runs: Path) -> None:
    late = build([tiny(1)], ["sm_90"], root=tmp_path / "b", timeout_s=0.05)[tiny(1).digest, "sm_90"]
    assert isinstance(late, BuildFailure)
    assert (late.kind, late.message) == ("compile", "nvcc took longer than 0.05 s")
    assert isinstance(build([tiny(1)], ["sm_90"], root=tmp_path / "b")[tiny(1).digest, "sm_90"], Built)
    assert runs(compiler_runs) == 2


def test_a_missing_host_compiler_is_the_machines_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = (tiny(1).digest, "sm_90")
    with monkeypatch.context() as broken:
        broken.setenv("CXX", "/bin/false")
        failed = build([tiny(1)], ["sm_90"], root=tmp_path)[place]
    assert isinstance(failed, BuildFailure) and failed.retry, failed
    assert isinstance(build([tiny(1)], ["sm_90"], root=tmp_path)[place], Built)
    wrong = build([BROKEN], ["sm_90"], root=tmp_path)[BROKEN.digest, "sm_90"]
    assert isinstance(wrong, BuildFailure) and not wrong.retry


@pytest.mark.parametrize("damage", ["cubin", "entries", "nonsense"])
def test_a_damaged_result_is_built_again(tmp_path: Path, damage: str) -> None:
    place = (tiny(1).digest, "sm_90")
    first = build([tiny(1)], ["sm_90"], root=tmp_path)[place]
    assert isinstance(first, Built)
    whole, result = first.cubin.read_bytes(), first.cubin.with_name("result.json")
    if damage == "cubin":
        first.cubin.write_bytes(whole[:-100])
    else:
        result.write_text("{}" if damage == "entries" else "[1, 2]")
    again = build([tiny(1)], ["sm_90"], root=tmp_path)[place]
    assert isinstance(again, Built) and hashlib.sha256(again.cubin.read_bytes()).hexdigest() == again.cubin_sha256


def test_lost_cubin_is_built_again(tmp_path: Path) -> None:
    place = (tiny(1).digest, "sm_90")
    first = build([tiny(1)], ["sm_90"], root=tmp_path)[place]
    assert isinstance(first, Built)
    first.cubin.unlink()
    assert isinstance(build([tiny(1)], ["sm_90"], root=tmp_path)[place], Built)
    assert first.cubin.is_file()


def test_stale_staging_is_swept_but_not_a_rivals(tmp_path: Path) -> None:
    old, young = tmp_path / "staging" / "graph-old", tmp_path / "staging" / "graph-young"
    for folder in (old, young):
        folder.mkdir(parents=True)
    os.utime(old, (1, 1))
    build([tiny(1)], ["sm_90"], root=tmp_path)
    assert young.exists()
    assert not old.exists()


def test_source_without_its_kernel(tmp_path: Path) -> None:
    from tests.kernels_for_build import source

    empty = source('extern "C" __global__ void other(int *x) { x[0] = 1; }\n')
    result = build([empty], ["sm_90"], root=tmp_path)[empty.digest, "sm_90"]
    assert isinstance(result, BuildFailure)
    assert "no kernel named wph_decode" in result.message


def test_bad_requests(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no facts about architecture 'sm_42'"):
        build([tiny(1)], ["sm_42"], root=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(TunerError, match="cannot write to the build folder"):
        build([tiny(1)], ["sm_90"], root=tmp_path / "file" / "b")


def test_key_covers_every_input() -> None:
    keys = {
        cache_key("a", "sm_90", "13.0.88"),
        cache_key("b", "sm_90", "13.0.88"),
        cache_key("a", "sm_121", "13.0.88"),
        cache_key("a", "sm_90", "13.0.89"),
        cache_key("a", "sm_90", "13.0.88", ["-O2"]),
    }
    assert len(keys) == 5
    assert cache_key("a", "sm_90", "13.0.88") in keys


def test_ptxas_output_with_spills() -> None:
    text = (
        "ptxas info    : Compiling entry function 'k' for 'sm_90'\n"
        "ptxas info    : Function properties for k\n"
        "    120 bytes stack frame, 96 bytes spill stores, 104 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers, 120 bytes cumulative stack size\n"
    )
    assert parse_ptxas(text) == {"k": {"registers": 255, "spill_bytes": 200, "shared_bytes": 0, "stack_bytes": 120}}
    assert parse_ptxas("nonsense") == {}
    assert first_error("note\nx.cu(3): error: what\nmore") == "x.cu(3): error: what"
    assert first_error("") == "the compiler failed without a message"
