"""Counts what happened and tells it."""

from __future__ import annotations

import time
from collections import Counter

from tuner.search.request import Event, Failure, OnEvent, Progress
from tuner.space.core import Config


class Tracker:
    """State behind the events of one search. ``refused``: the sampler's counter, constraint -> samples."""

    def __init__(self, total: int, timeout_s: float, refused: Counter[str], on_event: OnEvent | None) -> None:
        self._total, self._timeout_s, self._refused, self._on_event = total, timeout_s, refused, on_event
        self._failures: Counter[str] = Counter()
        self._start = time.monotonic()
        self._done_before = self._done = 0
        self._best: tuple[float, Config] | None = None

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._start

    @property
    def out_of_time(self) -> bool:
        return self.elapsed_s >= self._timeout_s

    def bound(self, timeout_s: float) -> None:
        """The time is up ``timeout_s`` after the search began."""
        self._timeout_s = timeout_s

    @property
    def has_best(self) -> bool:
        """Whether anything was scored yet, in this run or before."""
        return self._best is not None

    def start_from(self, done: int) -> None:
        """``done`` trials were there before."""
        self._done_before = self._done = done

    def note(self, config: Config, score: float | None, failure: Failure | None) -> bool:
        """Counts one result; whether it is the best so far."""
        if failure:
            self._failures[failure.kind] += 1
        if score is not None and (self._best is None or score < self._best[0]):
            self._best = (score, config)
            return True
        return False

    def trial(self, config: Config, score: float | None, failure: Failure | None, done: int) -> None:
        """One trial of this run ended; ``done`` now count, of all workers."""
        self._done = done
        best = self.note(config, score, failure)
        if failure:
            text = f"{failure.kind}: {failure.message}"
        else:
            text = f"{score:.3f} x the memory limit" + (", best so far" if best else "")
        self.tell("search", text, config, score, failure)

    def tell(
        self,
        stage: str,
        text: str,
        config: Config | None = None,
        score: float | None = None,
        failure: Failure | None = None,
    ) -> None:
        if self._on_event:
            self._on_event(Event(stage, self.progress(), text, config, score, failure))

    def progress(self) -> Progress:
        constraint = sum(self._refused.values())
        failures = dict(self._failures) | ({"constraint": constraint} if constraint else {})
        fresh = self._done - self._done_before
        left = None
        if fresh:
            by_rate = self.elapsed_s / fresh * max(0, self._total - self._done)
            left = max(0.0, min(by_rate, self._timeout_s - self.elapsed_s))
        score, best = self._best or (None, None)
        return Progress(self._done, self._total, failures, score, best, self.elapsed_s, left)
