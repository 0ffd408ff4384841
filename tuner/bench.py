"""Attention time per decode step of a whole model, measured on the attached GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from tuner.baselines import BASELINES, survey
from tuner.build import BuildFailure, Built, build
from tuner.errors import TunerError
from tuner.geometry import split_candidates
from tuner.measure import FIRST_STEP, Contestant, Failure, Measurer, Race
from tuner.render import render
from tuner.search.evaluate import limit_us
from tuner.space import Config, Problem, default_config
from tuner.table import Table, find, lookup, mixes_lengths, read, read_cubin
from tuner.targets import Target
from tuner.workload import Bucket, Shape, Workload

OURS = "wph"
ROLES = ("bf16", "seed", "triton", "wph")
"""The columns: bf16 attention on an uncompressed cache; the seed's path, which dequantises the whole cache and then
runs bf16 attention; the Triton kernels as shipped; the fused kernel."""
_DECODE = [b for b in BASELINES.values() if b.op == "decode"]
BF16 = tuple(b.name for b in _DECODE if b.kind == "peer" and b.name.endswith("_bf16"))
TRITON = tuple(b.name for b in _DECODE if b.kind != "peer")
_RACING = 0.6
"""Share of a race's time for its rounds; the rest is for preparing them."""
_SHORTEST_RACE_S = 0.5


@dataclass(frozen=True)
class StepTime:
    """Attention time over all layers: the sum of medians, and of the ends of their 95% intervals."""

    median_us: float
    ci_low_us: float
    ci_high_us: float

    def plus(self, other: StepTime, layers: int) -> StepTime:
        return StepTime(
            self.median_us + layers * other.median_us,
            self.ci_low_us + layers * other.ci_low_us,
            self.ci_high_us + layers * other.ci_high_us,
        )


@dataclass(frozen=True)
class StepRow:
    """One decode step of ``batch`` requests with ``context`` tokens each, over all ``layers`` with attention.

    ``times``: contestant -> time; one that failed on any shape is in ``missing`` instead, with the reason. ``source``
    says where our kernels come from: "table" or "default". ``limit_us``: compressed bytes over achievable bandwidth.
    """

    batch: int
    context: int
    layers: int
    times: Mapping[str, StepTime]
    limit_us: float
    source: str
    missing: Mapping[str, str] = field(default_factory=dict)

    def role_us(self, role: str) -> float | None:
        """Median of the fastest contestant that plays ``role`` (of ROLES); None where there is none."""
        names = {"bf16": BF16, "triton": TRITON, "wph": (OURS,)}.get(role)
        found = [t.median_us for n, t in self.times.items() if (n in names if names else n.startswith(FIRST_STEP))]
        return min(found, default=None)

    def step_ratio(self, role: str, attention_share: float) -> float | None:
        """Time of a whole step over that with bf16, if attention takes ``attention_share`` of the step with bf16.

        The rest of a step, which is not run here, is taken to cost the same with each.
        """
        bf16_us, ours_us = self.role_us("bf16"), self.role_us(role)
        if bf16_us is None or ours_us is None:
            return None
        return 1 - attention_share + attention_share * ours_us / bf16_us


def bench_model(
    workload: Workload,
    cache_format: str,
    batches: Sequence[int],
    contexts: Sequence[int],
    target: Target,
    *,
    gpu: int = 0,
    budget_s: float = 50.0,
    root: Path = Path("build"),
    tell: Callable[[str], None] = lambda line: None,
) -> list[StepRow]:
    """A row per context and batch: for every shape a race of all contestants, times its layers, summed.

    Layers that want more than plain attention, as a sliding window, are left out: vLLM runs them with its own kernel.
    ``budget_s``: about how long all races take together; ``tell`` hears of each. Raises TunerError where nothing is
    left to time, or our kernel fails.
    """
    shapes = [(shape, layers) for shape, layers in workload.shapes if not shape.wants]
    if not shapes:
        raise TunerError(f"every layer of {workload.name} has {workload.shapes[0][0].wants}: there is nothing to time")
    buckets = [Bucket(batch, context) for context, batch in product(contexts, batches)]
    rows = {
        bucket: StepRow(bucket.batch, bucket.context, sum(n for _, n in shapes), {}, 0.0, "") for bucket in buckets
    }
    deadline = time.monotonic() + budget_s
    races = [(shape, layers, bucket) for shape, layers in shapes for bucket in buckets]
    with Measurer(gpu) as measurer:
        for i, (shape, layers, bucket) in enumerate(races):
            what = f"head dim {shape.head_dim}, {bucket.batch} x {bucket.context} tokens"
            tell(f"race {i + 1} of {len(races)}: {what}")
            contestants, source, missing = _contestants(shape, cache_format, bucket, target, root, gpu)
            left_s = (deadline - time.monotonic()) / (len(races) - i)
            race = measurer.race(
                contestants,
                shape,
                cache_format,
                bucket,
                budget_s=max(_SHORTEST_RACE_S, _RACING * left_s),
                reserve=[b for _, _, b in races[i + 1 :]],
            )
            limit = limit_us(_problem("decode", shape, cache_format), shape, bucket, target)
            rows[bucket] = _added(rows[bucket], race, layers, limit, source, missing)
    return list(rows.values())


def _contestants(
    shape: Shape, cache_format: str, bucket: Bucket, target: Target, root: Path, gpu: int
) -> tuple[list[Contestant], str, dict[str, str]]:
    """Who races on a shape, where our decode kernel comes from, and why others do not race."""
    ours, source = our_kernel(shape, cache_format, bucket, target, root)
    first, _ = our_kernel(shape, cache_format, bucket, target, root, op="dequant")
    problem = _problem("decode", shape, cache_format)
    found, missing = [ours], {}
    for baseline in survey(f"cuda:{gpu}", problem):
        if baseline.name not in (*BF16, *TRITON):
            continue
        if baseline.reason is not None:
            missing[baseline.name] = baseline.reason
            continue
        found.append(Contestant(baseline.name))
        if baseline.name in BF16:
            found.append(replace(first, name=f"{FIRST_STEP}{baseline.name}"))
    return found, source, missing


def _problem(op: str, shape: Shape, cache_format: str) -> Problem:
    return Problem(op, shape.head_dim, shape.gqa if op == "decode" else 1, cache_format)


def our_kernel(
    shape: Shape, cache_format: str, bucket: Bucket, target: Target, root: Path, *, op: str = "decode"
) -> tuple[Contestant, str]:
    """The kernel that a table names for ``bucket``, else the default configuration, compiled; and which it was."""
    problem = _problem(op, shape, cache_format)
    path = find(problem, target.device_name)
    if path is not None:
        context = bucket.context if op == "decode" else None  # the API does not look at contexts elsewhere
        table = read(path, arch=target.arch)
        found = table_kernel(
            path, table, batch=bucket.batch, context=context, tokens=bucket.tokens, kv_heads=shape.kv_heads
        )
        if found is not None:
            return found, "table"
    config = default_config(problem)
    source = render(config)
    built = build([source], [target.arch], root=root)[source.digest, target.arch]
    if isinstance(built, BuildFailure):
        raise TunerError(f"the default configuration does not compile: {built.message} (see {built.log})")
    return default_kernel(config, built, bucket, shape.kv_heads, target), "default"


def table_kernel(
    path: Path,
    table: Table,
    *,
    batch: int,
    context: int | None,
    kv_heads: int,
    tokens: int | None = None,
    name: str = OURS,
) -> Contestant | None:
    """What ``table``, read from ``path``, names for a call; None far from what it covers.

    ``context`` is the longest request, ``tokens`` all requests' together. Raises TableError for a cubin with another
    hash than the table's.
    """
    choice = lookup(table, batch, context, kv_heads=kv_heads, ragged=mixes_lengths(batch, context, tokens))
    if choice is None:
        return None
    read_cubin(path, table, choice.kernel)
    config = table.kernel(choice.kernel).config(table.problem)
    return Contestant(name, config, path.parent / "kernels" / f"{choice.kernel}.cubin", choice.splits)


def default_kernel(config: Config, built: Built, bucket: Bucket, kv_heads: int, target: Target) -> Contestant:
    """``config``, which no table chose, with the most promising splits for ``bucket``."""
    splits = 1
    if config.problem.op == "decode":
        splits = split_candidates(
            config,
            registers=built.registers,
            batch=bucket.batch,
            kv_heads=kv_heads,
            max_context=bucket.context,
            target=target,
        )[0]
    return Contestant(OURS, config, built.cubin, splits)


def _added(
    row: StepRow, race: Race | Failure, layers: int, limit_us: float, source: str, missing: Mapping[str, str]
) -> StepRow:
    """``row`` with the times of one more shape. Raises TunerError where ours failed."""
    where = Bucket(row.batch, row.context).key
    if isinstance(race, Failure):
        raise TunerError(f"{where}: {race.kind}: {race.message}")
    if OURS not in race.samples:
        failure = race.failures[OURS]
        raise TunerError(f"{where}: our kernel failed: {failure.kind}: {failure.message}")
    gone = {**row.missing, **missing, **{name: f"{f.kind}: {f.message}" for name, f in race.failures.items()}}
    before = row.times or dict.fromkeys(race.samples, StepTime(0.0, 0.0, 0.0))
    times = {
        name: before[name].plus(StepTime(sample.median_us, sample.ci_low_us, sample.ci_high_us), layers)
        for name, sample in race.samples.items()
        if name in before and name not in gone
    }
    sources = dict.fromkeys((*filter(None, row.source.split(" and ")), source))
    return replace(
        row, times=times, limit_us=row.limit_us + layers * limit_us, source=" and ".join(sources), missing=gone
    )


def to_json(
    workload: Workload, cache_format: str, target: Target, rows: Sequence[StepRow], attention_shares: Sequence[float]
) -> dict[str, Any]:
    """What was measured, and under "assumed" what was not: the share of a step that attention takes."""
    return {
        "model": workload.name,
        "cache_format": cache_format,
        "device": target.device_name,
        "arch": target.arch,
        "evidence": "measured",
        "unit": "us of attention per decode step, over all layers with full attention",
        "rows": [asdict(row) | {"roles_us": {role: row.role_us(role) for role in ROLES}} for row in rows],
        "assumed": {
            "attention_shares_of_bf16_step": list(attention_shares),
            "step_time_over_bf16": [
                {"batch": row.batch, "context": row.context, "attention_share": share}
                | {role: row.step_ratio(role, share) for role in ROLES}
                for row in rows
                for share in attention_shares
            ],
        },
    }
