"""New keys and values to the compressed cache: our one launch against vLLM's own, by format and head dim.

    python benchmarks/store.py                  # vLLM's four formats, head dims 64 to 512; three minutes (never run)
    python benchmarks/store.py --head-dims 128  # what the targets are about; less than one

Three lines per format and head dim, 8 KV heads, bf16 rows:

    step    128 tokens, each to a block of its own, as a decode step of 128 requests stores them: one call in a graph
    layers  32 such calls on different rows in one graph, as the layers of a model; time per call
    chunk   8192 tokens that fill their blocks, as a chunk of a prompt does: one call in a graph

CUDA graphs, L2 flushed before each replay, shuffled interleaved rounds, medians; *step* and *chunk* include what a
graph of any kernel costs. Ours is the table's kernel (--tables), without one the best of the default configuration and
the search's leads, compiled here. vLLM's is its backend's path, unmodified: casts, norm, rotation, pack. *limit*: bytes
of the rows read and of the fields written, over the bandwidth that a read-only kernel reaches. Before anything is
timed, every kernel passes the gate; *moved* says how many codebook indices rounding moved by one level there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.check_store import Difference

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.command import attached_gpu, ended, write_record  # noqa: E402
from tuner.errors import TunerError, UsageError  # noqa: E402
from tuner.formats import FORMATS, HEAD_DIMS, VLLM_PRESETS  # noqa: E402
from tuner.report.terminal import times, us  # noqa: E402
from tuner.space import Config, Problem, default_config, get_space  # noqa: E402
from tuner.targets import Target  # noqa: E402
from tuner.workload import Bucket, Shape  # noqa: E402

KV_HEADS = 8
LAYERS = 32
STEP, CHUNK = Bucket(128, 1), Bucket(8192, 1)
CASES = (("step", STEP, 1), ("layers", STEP, LAYERS), ("chunk", CHUNK, 1))
"""Name, tokens of a call, calls in the graph."""
STEP_US, STEP_TIMES, CHUNK_SHARE = 4.0, 4.0, 0.6
"""Targets at head dim 128: a step's store in a graph at most, times faster than vLLM's at least, share of the limit."""
_HEADINGS = ("format", "D", "case", "us", "limit", "vLLM us", "faster", "kernel")
_WIDTHS = (-20, 4, -7, 8, 6, 8, 8, 0)
"""Of the columns, negative: text to the left."""


@dataclass(frozen=True)
class Point:
    """One line. Times in us per call; ``vllm_us`` None: not measured. ``config``: the winner's axes."""

    cache_format: str
    head_dim: int
    case: str
    tokens: int
    calls: int
    us: float
    limit_us: float
    vllm_us: float | None
    config: str
    source: str

    @property
    def share(self) -> float:
        return self.limit_us / self.us

    @property
    def faster(self) -> float | None:
        return None if self.vllm_us is None else self.vllm_us / self.us


@dataclass(frozen=True)
class Verdict:
    """A target over all formats at head dim 128: the worst of them. ``met`` None: not measured."""

    name: str
    expected: float
    worst: float | None
    met: bool | None


def columns(cells: Sequence[str]) -> str:
    padded = (c.ljust(-w) if w < 0 else c.rjust(w) for c, w in zip(cells, _WIDTHS, strict=True))
    return "  ".join(padded).rstrip()


def line(p: Point) -> str:
    cells = (p.cache_format, str(p.head_dim), p.case, us(p.us), f"{p.share:.0%}", us(p.vllm_us), times(p.faster))
    return columns((*cells, f"{p.source}: {p.config}"))


def verdicts(points: Sequence[Point]) -> list[Verdict]:
    """The targets, each by the worst of vLLM's formats at head dim 128."""
    at = [p for p in points if p.head_dim == 128 and p.cache_format in VLLM_PRESETS]
    steps = [p.us for p in at if p.case == "layers"]
    ratios = [p.faster for p in at if p.case == "layers" and p.faster is not None]
    shares = [p.share for p in at if p.case == "chunk"]
    return [
        Verdict("us of a step's store in a graph", STEP_US, max(steps, default=None), _met(steps, STEP_US, -1)),
        Verdict("times faster than vLLM's there", STEP_TIMES, min(ratios, default=None), _met(ratios, STEP_TIMES, 1)),
        Verdict("share of a chunk's limit", CHUNK_SHARE, min(shares, default=None), _met(shares, CHUNK_SHARE, 1)),
    ]


def _met(values: Sequence[float], bar: float, sign: int) -> bool | None:
    return all(sign * v >= sign * bar for v in values) if values else None


def problems(formats: str, head_dims: str) -> list[Problem]:
    """Raises UsageError for a format or head dim that there is not."""
    names = formats.split(",") if formats else list(VLLM_PRESETS)
    unknown = [n for n in names if n not in FORMATS]
    if unknown:
        raise UsageError(f"--formats names {unknown[0]!r}: expected some of {', '.join(FORMATS)}")
    try:
        dims = [int(d) for d in head_dims.split(",")] if head_dims else list(HEAD_DIMS)
    except ValueError:
        raise UsageError(f"--head-dims is {head_dims!r}: expected whole numbers, as 128,256") from None
    return [Problem("store", d, 1, n) for n in names for d in dims]


def candidates(problem: Problem, target: Target) -> list[Config]:
    """The default configuration and the leads that are allowed on ``target``, each once."""
    space = get_space("store")
    leads = [c for c in space.leads(problem, KV_HEADS) if not space.refusals(c, target)]
    return list(dict.fromkeys((default_config(problem), *leads)))


class Bench:
    """Kernels and timer of one GPU."""

    def __init__(self, target: Target, device: int, tables: Path | None, root: Path, rounds_s: float) -> None:
        import torch

        from tuner.measure.store_pool import StorePool
        from tuner.measure.timer import Timer

        torch.cuda.set_device(device)
        self.target, self.device, self.root, self.rounds_s = target, device, root, rounds_s
        self.tables = tables
        self.timer = Timer()
        self.pool = StorePool(16, 0)
        self.moved: dict[str, Difference] = {}

    def compile(self, asked: Sequence[Problem]) -> dict[Config, bytes]:
        """Cubins of all candidates, built together. Raises TunerError where one does not compile."""
        from tuner.build import BuildFailure, build
        from tuner.render import render

        sources = {c: render(c) for p in asked for c in candidates(p, self.target)}
        built = build(sources.values(), [self.target.arch], root=self.root)
        images = {}
        for config, source in sources.items():
            result = built[source.digest, self.target.arch]
            if isinstance(result, BuildFailure):
                raise TunerError(f"{config.describe()} does not compile: {result.message} (see {result.log})")
            images[config] = result.cubin.read_bytes()
        return images

    def run(self, problem: Problem, images: dict[Config, bytes]) -> Iterator[Point]:
        """Gate, then the three cases."""
        from tuner.launch import LoadedKernel

        kernels = {c: LoadedKernel.load(i, c, self.device) for c, i in images.items() if c.problem == problem}
        tuned = self._table_kernels(problem)
        found = [self._gate(k) for k in (*kernels.values(), *(k for chosen in tuned.values() for k in chosen))]
        self.moved[name(problem)] = max(found, key=lambda d: d.moved)
        for case, bucket, calls in CASES:
            own = tuned.get(bucket.batch) or list(kernels.values())
            yield self._time(problem, case, bucket, calls, own, "table" if bucket.batch in tuned else "leads")
        for kernel in kernels.values():
            kernel.unload()

    def _table_kernels(self, problem: Problem) -> dict[int, list[Any]]:
        """Tokens -> the one kernel that the table names for as many; empty without a table."""
        from tuner.kernels import Tables

        if self.tables is None:
            return {}
        tables = Tables(self.tables, self.device)
        chosen = {b.batch: tables.select(problem, batch=b.batch, kv_heads=KV_HEADS) for b in (STEP, CHUNK)}
        return {n: [s.kernel] for n, s in chosen.items() if s is not None}

    def _gate(self, kernel: Any) -> Difference:
        from tuner.check_store import tally
        from tuner.measure.store_pool import runner

        found = tally(runner(kernel), kernel.config.problem, device="cuda", level="full", kv_heads=2)
        if found.fault:
            raise TunerError(f"wrong result of {kernel.config.describe()}: {found.fault}")
        return found

    def _time(
        self, problem: Problem, case: str, bucket: Bucket, calls: int, kernels: Sequence[Any], source: str
    ) -> Point:
        from tuner.baselines import prepare, survey
        from tuner.measure.store_pool import store_call
        from tuner.search.evaluate import limit_us

        shape = Shape(problem.head_dim, KV_HEADS, KV_HEADS)
        inputs = self._inputs(shape, problem.cache_format, bucket, calls)
        replays = {
            str(i): self.timer.capture(together([store_call(kernel, one) for one in inputs]))
            for i, kernel in enumerate(kernels)
        }
        if survey("cuda", problem)[0].reason is None:
            replays["vllm"] = self.timer.capture(together([prepare("vllm_store", one) for one in inputs]))
        _, samples = self.timer.race(replays, self.rounds_s)
        vllm = samples.pop("vllm").median_us / calls if "vllm" in samples else None
        best = min(samples, key=lambda name: samples[name].median_us)
        return Point(
            problem.cache_format,
            problem.head_dim,
            case,
            bucket.batch,
            calls,
            samples[best].median_us / calls,
            limit_us(problem, shape, bucket, self.target),
            vllm,
            kernels[int(best)].config.describe(),
            source,
        )

    def _inputs(self, shape: Shape, cache_format: str, bucket: Bucket, calls: int) -> list[Any]:
        """Rows and slots of as many layers, in one cache."""
        import torch

        from tuner.measure.store_pool import slot_mapping

        first = self.pool.cases(shape, cache_format, [bucket])[bucket.key]
        blocks, block_size = first.kv_cache.shape[0], first.kv_cache.shape[-3]
        inputs = [first]
        for layer in range(1, calls):
            generator = torch.Generator(device="cuda").manual_seed(layer)
            key, value = torch.randn(2, *first.key.shape, generator=generator, device="cuda").bfloat16()
            slots = slot_mapping(bucket.batch, blocks, block_size, generator)
            inputs.append(replace(first, key=key, value=value, slot_mapping=slots))
        return inputs


def name(problem: Problem) -> str:
    return f"{problem.cache_format} {problem.head_dim}"


def together(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """One call that makes all of ``calls``."""

    def run() -> None:
        for call in calls:
            call()

    return run


def run(args: argparse.Namespace) -> int:
    from tuner.search.provenance import driver_of

    asked = problems(args.formats, args.head_dims)
    target = attached_gpu(args.gpu)
    bench = Bench(target, args.gpu, args.tables, args.root, args.rounds_s)
    images = bench.compile(asked)
    print(f"{target.device_name}, {KV_HEADS} KV heads, {len(images)} kernels compiled", flush=True)
    print(columns(_HEADINGS), flush=True)
    points = []
    for problem in asked:
        for point in bench.run(problem, images):
            points.append(point)
            print(line(point), flush=True)
        print(f"  gate, the worst kernel: {bench.moved[name(problem)].describe()}", flush=True)
    found = verdicts(points)
    print("\ntargets, the worst of vLLM's formats at head dim 128")
    for v in found:
        word = "not measured" if v.met is None else "met" if v.met else "MISSED"
        print(f"{word}: {v.name}: {'-' if v.worst is None else f'{v.worst:.3g}'}, expected {v.expected:g}")
    data = {
        "verdicts": [asdict(v) for v in found],
        "moved": {n: asdict(d) | {"text": d.describe()} for n, d in bench.moved.items()},
        "points": [asdict(p) | {"share": p.share, "faster": p.faster} for p in points],
    }
    write_record(args.json, target.device_name, driver_of(args.gpu), data)
    print(f"written: {args.json}")
    judged = any(p.head_dim == 128 and p.cache_format in VLLM_PRESETS for p in asked)
    return 0 if all(v.met is True for v in found) or not judged else 1


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--formats", default="", help="list (default: vLLM's four)")
    made.add_argument("--head-dims", default="", help="list (default: 64,128,256,512)")
    made.add_argument("--tables", type=Path, help="folder with tables and kernels/ (default: compile the leads)")
    made.add_argument("--rounds-s", type=float, default=1.0, metavar="S", help="seconds of rounds per line (1)")
    made.add_argument("--root", type=Path, default=Path("build"), help="where kernels are compiled")
    made.add_argument("--json", type=Path, default=Path("build/store.json"), help="where the JSON goes")
    made.add_argument("--gpu", type=int, default=0)
    return made


if __name__ == "__main__":
    sys.exit(ended(run, parser()))
