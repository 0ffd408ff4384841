"""Attention time per decode step of a whole model, measured on the attached GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuner.baselines import available
from tuner.build import BuildFailure, build
from tuner.errors import TunerError
from tuner.formats import slot_layout
from tuner.geometry import split_candidates
from tuner.measure import Contestant, Failure, Measurer
from tuner.predict import memory_limit_us
from tuner.render import render
from tuner.space import Problem, default_config
from tuner.table import find, lookup, read
from tuner.targets import Target
from tuner.workload import Bucket, Shape, Workload

OURS = "wph"


@dataclass(frozen=True)
class StepRow:
    """One decode step of ``batch`` requests with ``context`` tokens each; times in us over all ``layers``.

    ``times_us``: contestant -> attention time; a contestant that failed on any shape is missing. ``source`` says where
    our kernels come from: "table" or "default".
    """

    batch: int
    context: int
    layers: int
    times_us: Mapping[str, float]
    limit_us: float
    source: str


def bench_model(
    workload: Workload,
    cache_format: str,
    batches: Sequence[int],
    context: int,
    target: Target,
    *,
    gpu: int = 0,
    budget_s: float = 5.0,
    root: Path = Path("build"),
) -> list[StepRow]:
    """A row per batch: for every shape a race between our kernel and the baselines, times its layers, summed.

    Layers with a sliding window are left out: vLLM runs them with its own kernel. Raises TunerError where nothing is
    left, or our kernel fails.
    """
    shapes = [(shape, layers) for shape, layers in workload.shapes if not shape.sliding]
    if not shapes:
        raise TunerError(f"every layer of {workload.name} has a sliding window: there is nothing to time")
    steps = []
    with Measurer(gpu) as measurer:
        for batch in batches:
            bucket = Bucket(batch, context)
            total: dict[str, float] | None = None
            limit_us, sources = 0.0, set()
            for shape, layers in shapes:
                ours, source = our_kernel(shape, cache_format, bucket, target, root)
                times_us = _race(measurer, ours, shape, cache_format, bucket, gpu, budget_s)
                known = times_us if total is None else total
                total = {n: (total or {}).get(n, 0.0) + layers * times_us[n] for n in known if n in times_us}
                limit_us += layers * memory_limit_us(shape, slot_layout(cache_format, shape.head_dim), bucket, target)
                sources.add(source)
            count = sum(layers for _, layers in shapes)
            steps.append(StepRow(batch, context, count, total or {}, limit_us, " and ".join(sorted(sources))))
    return steps


def our_kernel(shape: Shape, cache_format: str, bucket: Bucket, target: Target, root: Path) -> tuple[Contestant, str]:
    """The kernel that a table names for ``bucket``, else the default configuration, compiled; and which it was."""
    problem = Problem("decode", shape.head_dim, shape.gqa, cache_format)
    path = find(problem, target.device_name)
    if path is not None:
        table = read(path, arch=target.arch)
        choice = lookup(table, bucket.batch, bucket.context, kv_heads=shape.kv_heads)
        if choice is not None:
            config = table.kernel(choice.kernel).config(problem)
            cubin = path.parent / "kernels" / f"{choice.kernel}.cubin"
            return Contestant(OURS, config, cubin, choice.splits), "table"
    config = default_config(problem)
    source = render(config)
    built = build([source], [target.arch], root=root)[source.digest, target.arch]
    if isinstance(built, BuildFailure):
        raise TunerError(f"the default configuration does not compile: {built.message} (see {built.log})")
    splits = split_candidates(
        config,
        registers=built.registers,
        batch=bucket.batch,
        kv_heads=shape.kv_heads,
        max_context=bucket.context,
        target=target,
    )
    return Contestant(OURS, config, built.cubin, splits[0]), "default"


def _race(
    measurer: Measurer, ours: Contestant, shape: Shape, cache_format: str, bucket: Bucket, gpu: int, budget_s: float
) -> dict[str, float]:
    """Contestant -> median in us. Raises TunerError where ours failed."""
    problem = Problem("decode", shape.head_dim, shape.gqa, cache_format)
    contestants = [ours, *(Contestant(name) for name in available(f"cuda:{gpu}", problem))]
    race = measurer.race(contestants, shape, cache_format, bucket, budget_s=budget_s)
    if isinstance(race, Failure):
        raise TunerError(f"{bucket.key}: {race.kind}: {race.message}")
    if OURS not in race.samples:
        failure = race.failures[OURS]
        raise TunerError(f"{bucket.key}: our kernel failed: {failure.kind}: {failure.message}")
    return {name: sample.median_us for name, sample in race.samples.items()}
