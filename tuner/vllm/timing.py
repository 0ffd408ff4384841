"""Optional times of our decode calls (``WPH_TIMING=1``): CUDA events, outside captured graphs, never waited for."""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch

from tuner.vllm import log
from tuner.vllm.eligible import LayerFacts

_REPORT_EVERY = 2000
_PENDING_LIMIT = 4096
"""Pairs of events that may wait to be read; calls beyond that are not timed."""


class Timings:
    """Collects call times and logs their medians, every so many calls, by layer shape and batch."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._pending: deque[tuple[tuple[str, int], torch.cuda.Event, torch.cuda.Event]] = deque()
        self._times_us: dict[tuple[str, int], list[float]] = defaultdict(list)
        self._count = 0

    @staticmethod
    def from_environment() -> Timings:
        return Timings(os.environ.get("WPH_TIMING", "") not in ("", "0"))

    @contextmanager
    def call(self, facts: LayerFacts, batch: int, capturing: bool) -> Iterator[None]:
        """Times what is launched inside; a graph being captured would replay the events, so it is left out."""
        if not self.enabled or capturing or len(self._pending) >= _PENDING_LIMIT:
            yield
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._pending.append(((facts.describe(), batch), start, end))
        self._collect()

    def report(self) -> list[str]:
        """One line per layer shape and batch."""
        return [
            f"{shape}, batch {batch}: median {median(times):.1f} us of {len(times)} calls outside graphs"
            for (shape, batch), times in sorted(self._times_us.items())
        ]

    def _collect(self) -> None:
        while self._pending and self._pending[0][2].query():
            key, start, end = self._pending.popleft()
            self._times_us[key].append(1000.0 * start.elapsed_time(end))
            self._count += 1
            if self._count % _REPORT_EVERY == 0:
                for line in self.report():
                    log.tell(line)
                self._times_us.clear()
