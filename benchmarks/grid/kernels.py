"""Whose kernels race: ours as the API would choose them, and the constants of the tuned Triton baseline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.grid.points import Point
from tuner.baselines import split_name
from tuner.bench import OURS, default_kernel, table_kernel
from tuner.build import BuildFailure, Built, build
from tuner.errors import TunerError
from tuner.measure import Contestant
from tuner.render import render
from tuner.space import Config, Problem, default_config
from tuner.table import Table, find, read, table_file_name
from tuner.targets import Target

GRAPH = "wph_graph"
"""The one kernel that a table names for a batch at all contexts, where it is another than the bucket's own."""
TUNED_TOGETHER = 2
"""Constants of the Triton baseline that race at most."""


@dataclass(frozen=True)
class Ours:
    """Our contestants of one point. ``source``: "table" or "default"; ``digest``: of what they run."""

    contestants: tuple[Contestant, ...]
    source: str
    digest: str


class Kernels:
    """The kernels of the tables in ``folder`` (None: where the API looks), else default configurations."""

    def __init__(self, folder: Path | None, target: Target, root: Path) -> None:
        self._folder, self._target, self._root = folder, target, root
        self._tables: dict[Problem, tuple[Path, Table] | None] = {}
        self._defaults: dict[Problem, tuple[Config, Built]] = {}

    def of(self, point: Point) -> Ours:
        """Raises TunerError where a table cannot be trusted or the default configuration does not compile."""
        found = self.table(problem_of(point))
        graph = self._chosen(found, point, GRAPH, None)
        if point.op == "dequant":  # the API does not look at contexts there
            own = replace(graph, name=OURS) if graph else None
        else:
            own = self._chosen(found, point, OURS, point.bucket.longest)
        if own is None:
            return self._default(point)
        differs = point.op == "decode" and graph and (graph.cubin, graph.splits) != (own.cubin, own.splits)
        contestants = (own, graph) if differs and graph else (own,)
        digest = " ".join(f"{c.cubin.stem}/{c.splits}" for c in contestants if c.cubin)
        return Ours(contestants, "table", digest)

    def build_defaults(self, problems: Iterable[Problem]) -> None:
        """Compiles the default configurations of ``problems``, all at once."""
        sources = {p: render(default_config(p)) for p in problems if p not in self._defaults}
        if not sources:
            return
        results = build(sources.values(), [self._target.arch], root=self._root)
        for problem, source in sources.items():
            result = results[source.digest, self._target.arch]
            if isinstance(result, BuildFailure):
                raise TunerError(f"the default configuration does not compile: {result.message} (see {result.log})")
            self._defaults[problem] = (source.config, result)

    def table(self, problem: Problem) -> tuple[Path, Table] | None:
        if problem not in self._tables:
            if self._folder is None:
                path = find(problem, self._target.device_name)
            else:
                path = self._folder / table_file_name(problem, self._target.device_name)
                path = path if path.is_file() else None
            self._tables[problem] = None if path is None else (path, read(path, arch=self._target.arch))
        return self._tables[problem]

    def tuned_triton(self, problem: Problem) -> tuple[str, ...]:
        """The tuned constants that the table's own races found fastest most often; () without a table."""
        found = self.table(problem)
        if found is None:
            return ()
        wins: Counter[str] = Counter()
        for entry in found[1].by_batch_and_context:
            timed = {n: us for n, us in entry.timing.baselines_us.items() if us is not None and split_name(n)[1]}
            if timed:
                wins[min(timed, key=lambda n: timed[n])] += 1
        return tuple(name for name, _ in wins.most_common(TUNED_TOGETHER))

    def _chosen(
        self, found: tuple[Path, Table] | None, point: Point, name: str, context: int | None
    ) -> Contestant | None:
        if found is None:
            return None
        b, kv_heads = point.bucket, point.shape.kv_heads
        return table_kernel(*found, batch=b.batch, context=context, tokens=b.tokens, kv_heads=kv_heads, name=name)

    def _default(self, point: Point) -> Ours:
        problem = problem_of(point)
        self.build_defaults([problem])
        config, built = self._defaults[problem]
        kernel = default_kernel(config, built, point.bucket, point.shape.kv_heads, self._target)
        return Ours((kernel,), "default", f"{built.digest[:16]}/{kernel.splits}")


def problem_of(point: Point) -> Problem:
    gqa = point.shape.gqa if point.op == "decode" else 1
    return Problem(point.op, point.shape.head_dim, gqa, point.cache_format)
