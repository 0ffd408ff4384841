"""From the study's timings to the table: portfolio, race of the finalists, entries, file."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tuner.errors import TunerError
from tuner.search.constraints import space_for
from tuner.search.evaluate import Candidate, Evaluator, Final, Time, batches, limit_us
from tuner.search.progress import Tracker
from tuner.search.provenance import device_of, provenance_of
from tuner.search.publish import publish
from tuner.search.records import Record
from tuner.search.request import Failure, TuneRequest, TuneResult
from tuner.space import get_space
from tuner.table.portfolio import TOLERANCE, BatchChoice, best_splits, cover, for_all_contexts, worst_and_mean
from tuner.table.schema import BatchEntry, BucketEntry, Kernel, RunnerUp, Table, Timing, kernel_id
from tuner.workload import Bucket

_RACE_WITHIN = 1.25
"""Portfolio kernels slower than the best by more than this do not race on a bucket: noise is far smaller."""
_ALONE_SHARE = 0.4
"""Of the time for races, what those without the baselines may take at most; each ends once its intervals are short."""

Points = dict[str, dict[tuple[int, int], float]]
Point = tuple[int, int]
"""(kernel number, splits); numbers order kernels from simple to complex."""


@dataclass(frozen=True)
class _Plan:
    """``portfolio`` may win, ``references`` (default and best overall) race beside it."""

    points: Points
    portfolio: tuple[int, ...]
    references: tuple[int, ...]
    by_batch: dict[int, BatchChoice]


def choose(
    request: TuneRequest,
    records: Sequence[Record],
    evaluator: Evaluator,
    tracker: Tracker,
    rivals: Sequence[str],
    deadline: float,
) -> TuneResult:
    """``rivals``: tuned baselines that race too. Raises TunerError where no configuration ran.

    ``deadline`` of the races, by time.monotonic(): a bucket that it leaves no time for keeps the times of the search.
    """
    finalists = _usable(request, records)
    dropped: list[Failure] = []
    while True:
        if not finalists:
            raise TunerError(_nothing_runs(records, dropped))
        plan = _plan(request, finalists)
        numbers = sorted({*plan.portfolio, *plan.references})
        candidates, rejected = _confirm(evaluator, {n: finalists[n] for n in numbers}, tracker)
        if not rejected:
            break
        dropped += rejected.values()
        finalists = [r for n, r in enumerate(finalists) if n not in rejected]
    finals = _race(request, plan, candidates, evaluator, tracker, rivals, deadline)
    table = _table(request, plan, finals, finalists, candidates)
    by_id = {kernel_id(request.target.arch, c.cubin_sha256): Path(c.cubin) for c in candidates.values()}
    cubins = {k.id: by_id[k.id] for k in table.kernels}
    path = None
    if request.output is not None:
        path, note = publish(table, request.output, cubins)
        tracker.tell("table", note)
    return TuneResult(table, path, cubins, tracker.progress(), "", "")


def _usable(request: TuneRequest, records: Iterable[Record]) -> list[Record]:
    """Fully timed records that the request allows, simplest first: fewer registers, then the default.

    A study may hold others: from a recording, or of a time when less was refused.
    """
    space = space_for(request.problem.op, request.shape.kv_heads, request.evidence)
    allowed = {a.name: a.values for a in space.restricted(request.restrict).axes}
    keys = {b.key for b in request.buckets}
    default, seed = space.default(request.problem), space.seed(request.problem)
    complete = [
        r
        for r in records
        if r.score is not None
        and r.candidate
        and not r.partial
        and keys & r.timings.keys()
        and all(v in allowed[n] for n, v in r.config.params)
        and (r.config in (default, seed) or not space.refusals(r.config, request.target))
    ]
    return sorted(complete, key=lambda r: (r.candidate.registers if r.candidate else 0, r.config != default, r.number))


def _nothing_runs(records: Sequence[Record], dropped: Sequence[Failure]) -> str:
    if dropped:
        last = dropped[-1]
        return f"none of {len(dropped)} finalists passes the gate once more, the last: {last.kind}: {last.message}"
    failures = [r.failure for r in records if r.failure]
    if not failures:
        return "no configuration was tried within the restrictions and the time: allow more trials, time or values"
    kinds = ", ".join(sorted({f.kind for f in failures}))
    return f"none of {len(records)} configurations runs ({kinds}); the first failed with: {failures[0].message}"


def _plan(request: TuneRequest, finalists: Sequence[Record]) -> _Plan:
    points: Points = {}
    for bucket in request.buckets:
        row = {
            (n, splits): time.median_us
            for n, record in enumerate(finalists)
            for splits, time in record.timings.get(bucket.key, {}).items()
        }
        if row:
            points[bucket.key] = row
    kernels = cover(points)
    by_batch: dict[int, BatchChoice] = {}
    for batch, group in batches(request.buckets).items():
        times = {b.key: points[b.key] for b in group if b.key in points}
        free, shared = for_all_contexts(times), for_all_contexts(times, kernels)
        if shared and free and shared.nearly_as_good_as(free):
            free = shared
        if free:
            by_batch[batch] = free
    portfolio = tuple(sorted({*kernels, *(c.kernel for c in by_batch.values())}))
    default = get_space(request.problem.op).default(request.problem)
    best = min(range(len(finalists)), key=lambda n: finalists[n].score or math.inf)
    references = {best, *(n for n, r in enumerate(finalists) if r.config == default)} - set(portfolio)
    return _Plan(points, portfolio, tuple(sorted(references)), by_batch)


def _confirm(
    evaluator: Evaluator, finalists: dict[int, Record], tracker: Tracker
) -> tuple[dict[int, Candidate], dict[int, Failure]]:
    """Builds the finalists (they may come from another machine's run) and passes them through the gate once more.

    What passed, and what did not, by number.
    """
    built = evaluator.build([r.config for r in finalists.values()])
    candidates, rejected = {}, {}
    for (number, record), result in zip(finalists.items(), built, strict=True):
        failure = result if isinstance(result, Failure) else evaluator.confirm(result)
        if isinstance(result, Failure) or failure:
            assert failure
            rejected[number] = failure
            tracker.note(record.config, None, failure)
            tracker.tell("race", f"finalist dropped, {failure.kind}: {failure.message}", record.config, None, failure)
        else:
            candidates[number] = result
    return candidates, rejected


def _race(
    request: TuneRequest,
    plan: _Plan,
    candidates: dict[int, Candidate],
    evaluator: Evaluator,
    tracker: Tracker,
    rivals: Sequence[str],
    deadline: float,
) -> dict[str, tuple[list[Point], Final]]:
    """Per bucket who raced and the outcome; where there was no race, it is left out.

    The kernels race alone first, where times are measured: that decides what is served, takes little time, and the
    search's own times are single short runs. Then with the baselines, on as many buckets as the time is enough for.
    """
    finals: dict[str, tuple[list[Point], Final]] = {}
    settled: dict[str, Final] = {}
    racing = [b for b in request.buckets if b.key in plan.points]
    # In no order of size or kind: where the time ends the races, what is left out should not be all of one sort.
    random.Random(request.seed).shuffle(racing)
    points = {b.key: _entrants(plan, candidates, b) for b in racing}

    def race(buckets: Sequence[Bucket], until: float, rivals: Sequence[str] | None, how: str) -> int:
        """How many of ``buckets`` it had no time for."""
        for done, (bucket, share_s) in enumerate(_shares(request, buckets, until)):
            if share_s <= 0:
                return len(buckets) - done
            entrants = points[bucket.key]
            final = evaluator.final([(candidates[n], s) for n, s in entrants], bucket, rivals, share_s)
            if isinstance(final, Failure):
                tracker.tell("race", f"{bucket.key}: no race{how}, {final.kind}: {final.message}", failure=final)
                continue
            screened = [plan.points[bucket.key][point] for point in entrants]
            settled[bucket.key] = _settled(final, settled.get(bucket.key), screened)
            finals[bucket.key] = (entrants, _keep_to_portfolio(settled[bucket.key], entrants, plan.portfolio))
            tracker.tell("race", f"race {done + 1}/{len(buckets)}{how}: {bucket.key}")
        return 0

    if request.evidence == "measured":
        now = time.monotonic()
        until = now + _ALONE_SHARE * (deadline - now)
        race([b for b in racing if len(points[b.key]) > 1], until, None, ", kernels alone")
    late = race(racing, deadline, rivals, "")
    if late:
        text = f"no time left to race {late} of {len(racing)} buckets with the baselines"
        never = sum(b.key not in finals for b in racing)
        tracker.tell("race", text + (f": the times of the search stand for {never}" if never else ""))
    return finals


def _entrants(plan: _Plan, candidates: dict[int, Candidate], bucket: Bucket) -> list[Point]:
    """Who races on ``bucket``: kernels not far behind the best with their best splits, and its batch's choice."""
    row = best_splits({bucket.key: plan.points[bucket.key]})[bucket.key]
    bar = _RACE_WITHIN * min(t for _, t in row.values())
    entrants = {(n, row[n][0]) for n in candidates if n in row and (n in plan.references or row[n][1] <= bar)}
    if bucket.batch in plan.by_batch:
        choice = plan.by_batch[bucket.batch]
        entrants.add((choice.kernel, choice.splits))
    return sorted(entrants)


def _shares(request: TuneRequest, buckets: Sequence[Bucket], until: float) -> Iterator[tuple[Bucket, float]]:
    """Each bucket with the seconds that its race may take of what is left until then; none or less: time is up."""
    limits = [limit_us(request.problem, request.shape, b, request.target) for b in buckets]
    # Half of the time in equal shares, half by size: slow baselines take long where the cache is large.
    weights = [1 / len(buckets) + limit / sum(limits) for limit in limits]
    for done, bucket in enumerate(buckets):
        yield bucket, (until - time.monotonic()) * weights[done] / sum(weights[done:])


def _settled(final: Final, before: Final | None, screened: Sequence[float]) -> Final:
    """A tie, unless other measurements tell the kernels apart: few rounds, as short races have, tell little.

    What an earlier race of the same contestants decided stands, if this one does not put it beyond the tolerance. Else
    the simplest does that no other is ahead of, which is by more than the tolerance both in the race and in the search
    (``screened``: microseconds per contestant).
    """
    if not final.tie:
        return final
    raced = [time.median_us if time else math.inf for time in final.times]
    fastest, bar = min(range(len(raced)), key=raced.__getitem__), 1 + TOLERANCE
    if before and not before.tie and before.times[final.winner] and raced[before.winner] <= bar * raced[fastest]:
        return replace(final, winner=before.winner, tie=False)

    def is_behind(i: int) -> bool:
        return any(raced[i] > bar * raced[j] and screened[i] > bar * screened[j] for j in range(len(raced)))

    order = [i for i in range(final.winner, len(raced)) if final.times[i]]
    winner = next((i for i in order if not is_behind(i)), fastest)
    return final if winner == final.winner else replace(final, winner=winner, tie=winner != fastest)


def _keep_to_portfolio(final: Final, points: list[Point], portfolio: tuple[int, ...]) -> Final:
    """A reference kernel wins a bucket only where it beats the portfolio by more than the tolerance."""
    winner = final.times[final.winner]
    inside = [(t.median_us, i) for i, t in enumerate(final.times) if t and points[i][0] in portfolio]
    if winner is None or points[final.winner][0] in portfolio or not inside:
        return final
    time_us, index = min(inside)
    if time_us > winner.median_us * (1 + TOLERANCE):
        return final
    return Final(final.times, index, True, final.baselines_us)


def _table(
    request: TuneRequest,
    plan: _Plan,
    finals: dict[str, tuple[list[Point], Final]],
    finalists: Sequence[Record],
    candidates: dict[int, Candidate],
) -> Table:
    arch = request.target.arch
    ids = {n: kernel_id(arch, c.cubin_sha256) for n, c in candidates.items()}
    outcomes = {
        b.key: _Outcome.of(b, request, plan, finals.get(b.key), finalists)
        for b in request.buckets
        if b.key in plan.points
    }
    by_bucket = tuple(
        BucketEntry(o.bucket.batch, ids[o.winner[0]], o.winner[1], o.timing(o.winner), o.runner_up(o.winner, finalists))
        for o in outcomes.values()
    )
    by_batch = []
    for batch, group in batches(request.buckets).items():
        if batch not in plan.by_batch:
            continue
        point = (plan.by_batch[batch].kernel, plan.by_batch[batch].splits)
        rows = [outcomes[b.key] for b in group if b.key in outcomes]
        worst, mean = worst_and_mean(
            [o.times[point].median_us for o in rows], [o.times[o.winner].median_us for o in rows]
        )
        timings = tuple(o.timing(point) for o in rows)
        longest = max(rows, key=lambda o: (not o.bucket.ragged, o.bucket.context))
        runner_up = longest.runner_up(point, finalists)
        by_batch.append(BatchEntry(batch, ids[point[0]], point[1], worst, mean, timings, runner_up))
    used = {e.kernel for e in by_bucket} | {e.kernel for e in by_batch}
    kernels = {ids[n]: _kernel(ids[n], arch, c) for n, c in candidates.items() if ids[n] in used}
    return Table(
        problem=request.problem,
        kv_heads=request.shape.kv_heads,
        device=device_of(request),
        provenance=provenance_of(request),
        evidence=request.evidence,
        kernels=tuple(kernels.values()),
        by_batch=tuple(by_batch),
        by_batch_and_context=by_bucket,
    )


@dataclass(frozen=True)
class _Outcome:
    """One bucket: times of the points that raced (or, without a race, of all that were timed), and the winner."""

    bucket: Bucket
    limit_us: float
    times: dict[Point, Time]
    winner: Point
    tie: bool
    baselines_us: dict[str, float | None]
    screened: dict[Point, float]
    """Times of all candidates of the study, from the ranking runs."""

    @staticmethod
    def of(
        bucket: Bucket,
        request: TuneRequest,
        plan: _Plan,
        raced: tuple[list[Point], Final] | None,
        finalists: Sequence[Record],
    ) -> _Outcome:
        limit = limit_us(request.problem, request.shape, bucket, request.target)
        screened = plan.points[bucket.key]
        known = {p: finalists[p[0]].timings[bucket.key][p[1]] for p in screened if p[0] in plan.portfolio}
        if raced is None:
            winner = min(known, key=lambda p: (known[p].median_us, p))
            return _Outcome(bucket, limit, known, winner, False, {}, screened)
        points, final = raced
        times = {p: t for p, t in zip(points, final.times, strict=True) if t}
        choice = plan.by_batch.get(bucket.batch)
        if choice and (choice.kernel, choice.splits) not in times:
            # It fell out of the race; its ranking time is the best that is known.
            times[choice.kernel, choice.splits] = known[choice.kernel, choice.splits]
        return _Outcome(bucket, limit, times, points[final.winner], final.tie, final.baselines_us, screened)

    def timing(self, point: Point) -> Timing:
        t = self.times[point]
        return Timing(
            self.bucket.context, self.bucket.ragged, t.median_us, t.ci_low_us, t.ci_high_us, self.limit_us,
            self.baselines_us, t.bottleneck, t.samples, t.clock_mhz,
        )  # fmt: skip

    def runner_up(self, point: Point, finalists: Sequence[Record]) -> RunnerUp | None:
        """The best other kernel, of those that raced if there are any, else of the study's ranking runs."""
        raced = {p: t.median_us for p, t in self.times.items()}
        for times, tie in ((raced, self.tie), (self.screened, False)):
            others = [p for p in times if p[0] != point[0]]
            if others and point in times:
                second = min(others, key=lambda p: (times[p], p))
                return RunnerUp(finalists[second[0]].config.params, second[1], times[second] / times[point], tie)
        return None


def _kernel(name: str, arch: str, c: Candidate) -> Kernel:
    return Kernel(
        name, c.config.params, c.source_digest, c.cubin_sha256, arch, c.registers, c.shared_bytes, c.spill_bytes
    )
