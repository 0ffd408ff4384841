"""Racing the points, one after another; what is known already is not raced again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.grid.kernels import TUNED_TOGETHER, Kernels, Ours, problem_of
from benchmarks.grid.points import Point
from tuner.baselines import Constants, survey, tuned_name
from tuner.bench import OURS
from tuner.errors import TunerError
from tuner.measure import Contestant, Failure, Measurer, Race
from tuner.search.evaluate import limit_us
from tuner.search.rivals import BASELINE, probes, sweep
from tuner.space import Problem
from tuner.targets import Target
from tuner.workload import default_buckets

Result = dict[str, Any]
Say = Callable[[str], None]
_SWEEP_TRIALS = 6
_PEERS = ("fa3_bf16", "fa3_fp8")
_FIRST_RACE_S = 40.0
"""What the first race of a problem may take: its peers are loaded and compiled in it."""


@dataclass(frozen=True)
class Budget:
    """Seconds. ``rounds_s`` and ``point_s``: of one race, without and with its preparation; ``sweep_s``: of the search
    for Triton's constants where no table names them; ``total_s``: of all."""

    rounds_s: float = 0.4
    point_s: float = 8.0
    sweep_s: float = 12.0
    total_s: float = 500.0


class Store:
    """Results by key in a JSON-lines file, which outlives an interrupt."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Result] = {}
        if path.is_file():
            for line in path.read_text().splitlines():
                try:
                    result = json.loads(line)
                    self._known[result["key"]] = result
                except (ValueError, KeyError, TypeError):
                    continue  # the line that was being written when the last run ended

    def get(self, key: str, identity: Sequence[str]) -> Result | None:
        """What was found for ``key`` by contestants of this ``identity``."""
        known = self._known.get(key)
        return known if known and known["identity"] == list(identity) else None

    def put(self, result: Result) -> None:
        self._known[result["key"]] = result
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(result) + "\n")


class Racer:
    """Races points on GPU ``device``, each in the measuring process of ``tuner.measure``."""

    def __init__(
        self,
        measurer: Measurer,
        kernels: Kernels,
        target: Target,
        store: Store,
        budget: Budget,
        say: Say,
        device: int,
        driver: str | None = None,
    ) -> None:
        self._measurer, self._kernels, self._target, self._store = measurer, kernels, target, store
        self._budget, self._say, self._device, self._driver = budget, say, device, driver
        self._gate: dict[tuple[str, int], Failure | None] = {}
        self._available: dict[Problem, tuple[str, ...]] = {}
        self._tuned: dict[Problem, tuple[str, ...]] = {}
        self._raced: set[Problem] = set()

    def run(self, points: Sequence[Point], show: Callable[[Result], None]) -> list[Result]:
        """Results in the order of ``points``; those that the time did not suffice for are left out."""
        deadline = time.monotonic() + self._budget.total_s
        results = []
        for number, point in enumerate(points):
            ours = self._kernels.of(point)
            rivals = self._rivals(point)
            identity = [ours.digest, self._target.device_name, self._driver or "", *rivals]
            result = self._store.get(point.key, identity)
            if result is None:
                if time.monotonic() > deadline:
                    continue
                coming = [p for p in points[number:] if (p.shape, p.cache_format) == (point.shape, point.cache_format)]
                result = self._race(point, ours, rivals, coming) | {"identity": identity}
                if OURS in result["times_us"]:
                    self._store.put(result)
            show(result)
            results.append(result)
        return results

    def _race(self, point: Point, ours: Ours, rivals: Sequence[str], coming: Sequence[Point]) -> Result:
        contestants = [*ours.contestants, *(Contestant(name) for name in rivals)]
        refused = self._refused(point, ours.contestants)
        race = refused or self._measure(point, contestants, coming)
        failures = {}
        if isinstance(race, Failure) and refused is None:
            # A peer may be what crashed or hung: ours must have their time.
            failures = {"peers": f"{race.kind}: {race.message}"}
            race = self._measure(point, ours.contestants, coming)
        result = point.facts() | {
            "limit_us": limit_us(problem_of(point), point.shape, point.bucket, self._target),
            "source": ours.source,
            "kernels": {c.name: {**_described(c), "splits": c.splits} for c in ours.contestants},
            "times_us": {},
            "intervals_us": {},
            "samples": {},
            "driver": self._driver,
            "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        if isinstance(race, Failure):
            return result | {"failures": failures | {OURS: f"{race.kind}: {race.message}"}}
        return result | {
            "times_us": {n: s.median_us for n, s in race.samples.items()},
            "intervals_us": {n: [s.ci_low_us, s.ci_high_us] for n, s in race.samples.items()},
            "samples": {n: s.n for n, s in race.samples.items()},
            "clock_mhz": next((s.clock_mhz for s in race.samples.values()), None),
            "failures": failures | {n: f"{f.kind}: {f.message}" for n, f in race.failures.items()},
        }

    def _refused(self, point: Point, contestants: Sequence[Contestant]) -> Failure | None:
        """What the gate says of our kernels, each asked once."""
        for c in contestants:
            assert c.config is not None and c.cubin is not None
            key = str(c.cubin), point.shape.kv_heads
            if key not in self._gate:
                checked = self._measurer.check(c.config, c.cubin, kv_heads=point.shape.kv_heads)
                self._gate[key] = checked if isinstance(checked, Failure) else None
            if self._gate[key] is not None:
                return self._gate[key]
        return None

    def _time_s(self, point: Point) -> float:
        problem = problem_of(point)
        if problem in self._raced:
            return self._budget.point_s
        self._raced.add(problem)
        return max(self._budget.point_s, _FIRST_RACE_S)

    def _measure(self, point: Point, contestants: Sequence[Contestant], coming: Sequence[Point]) -> Race | Failure:
        return self._measurer.race(
            contestants,
            point.shape,
            point.cache_format,
            point.bucket,
            op=point.op,
            budget_s=self._budget.rounds_s,
            total_s=self._time_s(point),
            reserve=[p.bucket for p in coming] if point.op == "decode" else (),
        )

    def _rivals(self, point: Point) -> tuple[str, ...]:
        """Who else races at ``point``: those first that are soon prepared."""
        if point.section in ("twin", "format"):
            return ()
        problem = problem_of(point)
        if problem not in self._available:
            found = survey(f"cuda:{self._device}", problem)
            for baseline in found:
                if baseline.reason:
                    self._say(f"without {baseline.name}: {baseline.reason}")
            self._available[problem] = tuple(b.name for b in found if b.reason is None)
        available = self._available[problem]
        if point.op == "dequant":
            return tuple(n for n in available if n == BASELINE["dequant"])
        peers = tuple(n for n in _PEERS if n in available)
        if point.section == "latency":
            return peers
        shipped = tuple(n for n in ("vllm_triton", "triton") if n in available)[:1]
        return (*peers, *shipped, *(self._constants(problem, point) if "triton" in available else ()))

    def _constants(self, problem: Problem, point: Point) -> tuple[str, ...]:
        """Names of the tuned Triton kernels: the table's, else found by a short search, once."""
        if problem not in self._tuned:
            self._tuned[problem] = self._kernels.tuned_triton(problem) or self._search(problem, point)
        return self._tuned[problem]

    def _search(self, problem: Problem, point: Point) -> tuple[str, ...]:
        key = f"triton constants {problem.head_dim} {problem.gqa} {problem.cache_format}"
        known = self._store.get(key, [self._target.device_name])
        if known is None:
            sample = probes(default_buckets())

            def measure(constants: Constants) -> dict[str, float]:
                name = tuned_name(BASELINE["decode"], constants)
                answer = self._measurer.baseline([name], point.shape, problem.cache_format, sample)[name]
                return {} if isinstance(answer, Failure) else {t.bucket: t.sample.median_us for t in answer}

            budget_s = self._budget.sweep_s
            found = sweep(problem, measure, seed=0, limit=_SWEEP_TRIALS, budget_s=budget_s, tell=self._say)
            names = [tuned_name(BASELINE["decode"], constants) for constants in found[:TUNED_TOGETHER]]
            known = {"key": key, "identity": [self._target.device_name], "names": names}
            if names:
                self._store.put(known)
        return tuple(known["names"])


def _described(contestant: Contestant) -> dict[str, str]:
    if contestant.config is None:
        raise TunerError(f"contestant {contestant.name} is none of our kernels")
    return {"config": contestant.config.describe()}
