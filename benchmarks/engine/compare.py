"""Whether two engines say the same, and what the times of several come to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LOGPROB_SLACK = 0.02
"""Logprob difference allowed beyond that between two runs of vLLM's own kernel."""
PARTING_RATIO = 1.6
"""Ours may leave vLLM's tokens this much more often than vLLM's kernel leaves its own. Predicted: at the rate
of the recorded run (docs/vllm.md: 24 of 44 sequences part) a whole plan counts some 65 departures on either side; two
Poisson counts of 65 come out above it in less than one run of a hundred, two of 24, as with --quick, in one of 18."""
LONG_CONTEXT = 16384
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Agreement:
    """Two runs of the same prompts. Logprob differences are of tokens up to the first that differs.

    ``parting``: of the tokens that follow equal ones, the share that differs. ``widest_tie``: where the tokens part,
    by how much the first run preferred its own to the other's; the largest. Infinite where the other's was not even
    among those it kept logprobs of.
    """

    sequences: int
    equal: float
    parting: float
    median_logprob: float
    p99_logprob: float
    widest_tie: float

    def describe(self) -> str:
        return (
            f"{self.sequences} sequences, {self.equal:.0%} equal to the end, parting at {self.parting:.2%} of the "
            f"tokens; logprobs differ by {self.median_logprob:.4f} in the median, "
            f"{self.p99_logprob:.4f} at the 99th percentile; widest tie {self.widest_tie:.4f}"
        )


def agreement(a: Result, b: Result, *, of: str | None = None, to: str | None = None) -> Agreement:
    """``a``'s attempts ``of`` (any) against ``b``'s ``to`` (the same one), over the sets that both have."""
    theirs = {(e["set"], e["attempt"]): e for e in b["accuracy"]}
    sequences = equal = tokens = 0
    differences: list[float] = []
    widest = 0.0
    for entry in a["accuracy"]:
        other = theirs.get((entry["set"], to or entry["attempt"]))
        if other is None or (of is not None and entry["attempt"] != of):
            continue
        for mine, yours in zip(entry["top"], other["top"], strict=True):
            same = next((i for i, (p, q) in enumerate(zip(mine, yours, strict=True)) if p[0][0] != q[0][0]), len(mine))
            sequences, equal, tokens = sequences + 1, equal + (same == len(mine)), tokens + same
            differences += [abs(p[0][1] - q[0][1]) for p, q in zip(mine[:same], yours[:same], strict=True)]
            if same < len(mine):
                preferred = dict(map(tuple, mine[same]))
                widest = max(widest, mine[same][0][1] - preferred.get(yours[same][0][0], -math.inf))
    differences.sort()
    return Agreement(
        sequences,
        equal / sequences if sequences else math.nan,
        (sequences - equal) / (tokens + sequences - equal) if sequences else math.nan,
        statistics.median(differences) if differences else math.nan,
        differences[int(0.99 * (len(differences) - 1))] if differences else math.nan,
        widest,
    )


def attention_decides(result: Result) -> bool:
    """Prompts that share their last tokens must continue differently, else equal tokens prove nothing."""
    sets = [entry["top"] for entry in result["accuracy"] if len(entry["top"]) > 1]
    distinct = [len({tuple(step[0][0] for step in top[:8]) for top in tops}) / len(tops) for tops in sets]
    return bool(distinct) and min(distinct) > 0.9


def accuracy_verdict(results: Mapping[str, Result]) -> tuple[list[str], list[str]]:
    """(what was found, what failed): ours against vLLM's kernel, and that against itself."""
    ours, own, other = (results.get(k) for k in ("ours", "own", "own_other_splits"))
    if not (ours and own and other and ours["accuracy"] and own["accuracy"] and other["accuracy"]):
        return [], ["an engine is missing: tokens not compared"]
    failures = [] if attention_decides(own) else ["attention does not decide the tokens: equal ones prove nothing"]
    if not ours["used_ours"]:
        failures.append("our kernels are not in every graph of the engine that should use them")
    again = agreement(own, own, of="computed", to="computed again")
    itself, with_ours = agreement(own, other), agreement(own, ours)
    lines = [
        f"vLLM's kernel, computed twice by one engine: {again.describe()}",
        f"vLLM's kernel with 32 and with 24 splits: {itself.describe()}",
        f"ours and vLLM's kernel: {with_ours.describe()}",
    ]
    if not with_ours.parting <= PARTING_RATIO * itself.parting:
        failures.append("ours leaves vLLM's tokens more often than vLLM's kernel leaves its own")
    if not with_ours.p99_logprob <= 2 * itself.p99_logprob + LOGPROB_SLACK:
        failures.append("logprobs differ by more than vLLM's kernel differs from itself")
    if not with_ours.widest_tie <= 2 * itself.widest_tie + 2 * LOGPROB_SLACK:
        failures.append("ours chose a token that vLLM's kernel held for clearly worse")
    if results.get("ours_speculative"):
        lines.append(f"ours with speculative decoding: {agreement(ours, results['ours_speculative']).describe()}")
    return lines, failures


def speed_verdict(results: Mapping[str, Result]) -> tuple[list[str], list[str]]:
    """(a table in Markdown, what misses): 2 x vLLM's kernel, and bf16, both at long contexts."""
    rows = {k: {(s["batch"], s["context"]): s["step_ms"] for s in r["speed"]} for k, r in results.items()}
    lines = [
        "| batch | context | ours, ms | vLLM's, ms | bf16, ms | ours over vLLM's | ours over bf16 |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    failures = []
    for bucket, ours in sorted(rows.get("ours", {}).items()):
        own, bf16 = rows.get("own", {}).get(bucket), rows.get("bf16", {}).get(bucket)
        ratios = [f"{x / ours:.2f} x" if x else "-" for x in (own, bf16)]
        times = [f"{x:.2f}" if x else "-" for x in (ours, own, bf16)]
        lines.append(f"| {bucket[0]} | {bucket[1]} | {' | '.join([*times, *ratios])} |")
        if bucket[1] >= LONG_CONTEXT:
            where = f"batch {bucket[0]} x {bucket[1]}"
            if own and own < 2 * ours:
                failures.append(f"{where}: {own / ours:.2f} x vLLM's throughput, expected 2")
            if bf16 and bf16 < ours:
                failures.append(f"{where}: {bf16 / ours:.2f} x bf16's throughput, expected 1")
    missing = [k for k in ("ours", "own", "bf16") if not rows.get(k)]
    if missing:
        failures.append(f"no times of {', '.join(missing)}")
    return lines, failures
