"""How one call is timed: a CUDA graph of it, replayed with a cold L2 between two events."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping

import torch

from tuner.measure.clock import Clock
from tuner.measure.samples import Sample

_MIN_FLUSH_BYTES = 256 << 20
_WARM_UP = 3
_SHORT_RUN = 9
_FEW_ABOVE_US = 20_000.0  # a call this slow is ranked on few samples: it will not win
_ROUNDS_PER_LOOK = 8
_MIN_ROUNDS = 16
_CLOSE_ENOUGH = 0.01

Replay = Callable[[], None]


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
        return graph.replay

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
        self._batch([replays[name] for name in order for _ in range(_WARM_UP)])
        while True:
            for _ in range(_ROUNDS_PER_LOOK):
                shuffler.shuffle(order)
                rounds.append(dict(zip(order, self._batch([replays[name] for name in order]), strict=True)))
                clocks.append(self.clock.read_mhz())
            kept = [i for i, c in enumerate(clocks) if not self.clock.throttled(c)] or list(range(len(rounds)))
            times = {name: [rounds[i][name] for i in kept] for name in replays}
            late = time.monotonic() >= deadline
            if len(kept) < _MIN_ROUNDS and not late:
                continue
            seen = sorted(c for i in kept if (c := clocks[i]) is not None)
            middle = seen[len(seen) // 2] if seen else None
            throttled = sum(map(self.clock.throttled, clocks))
            samples = {n: Sample.of(t, clock_mhz=middle, throttled=throttled) for n, t in times.items()}
            if late or all(sample.relative_ci < _CLOSE_ENOUGH for sample in samples.values()):
                return times, samples

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
