"""How one call is timed: a CUDA graph of it, replayed with a cold L2 between two events."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from tuner.measure.clock import Clock
from tuner.measure.samples import Sample
from tuner.measure.turns import Turns, short_samples

_MIN_FLUSH_BYTES = 256 << 20
_WARM_UP = 2
_WARM_ABOVE_US = 20_000.0  # no start of a fast call takes as long
_SHORT_RUN = 9
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
        size = max(_MIN_FLUSH_BYTES, 2 * properties.L2_cache_size)
        self._cold = torch.zeros(size // 4, dtype=torch.float32, device="cuda")
        self._sum = torch.empty((), dtype=torch.float32, device="cuda")
        self.clock = Clock(f"GPU-{properties.uuid}")
        self._side = torch.cuda.Stream()

    def flush(self) -> None:
        """Fills the L2 cache with what no call wants.

        By reading: lines that were written would have to go to memory once a call needs their place, up to a cache of
        them, and the call would be timed with it.
        """
        torch.sum(self._cold, dim=0, out=self._sum)

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
        """A quick median for ranking: a few samples, fewer of a slow call, the CPU waiting only after all of them."""
        count = short_samples(self._warm_up(replay), _SHORT_RUN)
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
    ) -> tuple[dict[str, list[float | None]], dict[str, Sample]]:
        """Shuffled rounds; (times by round, summaries). Throttled rounds are dropped for all.

        A contestant much slower than the fastest sits out most rounds (``Turns``): its time there is None. Ends when
        every median's interval is under 1%, or after ``budget_s`` but not before everyone has its least number of
        samples. Where every round was throttled, all of them count and ``Sample.throttled`` says so.
        """
        shuffler = random.Random(seed)
        rounds: list[dict[str, float]] = []
        clocks: list[float | None] = []
        deadline = time.monotonic() + budget_s
        look = _FIRST_LOOK
        turns = Turns({name: self._warm_up(replay) for name, replay in replays.items()})
        while True:
            while len(rounds) < look and (len(rounds) < turns.least_rounds or time.monotonic() < deadline):
                order = turns.in_round(len(rounds))
                shuffler.shuffle(order)
                rounds.append(dict(zip(order, self._batch([replays[name] for name in order]), strict=True)))
                clocks.append(self.clock.read_mhz())
            dropped = [self.clock.throttled(c) for c in clocks]
            kept = unthrottled(rounds, dropped)
            times = {name: [rounds[i].get(name) for i in kept] for name in replays}
            middle = _median([c for i in kept if (c := clocks[i]) is not None])
            samples = {
                n: Sample.of([x for x in t if x is not None], clock_mhz=middle, throttled=sum(dropped))
                for n, t in times.items()
            }
            if time.monotonic() >= deadline or all(s.relative_ci < _CLOSE_ENOUGH for s in samples.values()):
                return times, samples
            look = int(_NEXT_LOOK * len(rounds)) + 1

    def _warm_up(self, replay: Replay) -> float:
        """Microseconds that a call takes about; a very slow one is warm after one run."""
        first = self._batch([replay])[0]
        return first if first > _WARM_ABOVE_US else min(self._batch([replay] * _WARM_UP))

    def _batch(self, replays: list[Replay]) -> list[float]:
        """Microseconds of each replay, the L2 flushed before each; one wait at the end."""
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in replays]
        for replay, (start, end) in zip(replays, events, strict=True):
            self.flush()
            start.record()
            replay()
            end.record()
        torch.cuda.synchronize()
        return [1000.0 * start.elapsed_time(end) for start, end in events]


def unthrottled(rounds: Sequence[Mapping[str, float]], dropped: Sequence[bool]) -> list[int]:
    """Rounds that count: those without throttling, or all where a contestant ran in none of those."""
    kept = [i for i, drop in enumerate(dropped) if not drop]
    everyone = set().union(*rounds)
    return kept if set().union(*(rounds[i] for i in kept)) == everyone else list(range(len(rounds)))


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
