"""Times from the attached GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tuner.baselines import BASELINES, Constants, tuned_name
from tuner.measure import Contestant, Measurer, Race, Sample, declare_winner
from tuner.measure import Failure as MeasureFailure
from tuner.search import compiled
from tuner.search.evaluate import Candidate, Final, Scored, Time, Timings, batches, best_time, splits_for_batch
from tuner.search.request import Failure, TuneRequest
from tuner.search.rivals import BASELINE, probes, sweep
from tuner.space.core import Config
from tuner.workload import Bucket

HOPELESS = 1.5
"""How many times slower than the best on the sampled buckets a kernel may be and still be timed on all."""
FIRST_RACE_S = 20.0
"""The first race may take at least so long: peers are loaded and compiled in it."""
ROUNDS_S = 0.8
"""Of a race, beside preparing it: enough for intervals of 1% wherever they can be had."""
TRITON_TRIALS = 12
"""Constants of the Triton baseline that are tried; most of the time is Triton's own compilation."""


class MeasuredEvaluator:
    """Checks and times on GPU ``request.device`` through a child process, which may die without consequences."""

    def __init__(self, request: TuneRequest) -> None:
        self._request = request
        self._compiler = compiled.Compiler(request.target.arch, request.root, request.workers)
        log = Path(request.root) / f"measure-{request.device}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        self._measurer = Measurer(request.device, log=log, seed=request.seed)
        self._groups = batches(request.buckets)
        self._begun = self._raced = False
        self.fingerprint = compiled.fingerprint(request.target.arch)

    def build(self, configs: Sequence[Config]) -> list[Candidate | Failure]:
        if not self._begun:  # from then on others may be talking to it
            self._begun = True
            self._measurer.start()
        return self._compiler.build(configs)

    def score(self, candidate: Candidate, best: Timings | None) -> Scored | Failure:
        """The gate, then a sample of the buckets, then, unless hopeless, the rest."""
        checked = self._measurer.check(
            candidate.config, Path(candidate.cubin), level="quick", kv_heads=self._request.shape.kv_heads
        )
        if isinstance(checked, MeasureFailure):
            return Failure(checked.kind, checked.message)
        timings: Timings = {}
        if best is not None:
            sample = self._probes()
            failure = self._time(candidate, sample, timings)
            if failure:
                return failure
            keys = [b.key for b in sample if b.key in timings and b.key in best]
            ratios = sorted(best_time(timings[k]).median_us / best_time(best[k]).median_us for k in keys)
            # The best ratio decides: a kernel that is good anywhere may earn its place in the portfolio.
            if ratios and ratios[0] > HOPELESS:
                return Scored(timings, partial=True)
        rest = [b for b in self._request.buckets if b.key not in timings]
        failure = self._time(candidate, rest, timings)
        if failure:
            return failure
        if not timings:
            return Failure("error", "no bucket fits the GPU's memory")
        return Scored(timings)

    def confirm(self, candidate: Candidate) -> Failure | None:
        checked = self._measurer.check(
            candidate.config, Path(candidate.cubin), level="full", kv_heads=self._request.shape.kv_heads
        )
        return Failure(checked.kind, checked.message) if isinstance(checked, MeasureFailure) else None

    def rivals(self, tell: Callable[[str], None], budget_s: float) -> tuple[str, ...]:
        """Short runs on a few buckets decide which constants race on all of them; op store has no open ones."""
        request, op = self._request, self._request.problem.op
        if op not in BASELINE:
            return ()
        sample = probes(request.buckets)

        def measure(constants: Constants) -> dict[str, float]:
            name = tuned_name(BASELINE[op], constants)
            answer = self._measurer.baseline([name], request.shape, request.problem.cache_format, sample, op=op)[name]
            return {} if isinstance(answer, MeasureFailure) else {t.bucket: t.sample.median_us for t in answer}

        found = sweep(request.problem, measure, seed=request.seed, limit=TRITON_TRIALS, budget_s=budget_s, tell=tell)
        return tuple(tuned_name(BASELINE[op], constants) for constants in found)

    def final(
        self,
        contestants: Sequence[tuple[Candidate, int]],
        bucket: Bucket,
        rivals: Sequence[str] | None,
        budget_s: float,
    ) -> Final | Failure:
        request = self._request
        names = [f"kernel{i}" for i in range(len(contestants))]
        ours = [Contestant(n, c.config, Path(c.cubin), s) for n, (c, s) in zip(names, contestants, strict=True)]
        others = [] if rivals is None else [*self._baseline_names(), *rivals]
        theirs = [Contestant(name) for name in others]
        first_s = min(FIRST_RACE_S, request.race_timeout_s or FIRST_RACE_S)
        total_s = max(budget_s, first_s) if theirs and not self._raced else budget_s
        self._raced |= bool(theirs)

        def race_of(contestants: Sequence[Contestant]) -> Race | MeasureFailure:
            return self._measurer.race(
                contestants,
                request.shape,
                request.problem.cache_format,
                bucket,
                op=request.problem.op,
                budget_s=ROUNDS_S,
                total_s=total_s,
            )

        race = race_of([*ours, *theirs])
        if isinstance(race, MeasureFailure) and theirs:
            race = race_of(ours)  # a peer may be what crashed; ours must have their race
        if isinstance(race, MeasureFailure):
            return Failure(race.kind, race.message)
        return self._judge(race, names, others)

    def close(self) -> None:
        self._compiler.close()
        self._measurer.close()

    def _judge(self, race: Race, names: list[str], others: list[str]) -> Final | Failure:
        ran = [n for n in names if n in race.samples]
        if not ran:
            reason = next((f.message for f in race.failures.values()), "no kernel finished the race")
            return Failure("error", reason)
        winner, tie = declare_winner({n: race.rounds_us[n] for n in ran}, ran)
        times = tuple(_time(race.samples[n]) if n in race.samples else None for n in names)
        samples = {n: race.samples.get(n) for n in others}
        return Final(times, names.index(winner), tie, {n: s.median_us if s else None for n, s in samples.items()})

    def _time(self, candidate: Candidate, buckets: Sequence[Bucket], timings: Timings) -> Failure | None:
        request = self._request
        for batch, group in batches(buckets).items():
            # The whole batch's contexts decide the split counts, whichever of its buckets are timed now.
            splits = splits_for_batch(
                candidate.config, candidate.registers, request.shape, self._groups[batch], request.target
            )
            answer = self._measurer.time(
                candidate.config,
                Path(candidate.cubin),
                candidate.registers,
                request.shape,
                group,
                splits=splits,
                reserve=request.buckets,
            )
            if isinstance(answer, MeasureFailure):
                return Failure(answer.kind, answer.message)
            for timing in answer:
                timings.setdefault(timing.bucket, {})[max(1, timing.splits)] = _time(timing.sample)
        return None

    def _probes(self) -> list[Bucket]:
        """Few and cheap buckets that tell kernels apart: a short and a middling context of some batch sizes."""
        groups = list(self._groups.values())
        picked = {groups[0], groups[len(groups) // 2], groups[-1]}
        return [b for g in groups if g in picked for b in {g[0], g[len(g) // 2]}]

    def _baseline_names(self) -> list[str]:
        """All of the op; one that is not available here comes back among the race's failures."""
        chosen = self._request.baselines
        op = self._request.problem.op
        return [b.name for b in BASELINES.values() if b.op == op] if chosen is None else list(chosen)


def _time(sample: Sample) -> Time:
    return Time(
        sample.median_us, sample.ci_low_us, sample.ci_high_us, samples=sample.n, clock_mhz=sample.clock_mhz
    )
