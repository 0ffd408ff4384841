"""Whether two engines say the same, and what the times of several come to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LOGPROB_SLACK = 0.02
"""Logprob difference allowed beyond twice that of the yardstick."""
PARTING_RATIO = 1.6
"""Two runs may part this much more often than those of the yardstick. A whole plan counted 101 departures of 118
sequences on an H100: of two Poisson counts of 101 one is by more above the other in less than one run of a thousand."""
LONG_CONTEXT = 16384
Result = Mapping[str, Any]
Step = Sequence[Any]
"""One token of one run: (token, logprob) of the chosen one, then of the next best."""


@dataclass(frozen=True)
class Agreement:
    """Two runs of the same prompts. Logprob differences are of tokens up to the first that differs.

    ``parting``: of the tokens that follow equal ones, the share that differs. ``widest_shift``: by how much the
    logprobs of two candidates shift against each other between the runs, the largest of all tokens that follow equal
    ones, those that differ included: to prefer another token by a margin is to have shifted by that margin or more.
    Candidates are those that both kept logprobs of; infinite where one's token is not among the other's.
    """

    sequences: int
    equal: float
    parting: float
    median_logprob: float
    p99_logprob: float
    widest_shift: float

    def describe(self) -> str:
        return (
            f"{self.sequences} sequences, {self.equal:.0%} equal to the end, parting at {self.parting:.2%} of the "
            f"tokens; logprobs differ by {self.median_logprob:.4f} in the median, "
            f"{self.p99_logprob:.4f} at the 99th percentile; two candidates shift by up to {self.widest_shift:.4f}"
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
            widest = max([widest, *map(_shift, mine[: same + 1], yours[: same + 1])])
    differences.sort()
    return Agreement(
        sequences,
        equal / sequences if sequences else math.nan,
        (sequences - equal) / (tokens + sequences - equal) if sequences else math.nan,
        statistics.median(differences) if differences else math.nan,
        differences[int(0.99 * (len(differences) - 1))] if differences else math.nan,
        widest,
    )


def _shift(mine: Step, yours: Step) -> float:
    """Of one token: how far two runs shift candidates against each other, the width of the range of differences."""
    a, b = dict(map(tuple, mine)), dict(map(tuple, yours))
    if mine[0][0] not in b or yours[0][0] not in a:
        return math.inf
    differences = [a[token] - b[token] for token in a.keys() & b.keys()]
    return max(differences) - min(differences)


def undecided(result: Result) -> list[str]:
    """Sets whose prompts, which share their last tokens, continue too much alike: equal tokens would prove nothing. No
    set of several prompts proves nothing either.
    """
    if not any(len(entry["top"]) > 1 for entry in result["accuracy"]):
        return ["no set has several prompts"]
    found = {}
    for entry in result["accuracy"]:
        tops = entry["top"]
        distinct = len({tuple(step[0][0] for step in top[:8]) for top in tops})
        if len(tops) > 1 and distinct <= 0.9 * len(tops):
            found[entry["set"]] = f"{distinct} of the {len(tops)} prompts of set {entry['set']} begin differently"
    return list(found.values())


def accuracy_verdict(results: Mapping[str, Result]) -> tuple[list[str], list[str]]:
    """(what was found, what failed).

    Our decode kernel, on a cache that vLLM's store wrote, against vLLM's; the yardstick is that against itself. With
    our store the cache holds other bytes, as good: where a value lies in the middle of two levels, vLLM's approximate
    division takes either. So its yardstick is how far vLLM's cache leaves an uncompressed one.
    """
    ours, own, other = (results.get(k) for k in ("ours", "own", "own_other_splits"))
    if not (ours and own and other and ours["accuracy"] and own["accuracy"] and other["accuracy"]):
        return [], ["an engine is missing: tokens not compared"]
    failures = [f"attention does not decide the tokens, equal ones prove nothing: {u}" for u in undecided(own)]
    again, itself = agreement(own, own, of="computed", to="computed again"), agreement(own, other)
    lines = [
        f"vLLM's kernel, computed twice by one engine: {again.describe()}",
        f"vLLM's kernel with 32 and with 24 splits: {itself.describe()}",
    ]
    if ours["our_store"]:
        lines.append(f"ours and vLLM's kernels: {agreement(own, ours).describe()}")
    decode = results.get("ours_own_store") if ours["our_store"] else ours
    if not all(engine["used_ours"] for engine in (ours, decode) if engine):
        failures.append("our kernels are not in every graph of an engine that should use them")
    if decode and decode["accuracy"] and not decode["our_store"]:
        found = agreement(own, decode)
        lines.append(f"our decode kernel and vLLM's, both with vLLM's store: {found.describe()}")
        failures += _further(found, itself, "our decode kernel and vLLM's", "that and itself")
        if math.isinf(itself.widest_shift):
            failures.append(
                "vLLM's kernel shifts a candidate of its own out of sight: by how much ours do says nothing"
            )
        elif not found.widest_shift <= 2 * itself.widest_shift + 2 * LOGPROB_SLACK:
            failures.append("our decode kernel shifts two candidates by more than vLLM's kernel shifts them itself")
    else:
        failures.append("no engine with our decode kernel and vLLM's store: decoding not compared")
    if ours["our_store"]:
        lines_of_store, missed = _store_verdict(ours, own, results.get("bf16"))
        lines += lines_of_store
        failures += missed
    if results.get("ours_speculative"):
        lines.append(f"ours with speculative decoding: {agreement(ours, results['ours_speculative']).describe()}")
    return lines, failures


def damage_verdict(damaged: Result, own: Result | None) -> tuple[list[str], list[str]]:
    """(what was found, what failed): with our files cut short an engine says so and is vLLM's to the last digit."""
    lines = [f"with damaged files the engine says: {line}" for line in damaged["own_instead"]]
    failures = [] if lines else ["with damaged files the engine does not say that vLLM's kernels run"]
    if damaged["used_ours"] or damaged["our_store"]:
        failures.append("with damaged files the engine runs kernels of ours")
    if not own or not own["accuracy"] or not damaged["accuracy"]:
        return lines, [*failures, "with damaged files no tokens, or none of vLLM's kernel: not compared"]
    found = agreement(own, damaged)
    lines.append(f"vLLM's kernel and the engine with damaged files: {found.describe()}")
    if found.equal < 1 or found.p99_logprob > 0:
        failures.append("with damaged files the engine's tokens or logprobs are not those of vLLM's kernel")
    return lines, failures


def _store_verdict(ours: Result, own: Result, bf16: Result | None) -> tuple[list[str], list[str]]:
    if not bf16 or not bf16["accuracy"]:
        return [], ["no tokens with an uncompressed cache: our store not compared"]
    found, yardstick = agreement(bf16, ours), agreement(bf16, own)
    lines = [
        f"an uncompressed cache and vLLM's kernels: {yardstick.describe()}",
        f"an uncompressed cache and ours: {found.describe()}",
    ]
    return lines, _further(found, yardstick, "an uncompressed cache and ours", "that and vLLM's")


def _further(found: Agreement, yardstick: Agreement, pair: str, other: str) -> list[str]:
    """In what ``pair`` is further apart than the runs of the ``yardstick`` allow."""
    checks = (
        (found.parting <= PARTING_RATIO * yardstick.parting, "part more often"),
        (found.p99_logprob <= 2 * yardstick.p99_logprob + LOGPROB_SLACK, "have logprobs further apart"),
    )
    return [f"{pair} {what} than {other}" for good, what in checks if not good]


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
