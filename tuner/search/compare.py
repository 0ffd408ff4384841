"""One study that gives every value of an axis its share, and one race between the best kernel of each value."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tuner.errors import TunerError
from tuner.search.evaluate import Candidate, Evaluator, Final, Time, best_time, limit_us
from tuner.search.progress import Tracker
from tuner.search.provenance import device_of, provenance_of
from tuner.search.records import Record
from tuner.search.request import Failure, OnEvent, TuneRequest
from tuner.search.run import Search
from tuner.search.study import check_request, evaluator_for
from tuner.space.core import Value
from tuner.table.schema import provenance_json
from tuner.targets import device_slug
from tuner.workload import Bucket

DEFAULT_TRIALS_PER_VALUE = 16
DEFAULT_TIMEOUT_S = 90.0
DEFAULT_RACE_TIMEOUT_S = 30.0
BASELINES = {"decode": ("vllm_triton", "triton"), "dequant": ("triton_dequant",)}
"""Op -> Triton kernels, as shipped, that race too: a comparison tunes none."""


@dataclass(frozen=True)
class Contender:
    """The best kernel of one value. ``times``: bucket key -> time in the race, or in the search where none was held."""

    value: Value
    tried: int
    candidate: Candidate
    times: Mapping[str, Time]
    splits: Mapping[str, int]


@dataclass(frozen=True)
class Comparison:
    """``contenders`` in the order of the values asked for; ``missing``: value -> why no kernel of it runs.

    ``baselines_us``: bucket key -> baseline -> us, None where it did not run.
    """

    request: TuneRequest
    axis: str
    contenders: tuple[Contender, ...]
    missing: Mapping[Value, str]
    limits_us: Mapping[str, float]
    baselines_us: Mapping[str, Mapping[str, float | None]]
    raced: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        r = self.request
        return {
            "axis": self.axis,
            "op": r.problem.op,
            "head_dim": r.problem.head_dim,
            "gqa": r.problem.gqa,
            "cache_format": r.problem.cache_format,
            "kv_heads": r.shape.kv_heads,
            "evidence": r.evidence,
            "device": asdict(device_of(r)),
            "provenance": provenance_json(provenance_of(r)),
            "limits_us": dict(self.limits_us),
            "baselines_us": {b: dict(times) for b, times in self.baselines_us.items()},
            "raced": list(self.raced),
            "missing": {str(v): why for v, why in self.missing.items()},
            "contenders": [_contender(c) for c in self.contenders],
        }

    def save(self, folder: Path) -> Path:
        """Writes it to a file of ``folder`` named after problem and device. Raises TunerError."""
        p = self.request.problem
        name = f"{self.axis},op={p.op},head_dim={p.head_dim},gqa={p.gqa},device_name="
        path = folder / f"{name}{device_slug(self.request.target.device_name)},cache_dtype={p.cache_format}.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        except OSError as error:
            raise TunerError(f"cannot write the comparison {path}: {error.strerror}") from None
        return path


def comparison_buckets(op: str) -> tuple[Bucket, ...]:
    """Few buckets that differ in what limits a kernel: one request short and long, many, and many of mixed length."""
    buckets = (Bucket(1, 4096), Bucket(1, 32768), Bucket(8, 16384), Bucket(32, 8192), Bucket(128, 4096))
    return buckets if op == "dequant" else (*buckets, Bucket(32, 65536, ragged=True))


def compare(
    request: TuneRequest, axis: str, on_event: OnEvent | None = None, evaluator: Evaluator | None = None
) -> Comparison:
    """The best kernels of ``request.restrict[axis]``, value by value, over ``request.buckets``.

    ``trials`` and ``timeout_s`` are of all values together, in equal shares. Raises TunerError where nothing runs.
    """
    values = request.restrict[axis]
    request = replace(request, baselines=BASELINES[request.problem.op], output=None)
    check_request(request)
    evaluator = evaluator or evaluator_for(request)
    share = max(1, (request.trials or DEFAULT_TRIALS_PER_VALUE * len(values)) // len(values))
    timeout_s = request.timeout_s or DEFAULT_TIMEOUT_S
    try:
        whole = replace(request, timeout_s=timeout_s, trials=share * len(values))
        search = Search.open(whole, on_event, evaluator, landmarks=False)
        search.prune = False  # the best kernel of a slow value is wanted too
        for i, value in enumerate(values):
            search.narrow(axis, value, share, timeout_s * (i + 1) / len(values))
            search.run()
        deadline = time.monotonic() + (request.race_timeout_s or DEFAULT_RACE_TIMEOUT_S)
        records = search.records()
        chosen, missing = {}, {}
        for value in values:
            own = [r for r in records if r.config[axis] == value]
            found = _best(own, evaluator)
            if isinstance(found, str):
                missing[value] = found
            else:
                chosen[value] = (len(own), *found)
        if not chosen:
            raise TunerError(f"no value of {axis} has a kernel that runs: {next(iter(missing.values()))}")
        return _race(request, axis, chosen, missing, evaluator, search.tracker, deadline)
    finally:
        evaluator.close()


def _best(records: Sequence[Record], evaluator: Evaluator) -> tuple[Record, Candidate] | str:
    """The fastest of ``records`` that passes the full gate, or why there is none."""
    ran = sorted((r for r in records if r.score is not None and not r.partial), key=lambda r: r.score or 0.0)
    why = next((r.failure.message for r in records if r.failure), "no configuration was tried in the time")
    for record in ran:
        result = evaluator.build([record.config])[0]
        failure = result if isinstance(result, Failure) else evaluator.confirm(result)
        if failure is None and isinstance(result, Candidate):
            return record, result
        why = failure.message if failure else why
    return why


def _race(
    request: TuneRequest,
    axis: str,
    chosen: Mapping[Value, tuple[int, Record, Candidate]],
    missing: Mapping[Value, str],
    evaluator: Evaluator,
    tracker: Tracker,
    deadline: float,
) -> Comparison:
    splits: dict[Value, dict[str, int]] = {
        v: {key: min(row, key=lambda s, row=row: row[s].median_us) for key, row in r.timings.items()}  # type: ignore[misc]
        for v, (_, r, _) in chosen.items()
    }
    times = {v: {key: best_time(row) for key, row in r.timings.items()} for v, (_, r, _) in chosen.items()}
    baselines_us: dict[str, Mapping[str, float | None]] = {}
    raced = []
    for i, bucket in enumerate(request.buckets):
        entrants = sorted((v for v in chosen if bucket.key in times[v]), key=_simplicity(chosen))
        left_s = (deadline - time.monotonic()) / (len(request.buckets) - i)
        if not entrants or left_s <= 0:
            continue
        final = evaluator.final([(chosen[v][2], splits[v][bucket.key]) for v in entrants], bucket, (), left_s)
        if isinstance(final, Final):
            raced.append(bucket.key)
            baselines_us[bucket.key] = final.baselines_us
            for v, t in zip(entrants, final.times, strict=True):
                if t is not None:
                    times[v][bucket.key] = t
            tracker.tell("race", f"race {i + 1}/{len(request.buckets)}: {bucket.key}")
        else:
            tracker.tell("race", f"{bucket.key}: no race, {final.kind}: {final.message}", failure=final)
    contenders = tuple(Contender(v, n, c, times[v], splits[v]) for v, (n, _, c) in chosen.items())
    limits = {b.key: limit_us(request.problem, request.shape, b, request.target) for b in request.buckets}
    return Comparison(request, axis, contenders, missing, limits, baselines_us, tuple(raced))


def _simplicity(chosen: Mapping[Value, tuple[int, Record, Candidate]]) -> Callable[[Value], tuple[int, str]]:
    return lambda value: (chosen[value][2].registers, str(value))


def _contender(c: Contender) -> dict[str, Any]:
    return {
        "value": c.value,
        "tried": c.tried,
        "params": dict(c.candidate.config.params),
        "registers": c.candidate.registers,
        "shared_bytes": c.candidate.shared_bytes,
        "spill_bytes": c.candidate.spill_bytes,
        "splits": dict(c.splits),
        "times_us": {b: [t.median_us, t.ci_low_us, t.ci_high_us] for b, t in c.times.items()},
        "bottlenecks": {b: t.bottleneck for b, t in c.times.items() if t.bottleneck},
    }
