"""Times layouts with the evaluators of the search: on the attached GPU, or by the static model."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.layouts.grid import BUCKETS, Layout, bytes_in_flight, bytes_needed, layouts, study_problem
from tuner.report.layouts import resident_warps
from tuner.search import Candidate, Failure, TuneRequest
from tuner.search.evaluate import Scored, best_time, limit_us
from tuner.search.provenance import device_of, provenance_of
from tuner.search.study import evaluator_for
from tuner.targets import Target

_BATCH = 16
"""Layouts compiled together, while those before are timed."""

Study = dict[str, Any]


def study(
    op: str,
    head_dim: int,
    target: Target,
    evidence: str,
    timeout_s: float,
    root: Path,
    gpu: int,
    say: Callable[[str], None],
) -> Study:
    """All layouts of a problem that the time suffices for, as JSON. What fails is in it with the reason."""
    problem, shape = study_problem(op, head_dim)
    request = TuneRequest(problem, shape, BUCKETS[op], target, evidence, root=root, device=gpu)
    asked = layouts(problem, shape, target)
    evaluator = evaluator_for(request)
    deadline = time.monotonic() + timeout_s
    rows: list[dict[str, Any]] = []
    batches = [asked[i : i + _BATCH] for i in range(0, len(asked), _BATCH)]
    with ThreadPoolExecutor(1, thread_name_prefix="build") as builder:
        queued = [builder.submit(evaluator.build, [x.config for x in batch]) for batch in batches]
        try:
            for batch, building in zip(batches, queued, strict=True):
                if rows and time.monotonic() >= deadline:
                    break
                for layout, built in zip(batch, building.result(), strict=True):
                    # At least one: data without a single layout would say nothing.
                    if rows and time.monotonic() >= deadline:
                        break
                    outcome = built if isinstance(built, Failure) else evaluator.score(built, None)
                    rows.append(_row(layout, built, outcome, request))
                left_s = deadline - time.monotonic()
                say(f"{op}, head dim {head_dim}: {len(rows)} of {len(asked)} layouts, {left_s:.0f} s left")
        finally:
            builder.shutdown(wait=False, cancel_futures=True)
            evaluator.close()
    return {
        "op": op,
        "head_dim": head_dim,
        "q_heads": shape.q_heads,
        "kv_heads": shape.kv_heads,
        "cache_format": problem.cache_format,
        "evidence": evidence,
        "device": asdict(device_of(request)),
        "provenance": asdict(provenance_of(request)),
        "max_warps": target.max_warps,
        "bytes_needed_per_sm": bytes_needed(target),
        "limits_us": {b.key: limit_us(problem, shape, b, target) for b in BUCKETS[op]},
        "buckets": {b.key: [b.batch, b.context] for b in BUCKETS[op]},
        "layouts_allowed": len(asked),
        "layouts": sorted(rows, key=lambda r: (r["warps"], r["split"], r["rows_in_flight"])),
    }


def _row(layout: Layout, built: Candidate | Failure, outcome: Scored | Failure, request: TuneRequest) -> dict[str, Any]:
    row: dict[str, Any] = {
        "warps": layout.warps,
        "split": layout.split,
        "rows_in_flight": layout.rows_in_flight,
        "params": dict(layout.config.params),
    }
    if isinstance(built, Candidate):
        row |= {
            "registers": built.registers,
            "spill_bytes": built.spill_bytes,
            "shared_bytes": built.shared_bytes,
            "resident_warps": resident_warps(built.registers, built.shared_bytes, layout.warps, request.target),
            "bytes_in_flight_per_sm": bytes_in_flight(built, request.shape, request.target),
        }
    if isinstance(outcome, Failure):
        return row | {"failure": f"{outcome.kind}: {outcome.message}"}
    best = {bucket: best_time(times) for bucket, times in outcome.timings.items() if times}
    row["times_us"] = {bucket: float(f"{t.median_us:.5g}") for bucket, t in best.items()}
    row["splits"] = {b: min(t, key=lambda s, t=t: t[s].median_us) for b, t in outcome.timings.items()}  # type: ignore[misc]
    bottlenecks = {bucket: t.bottleneck for bucket, t in best.items() if t.bottleneck}
    return row | ({"bottlenecks": bottlenecks} if bottlenecks else {})
