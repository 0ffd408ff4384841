"""How one call is timed: a CUDA graph of it, replayed with a cold L2 between two events."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from tuner.measure.clock import Clock
from tuner.measure.samples import Sample

_MIN_FLUSH_BYTES = 256 << 20
_WARM_UP = 3
_SHORT_RUN = 9
_FEW_ABOVE_US = 20_000.0  # a call this slow is ranked on few samples: it will not win
_FIRST_LOOK = 16  # rounds
_NEXT_LOOK = 1.3  # times as many: the bootstrap costs more than the rounds
_CLOSE_ENOUGH = 0.01

Replay = Callable[[], None]


@dataclass(frozen=True)
class _Captured:
    """A graph, and the call that keeps the memory it works on."""

    graph: torch.cuda.CUDAGraph
    call: Callable[[], object]

    def __call__(self) -> None:
        self.graph.replay()


class Timer:
    """Times CUDA graphs on torch's current device."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties()
        self._flush = torch.empty(max(_MIN_FLUSH_BYTES, 2 * properties.L2_cache_size), dtype=torch.uint8, device="cuda")
        self.clock = Clock(f"GPU-{properties.uuid}")
        self._side = torch.cuda.Stream()

    def capture(self, call: Callable[[], object]) -> Replay:
        """A graph of one ``call``, which runs once before: what it allocates or compiles, it does then."""
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            call()
            self._side.synchronize()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin()
            try:
                call()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._side)
        return _Captured(graph, call)

    def short(self, replay: Replay) -> Sample:
        """A quick median for ranking: a few samples, the CPU waiting only after all of them."""
        probe = self._batch([replay] * _WARM_UP)
        count = _SHORT_RUN if min(probe) < _FEW_ABOVE_US else _WARM_UP
        before = self.clock.read_mhz()
        times = self._batch([replay] * count)
        after = self.clock.read_mhz()
        clocks = [c for c in (before, after) if c is not None]
        if any(map(self.clock.throttled, clocks)):
            times = self._batch([replay] * count)
            return Sample.of(times, clock_mhz=self.clock.read_mhz(), throttled=count)
        return Sample.of(times, clock_mhz=min(clocks, default=None))

    def race(
        self, replays: Mapping[str, Replay], budget_s: float, seed: int = 0
    ) -> tuple[dict[str, list[float]], dict[str, Sample]]:
        """Shuffled rounds of every contestant; (times by round, summaries). Throttled rounds are dropped for all.

        Where every round was throttled, all of them count and ``Sample.throttled`` says so.
        """
        order = list(replays)
        shuffler = random.Random(seed)
        rounds: list[dict[str, float]] = []
        clocks: list[float | None] = []
        deadline = time.monotonic() + budget_s
        look = _FIRST_LOOK
        self._batch([replays[name] for name in order for _ in range(_WARM_UP)])
        while True:
            while len(rounds) < look and (len(rounds) < 2 or time.monotonic() < deadline):
                shuffler.shuffle(order)
                rounds.append(dict(zip(order, self._batch([replays[name] for name in order]), strict=True)))
                clocks.append(self.clock.read_mhz())
            dropped = [self.clock.throttled(c) for c in clocks]
            kept = [i for i, drop in enumerate(dropped) if not drop] or list(range(len(rounds)))
            times = {name: [rounds[i][name] for i in kept] for name in replays}
            middle = _median([c for i in kept if (c := clocks[i]) is not None])
            samples = {n: Sample.of(t, clock_mhz=middle, throttled=sum(dropped)) for n, t in times.items()}
            if time.monotonic() >= deadline or all(s.relative_ci < _CLOSE_ENOUGH for s in samples.values()):
                return times, samples
            look = int(_NEXT_LOOK * len(rounds)) + 1

    def _batch(self, replays: list[Replay]) -> list[float]:
        """Microseconds of each replay, the L2 flushed before each; one wait at the end."""
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in replays]
        for replay, (start, end) in zip(replays, events, strict=True):
            self._flush.zero_()
            start.record()
            replay()
            end.record()
        torch.cuda.synchronize()
        return [1000.0 * start.elapsed_time(end) for start, end in events]


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
