"""The measuring child's own parts where there is no GPU: the protocol, the pool's arithmetic, the clock."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from tuner.errors import TunerError
from tuner.formats import slot_layout
from tuner.launch import ResourceError
from tuner.measure.child import Child, _failure, serve
from tuner.measure.clock import DROP, Clock
from tuner.measure.pool import Pool
from tuner.measure.samples import Sample
from tuner.reference import synthetic_cache
from tuner.space import Config, Problem, default_config
from tuner.workload import Bucket, Shape

FORMAT = "turboquant_4bit_nc"
SHAPE = Shape(128, 32, 8)

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: this is what happens without one")


def answers_to(*lines: str, make: Any = None) -> list[dict[str, Any]]:
    made = make or (lambda: Child(0, 16, None, 0))
    answers = StringIO()
    assert serve(StringIO("".join(f"{line}\n" for line in lines)), answers, made) == 0
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def request(op: str, number: int = 1, **fields: Any) -> str:
    return json.dumps({"id": number, "op": op, **fields})


@without_gpu
def test_every_request_is_answered_in_order_and_under_its_number() -> None:
    lines = [request(op, 10 + i) for i, op in enumerate(("check", "time", "baseline", "race"))]
    answers = answers_to(*lines)
    assert [a["id"] for a in answers] == [10, 11, 12, 13]
    for answer in answers:
        assert answer["failure"]["kind"] == "error"
        assert answer["failure"]["message"].startswith("no NVIDIA GPU")


@pytest.mark.parametrize(
    ("line", "number", "words"),
    [
        ("{", None, "JSONDecodeError"),
        ('{"op": "check"}', None, "KeyError: 'id'"),
        ('{"id": 4}', 4, "KeyError: 'op'"),
        (request("forget_scratch", 5), 5, "unknown operation 'forget_scratch'"),
        (request("__init__", 6), 6, "expected check, time, baseline or race"),
    ],
)
def test_a_bad_request_is_answered_without_starting_anything(line: str, number: int | None, words: str) -> None:
    def make() -> Child:
        raise AssertionError("a bad request must not touch the GPU")

    (answer,) = answers_to(line, make=make)
    assert answer["id"] == number
    assert answer["failure"]["kind"] == "error" and words in answer["failure"]["message"]


def test_no_request_no_answer() -> None:
    assert answers_to() == []


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ResourceError("too many registers"), "resource", "too many registers"),
        (torch.cuda.OutOfMemoryError("tried to allocate\nand more"), "resource", "tried to allocate"),
        (TunerError("no cubin"), "error", "no cubin"),
        (RuntimeError("CUDA error: an illegal access\nsee above"), "crash", "CUDA error: an illegal access"),
        (RuntimeError(), "crash", "RuntimeError"),
        (KeyError("level"), "error", "KeyError: 'level'"),
        (ValueError("  "), "error", "ValueError: ValueError"),
    ],
)
def test_errors_become_failures_of_one_line(error: Exception, kind: str, message: str) -> None:
    failure = _failure(error)
    assert (failure.kind, failure.message) == (kind, message)


@without_gpu
def test_the_module_serves_its_standard_input() -> None:
    """Standard output holds answers only; the status is that of an orderly end."""
    done = subprocess.run(
        [sys.executable, "-m", "tuner.measure.child", "--device=0", "--block-size=32", "--pool-bytes=1000"],
        input=request("check", 7) + "\n",
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        timeout=120,
    )
    assert done.returncode == 0
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == [7]
    assert "Traceback" in done.stderr and "no NVIDIA GPU" in done.stderr


def test_buckets_beyond_the_budget_are_left_out() -> None:
    layout = slot_layout(FORMAT, 128)
    block_bytes = 16 * SHAPE.kv_heads * layout.token_bytes
    pool = Pool(16, 63 * block_bytes, seed=0)
    assert pool.cases(SHAPE, FORMAT, [Bucket(1, 1024), Bucket(8, 16384)]) == {}  # the first needs 64 blocks


@pytest.mark.parametrize("bucket", [Bucket(1, 1), Bucket(3, 1000), Bucket(4, 65536, ragged=True)])
@pytest.mark.parametrize("block_size", [16, 32])
def test_blocks_of_a_bucket_hold_its_tokens(bucket: Bucket, block_size: int) -> None:
    blocks = Pool(block_size, 0, seed=3)._blocks(bucket)
    tokens = sum(bucket.lengths(3))
    assert tokens <= blocks * block_size < tokens + bucket.batch * block_size


class OneCall(Child):
    """A child without a GPU: a call is the bucket's number of requests, and more than four exceed the memory."""

    def __init__(self) -> None:
        self.pool, self.timer = self, self  # type: ignore[assignment]
        self._dequantized = {}

    def cases(self, shape: Shape, cache_format: str, buckets: list[Bucket]) -> dict[str, Any]:
        return {b.key: b for b in buckets}

    @contextmanager
    def _loaded(self, config: Config, cubin: str) -> Any:
        yield None

    def _prepare(self, kernel: Any, case: Any, splits: int) -> Any:
        return case.batch * splits

    def reserve(self, shape: Shape, cache_format: str, buckets: list[Bucket]) -> None:
        pass

    def forget_dense(self) -> None:
        pass

    def capture(self, call: int) -> int:
        if call > 4:
            raise torch.cuda.OutOfMemoryError("tried to allocate 99 GiB\nand more")
        return call

    def short(self, replay: int) -> Sample:
        return Sample.of([float(replay)])


def test_a_bucket_without_memory_costs_no_other_bucket(capsys: pytest.CaptureFixture[str]) -> None:
    timed = {
        "config": default_config(Problem("decode", 128, 4, FORMAT)).to_dict(),
        "cubin": "none.cubin",
        "shape": asdict(SHAPE),
        "buckets": [asdict(Bucket(batch, 1024)) for batch in (1, 8, 3)],
        "splits": [1, 2],
        "reserve": [],
    }
    timings = OneCall().time(timed)
    assert [(t["bucket"], t["splits"]) for t in timings] == [("b1_c1024", 1), ("b1_c1024", 2), ("b3_c1024", 1)]
    assert "b8_c1024: tried to allocate 99 GiB\n" in capsys.readouterr().err


def test_a_baseline_on_the_compressed_cache_gets_the_case_itself() -> None:
    case = synthetic_cache(slot_layout(FORMAT, 64), (40, 7), q_heads=8, kv_heads=2)
    inputs = Pool(16, 0, seed=0).inputs(case, dense=False)
    assert inputs.kv_cache is case.kv_cache and inputs.query is case.query
    assert inputs.dense is None and inputs.gqa == 4


# The clock, with a library of NVML's name and signatures that answers from a script.

NVML = r"""
extern "C" {
static int call = 0;
int nvmlInit_v2() { return INIT; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    *handle = (void *)1;
    return uuid[0] == 'G' && uuid[1] == 'P' && uuid[2] == 'U' && uuid[3] == '-' ? 0 : 6;
}
int nvmlDeviceGetClockInfo(void *handle, int type, unsigned *mhz) {
    if (handle != (void *)1 || type != 1) return 2;
    const unsigned script[] = {1980, 1980, 1500, 0, 1980};
    *mhz = script[call % 5];
    return script[call++ % 5] ? 0 : 999;
}
}
"""


def clock_readings(folder: Path, uuid: str, init: int) -> list[list[Any]]:
    """(reading, throttled) of five readings in a process that finds the scripted library."""
    gxx = shutil.which("g++")
    if gxx is None:
        pytest.skip("no g++ on PATH")
    (folder / "nvml.cpp").write_text(NVML)
    library = folder / "libnvidia-ml.so.1"
    subprocess.run([gxx, "-shared", "-fPIC", f"-DINIT={init}", "-o", library, folder / "nvml.cpp"], check=True)
    code = (
        "import json; from tuner.measure.clock import Clock\n"
        f"clock = Clock({uuid!r}); read = [clock.read_mhz() for _ in range(5)]\n"
        "print(json.dumps([[mhz, clock.throttled(mhz)] for mhz in read]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"LD_LIBRARY_PATH": str(folder)},
    )
    result: list[list[Any]] = json.loads(done.stdout)
    return result


def test_a_dropped_clock_is_noticed_and_a_failed_reading_is_none(tmp_path: Path) -> None:
    expected = [[1980, False], [1980, False], [1500, True], [None, False], [1980, False]]
    assert clock_readings(tmp_path, "GPU-1", 0) == expected


@pytest.mark.parametrize(("uuid", "init"), [("MIG-1", 0), ("GPU-1", 9)])
def test_where_nvml_fails_the_clock_is_unknown(tmp_path: Path, uuid: str, init: int) -> None:
    assert clock_readings(tmp_path, uuid, init) == [[None, False]] * 5


def test_throttling_is_relative_to_the_usual_clock() -> None:
    clock = Clock("no such device")
    assert clock.read_mhz() is None and not clock.throttled(None)
    clock._readings.extend([2000.0] * 5 + [2500.0])  # an idle GPU boosts once
    assert not clock.throttled(2000.0 * DROP) and clock.throttled(2000.0 * DROP - 1)


def test_the_child_ends_with_its_parent(tmp_path: Path) -> None:
    """Even one that reads no more, as where a kernel hangs."""
    child = "from tuner.measure import parent; parent.end_with_parent(); print('up', flush=True); parent.time.sleep(60)"
    parent = (
        "import subprocess, sys; "
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE, start_new_session=True); "
        "child.stdout.readline(); print(child.pid, flush=True); sys.stdin.readline()"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdin
    pid = int(process.stdout.readline())
    os.kill(pid, 0)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and Path(f"/proc/{pid}").exists() and not is_zombie(pid):
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists() or is_zombie(pid)


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
