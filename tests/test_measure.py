"""The channel against real processes, and the GPU's part where there is one."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tuner.abi import c_struct
from tuner.baselines import TritonConstants, survey, tuned_name
from tuner.build import Built, build
from tuner.measure import Checked, Contestant, Failure, Measurer, Race, Timing, declare_winner, paired_ratio
from tuner.measure.channel import Channel
from tuner.render import Source, render
from tuner.space import Config, Problem, default_config
from tuner.workload import Bucket, Shape

CONFIG = default_config(Problem("decode", 128, 4, "turboquant_4bit_nc"))
SHAPE = Shape(128, 32, 8)
BUCKET = Bucket(1, 1024)


# The channel, against processes that really answer, die, hang or talk nonsense.


def answering(body: str) -> list[str]:
    """A process that runs ``body`` for each request ``r``."""
    return [
        sys.executable,
        "-uc",
        f"import sys, json, os, time\nfor line in sys.stdin:\n    r = json.loads(line)\n    {body}",
    ]


REPLY = "print(json.dumps({'id': r['id'], 'result': r['x'] + 1}))"


@pytest.fixture
def channel_of(tmp_path: Path) -> Iterator[Callable[[list[str]], Channel]]:
    channels: list[Channel] = []

    def make(command: list[str]) -> Channel:
        channels.append(Channel(command, tmp_path / "log"))
        return channels[-1]

    yield make
    for channel in channels:
        channel.close()


def test_channel_answers_and_keeps_its_process(channel_of: Callable[[list[str]], Channel]) -> None:
    channel = channel_of(answering(REPLY))
    assert channel.pid is None
    assert channel.request("add", {"x": 1}, 20) == 2
    pid = channel.pid
    assert channel.request("add", {"x": 2}, 20) == 3
    assert channel.pid == pid
    channel.close()
    assert channel.pid is None
    channel.start()
    started = channel.pid
    assert started and channel.request("add", {"x": 3}, 20) == 4
    channel.start()
    assert channel.pid == started
    channel.close()
    channel.close()
    assert channel.request("add", {"x": 3}, 20) == 4


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        ("os._exit(7)", "crash", "ended with status 7"),
        ("os.abort()", "crash", "ended by signal SIGABRT"),
        ("os.close(1); time.sleep(60)", "crash", "ended"),
        ("time.sleep(60)", "timeout", "no answer within 1 s"),
        ("print('{')", "crash", "nonsense"),
        ("print()", "crash", "nonsense"),
        ("print('[]')", "crash", "nonsense"),
        ("print(json.dumps({'id': 99, 'result': 1}))", "crash", "answer 99 to request 1"),
        ("print(json.dumps({'id': r['id'], 'failure': {'kind': 'odd', 'message': 'm'}}))", "crash", "'odd'"),
        ("print(json.dumps({'id': r['id'], 'failure': {'kind': 'resource', 'message': 'm'}}))", "resource", "m"),
    ],
)
def test_channel_turns_trouble_into_values(
    channel_of: Callable[[list[str]], Channel], body: str, kind: str, message: str
) -> None:
    channel = channel_of(answering(body))
    answer = channel.request("x", {"x": 1}, 1 if kind == "timeout" else 20)
    assert isinstance(answer, Failure)
    assert answer.kind == kind
    assert message in answer.message
    assert "\n" not in answer.message


def test_channel_reports_a_process_that_died_between_requests(channel_of: Callable[[list[str]], Channel]) -> None:
    channel = channel_of(answering(REPLY))
    assert channel.request("add", {"x": 1}, 20) == 2
    first = channel.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    time.sleep(0.2)
    assert channel.request("add", {"x": 1}, 20) == 2  # a new process
    assert channel.pid != first


# The real child.


def kill_soon(measurer: Measurer, what: signal.Signals, after_s: float) -> threading.Timer:
    def act() -> None:
        if measurer.channel.pid is not None:
            os.kill(measurer.channel.pid, what)

    timer = threading.Timer(after_s, act)
    timer.start()
    return timer


def test_a_machine_without_a_gpu_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)  # not where the package lies

    if torch.cuda.is_available():
        pytest.skip("a GPU is here: this is the message without one")
    with Measurer(log=tmp_path / "log") as measurer:
        for answer in (
            measurer.check(CONFIG, tmp_path / "k.cubin"),
            measurer.time(CONFIG, tmp_path / "k.cubin", 64, SHAPE, [BUCKET]),
            measurer.race([Contestant("triton")], SHAPE, "turboquant_4bit_nc", BUCKET),
            measurer.baseline(["triton"], SHAPE, "turboquant_4bit_nc", [BUCKET])["triton"],
            measurer.channel.request("dance", {}, 60),
        ):
            assert isinstance(answer, Failure)
            assert answer.kind == "error"
        assert "unknown operation 'dance'" in answer.message
        assert "no NVIDIA GPU" in (tmp_path / "log").read_text()
        pid = measurer.channel.pid
        assert pid is not None
    assert measurer.channel.pid is None


@pytest.mark.parametrize(("what", "kind"), [(signal.SIGKILL, "crash"), (signal.SIGSTOP, "timeout")])
def test_the_child_may_die_or_hang(tmp_path: Path, what: signal.Signals, kind: str) -> None:
    with Measurer(log=tmp_path / "log", timeout_s=60) as measurer:
        measurer.timeout_s = 1.5 if kind == "timeout" else 60
        timer = kill_soon(measurer, what, 0.2)  # still importing torch
        answer = measurer.check(CONFIG, tmp_path / "k.cubin")
        timer.join()
        assert isinstance(answer, Failure)
        assert answer.kind == kind
        measurer.timeout_s = 60
        again = measurer.check(CONFIG, tmp_path / "k.cubin")
        assert isinstance(again, Failure)
        assert again.kind == "error"  # a new child: no GPU, or no such cubin


# From here on a GPU is needed.


def built(source: Source, root: Path) -> Built:
    from tuner.kernels import device_arch

    arch = device_arch(0)
    result = build([source], [arch], root=root)[source.digest, arch]
    assert isinstance(result, Built), result
    return result


def altered(source: Source, text: str) -> Source:
    assert text != source.text
    return replace(source, text=text)


def broken(body: str) -> Source:
    """A kernel of CONFIG's signature that does nothing but ``body``."""
    signature = 'extern "C" __global__ void wph_decode(const __grid_constant__ DecodeParams p)'
    return altered(render(CONFIG), f"{c_struct('decode')}\n{signature} {{ {body} }}\n")


@pytest.fixture
def measurer(tmp_path: Path) -> Iterator[Measurer]:
    with Measurer(log=tmp_path / "log", timeout_s=60, pool_bytes=1 << 30) as m:
        yield m


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return built(render(CONFIG), tmp_path_factory.mktemp("build"))


@pytest.mark.gpu
def test_a_call_is_not_timed_with_what_the_flush_would_have_to_write_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from tuner.measure.timer import Timer

    timer = Timer()
    timer._cold.fill_(1.0)
    timer.flush()
    assert timer._sum.item() == pytest.approx(timer._cold.numel(), rel=1e-3), "all of it is read"
    assert timer._cold.min().item() == 1.0, "and none written"
    rows, total = torch.zeros(16 << 20, device="cuda"), torch.empty((), device="cuda")
    read = timer.capture(lambda: torch.sum(rows, dim=0, out=total))
    clean = timer.short(read).median_us
    lines = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    monkeypatch.setattr(timer, "flush", lines.zero_)
    dirty = timer.short(read).median_us
    print(f"64 MiB read after a flush by reading in {clean:.1f} us, after one by writing in {dirty:.1f} us")
    assert clean < 1.02 * dirty


@pytest.mark.gpu
@pytest.mark.parametrize("level", ["quick", "full"])
def test_a_good_kernel_passes(measurer: Measurer, good: Built, level: str) -> None:
    result = measurer.check(CONFIG, good.cubin, level=level)
    assert isinstance(result, Checked), result
    assert 0 < result.worst_error < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("cache_format", ["turboquant_4bit_nc", "turboquant_k8v4"])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_a_good_kernel_is_as_exact_as_vllms_own(tmp_path: Path, head_dim: int, cache_format: str) -> None:
    config = default_config(Problem("decode", head_dim, 4, cache_format))
    reason = next(a.reason for a in survey("cuda", config.problem) if a.name == "vllm_triton")
    if reason:
        pytest.skip(f"no vLLM kernel to compare with: {reason}")
    with Measurer(log=tmp_path / "log", timeout_s=200) as measurer:  # Triton compiles
        result = measurer.check(config, built(render(config), tmp_path).cubin, level="full")
    assert isinstance(result, Checked), result
    assert "x vLLM's at bfloat16" in result.detail, result.detail
    print(result.detail)


@pytest.mark.gpu
@pytest.mark.parametrize("cache_format", ["turboquant_4bit_nc", "turboquant_outlier", "turboquant_k8v4"])
def test_a_dequant_kernel_passes_and_is_timed(measurer: Measurer, tmp_path: Path, cache_format: str) -> None:
    config: Config = default_config(Problem("dequant", 128, 1, cache_format))
    kernel = built(render(config), tmp_path)
    result = measurer.check(config, kernel.cubin)
    assert isinstance(result, Checked), result
    timings = measurer.time(config, kernel.cubin, kernel.registers, SHAPE, [Bucket(2, 4096)])
    assert isinstance(timings, list), timings
    assert [t.splits for t in timings] == [1]


@pytest.mark.gpu
def test_wrong_kernels_are_found(measurer: Measurer, good: Built, tmp_path: Path) -> None:
    text = render(CONFIG).text
    wrong = altered(render(CONFIG), text.replace("p.scale", "(1.1f * p.scale)"))
    answer = measurer.check(CONFIG, built(wrong, tmp_path).cubin)
    assert isinstance(answer, Failure)
    assert answer.kind == "wrong result"
    idle = measurer.check(CONFIG, built(broken(""), tmp_path).cubin)
    assert isinstance(idle, Failure)
    assert "NaN" in idle.message
    assert isinstance(measurer.check(CONFIG, good.cubin), Checked)


@pytest.mark.gpu
def test_an_illegal_access_costs_one_child(measurer: Measurer, good: Built, tmp_path: Path) -> None:
    crash = built(broken("*reinterpret_cast<volatile int *>(64) = 1;"), tmp_path)
    answer = measurer.check(CONFIG, crash.cubin)
    assert isinstance(answer, Failure)
    assert answer.kind == "crash"
    timed = measurer.time(CONFIG, crash.cubin, 64, SHAPE, [BUCKET], splits=[1])
    assert isinstance(timed, Failure)
    assert timed.kind == "crash"
    assert isinstance(measurer.check(CONFIG, good.cubin), Checked)


@pytest.mark.gpu
def test_a_hanging_kernel_is_given_up(measurer: Measurer, good: Built, tmp_path: Path) -> None:
    hang = built(broken("while (true) __nanosleep(1000);"), tmp_path)
    assert isinstance(measurer.check(CONFIG, good.cubin), Checked)  # warm: what follows is the kernel's time
    measurer.timeout_s = 5
    answer = measurer.check(CONFIG, hang.cubin)
    assert isinstance(answer, Failure)
    assert answer.kind == "timeout"
    measurer.timeout_s = 60
    assert isinstance(measurer.check(CONFIG, good.cubin), Checked)


@pytest.mark.gpu
def test_a_missing_or_damaged_cubin_is_an_error(measurer: Measurer, good: Built, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.cubin"
    damaged.write_bytes(b"not a cubin" + good.cubin.read_bytes()[:100])
    for path in (damaged, tmp_path / "none.cubin"):
        answer = measurer.check(CONFIG, path)
        assert isinstance(answer, Failure)
        assert answer.kind == "error"
    assert isinstance(measurer.check(CONFIG, good.cubin), Checked)


@pytest.mark.gpu
def test_times_grow_with_the_cache_and_stay_fast(measurer: Measurer, good: Built) -> None:
    buckets = [Bucket(1, 1024), Bucket(8, 16384), Bucket(8, 65536, ragged=True)]
    measurer.time(CONFIG, good.cubin, good.registers, SHAPE, buckets)  # fills the pool
    start = time.monotonic()
    timings = measurer.time(CONFIG, good.cubin, good.registers, SHAPE, buckets)
    elapsed = time.monotonic() - start
    assert isinstance(timings, list), timings
    assert elapsed < 0.1 * len(timings)
    best: dict[str, Timing] = {}
    for timing in timings:
        assert timing.sample.ci_low_us <= timing.sample.median_us <= timing.sample.ci_high_us
        if timing.bucket not in best or timing.sample.median_us < best[timing.bucket].sample.median_us:
            best[timing.bucket] = timing
    assert set(best) == {b.key for b in buckets}
    assert best["b1_c1024"].sample.median_us < best["b8_ragged65536"].sample.median_us
    assert best["b8_ragged65536"].sample.median_us < 4 * best["b8_c16384"].sample.median_us
    limit_us = 8 * 16384 * 8 * 134 / 8e6  # at 8 TB/s, more than any of our targets has
    assert best["b8_c16384"].sample.median_us > limit_us


@pytest.mark.gpu
def test_a_bucket_beyond_the_pool_is_left_out(measurer: Measurer, good: Built) -> None:
    buckets = [Bucket(1, 1024), Bucket(128, 131072)]
    timings = measurer.time(CONFIG, good.cubin, good.registers, SHAPE, buckets, splits=[2])
    assert isinstance(timings, list), timings
    assert [(t.bucket, t.splits) for t in timings] == [("b1_c1024", 2)]
    assert measurer.time(CONFIG, good.cubin, good.registers, SHAPE, buckets[1:]) == []
    race = measurer.race([Contestant("ours", CONFIG, good.cubin)], SHAPE, "turboquant_4bit_nc", buckets[1])
    assert isinstance(race, Failure)
    assert "does not fit" in race.message


@pytest.mark.gpu
def test_a_bucket_whose_outputs_exceed_the_memory_costs_no_other(tmp_path: Path) -> None:
    """Dequantised, 128 x 128k tokens at head dim 512 are 137 GB, more than any of our targets has."""
    config = default_config(Problem("dequant", 512, 1, "turboquant_4bit_nc"))
    kernel = built(render(config), tmp_path)
    with Measurer(log=tmp_path / "log", pool_bytes=40 << 30) as measurer:
        buckets = [Bucket(1, 1024), Bucket(128, 131072), Bucket(2, 1024)]
        timings = measurer.time(config, kernel.cubin, kernel.registers, Shape(512, 32, 4), buckets)
    assert isinstance(timings, list), timings
    assert [t.bucket for t in timings] == ["b1_c1024", "b2_c1024"]


@pytest.mark.gpu
def test_a_race_ends_in_its_time(measurer: Measurer, good: Built) -> None:
    """The last baselines are not prepared; kernels are always timed."""
    bucket = Bucket(4, 4096)
    ours = Contestant("ours", CONFIG, good.cubin, 8)
    kernels = [ours, *(replace(ours, name=f"twin{i}") for i in range(20))]
    constants = [
        TritonConstants(4, warps, stages, splits, 1) for warps in (1, 2) for stages in (1, 2) for splits in range(8, 33)
    ]
    baselines = [Contestant(tuned_name("triton", c)) for c in constants]
    start = time.monotonic()
    race = measurer.race([*kernels, *baselines], SHAPE, "turboquant_4bit_nc", bucket, budget_s=5, total_s=0.2)
    assert time.monotonic() - start < 20  # the child starts too
    assert isinstance(race, Race), race
    assert {k.name for k in kernels} <= set(race.samples) and race.failures[baselines[-1].name].kind == "timeout"


@pytest.mark.gpu
def test_race_and_baselines(measurer: Measurer, good: Built) -> None:
    bucket = Bucket(4, 4096)
    ours = Contestant("ours", CONFIG, good.cubin, 8)
    twin, unsplit = replace(ours, name="twin"), replace(ours, name="unsplit", splits=1)
    race = measurer.race(
        [ours, twin, unsplit, Contestant("triton"), Contestant("nobody")], SHAPE, "turboquant_4bit_nc", bucket
    )
    assert isinstance(race, Race), race
    assert set(race.failures) == {"nobody"}
    assert len({len(times) for times in race.rounds_us.values()}) == 1  # None where one sat out
    assert paired_ratio(race.rounds_us["ours"], race.rounds_us["twin"])[0] == pytest.approx(1, abs=0.02)
    assert declare_winner(race.rounds_us, ["triton", "unsplit", "ours"])[0] == "ours"
    results = measurer.baseline(["triton", "nobody"], SHAPE, "turboquant_4bit_nc", [bucket])
    assert isinstance(results["nobody"], Failure)
    triton = results["triton"]
    assert isinstance(triton, list), triton
    assert triton[0].sample.median_us == pytest.approx(race.samples["triton"].median_us, rel=0.2)
