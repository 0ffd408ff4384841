"""The grid of decode attention: ours against vLLM's Triton as shipped and tuned, and against FlashAttention-3.

One line per point as it is measured: time, share of the memory limit, and how many times faster than each contestant of
the same race. Then the targets, met or missed, by how much and where. Everything goes to a JSON file as well.

Each point is a race as in `python tune.py`: kernels that passed the correctness gate, a CUDA graph of one call per
contestant, cold L2, shuffled interleaved rounds, medians; slow contestants run in fewer rounds. No race begins after
--timeout (500 s); the same command then goes on where it stopped. On an H100 280 of the 362 races took 180 s, with
tables for their shapes. `--recorded FILE` prints what such a run has written, without a GPU.

With --arch of a GPU that is not attached nothing runs: the targets are those for predictions (no spills, shared memory,
share of the limit), read from the predicted tables.

Peers come from an installed vLLM, or from WPH_VLLM_SOURCE and WPH_FA3_LIBRARY (benchmarks/README.md).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.command import attached_gpu, ended, write_record  # noqa: E402
from benchmarks.grid import predicted  # noqa: E402
from benchmarks.grid.kernels import Kernels, problem_of  # noqa: E402
from benchmarks.grid.points import BATCHES, CONTEXTS, OTHER_FORMATS, SHAPES, Point, parse_shape, points  # noqa: E402
from benchmarks.grid.race import Budget, Racer, Result, Store  # noqa: E402
from benchmarks.grid.summary import HEADINGS, summary  # noqa: E402
from benchmarks.grid.verdict import Verdict, graph_cost, share, shipped_us, speedup, tuned_us, verdicts  # noqa: E402
from tuner.bench import OURS  # noqa: E402
from tuner.errors import UsageError  # noqa: E402
from tuner.formats import VLLM_PRESETS  # noqa: E402
from tuner.report.terminal import times, tokens, us  # noqa: E402
from tuner.search.provenance import driver_of  # noqa: E402
from tuner.targets import get_target  # noqa: E402

_QUICK = {"shapes": "128:32:8,256:16:2", "batches": "1,8,32,128", "contexts": "1024,16384,65536"}
_LINE_HEADINGS = ("section", "shape", "batch", "context", "us", "limit", "Triton", "tuned", "fa3", "fa3 fp8", "kernel")
_LINE_WIDTHS = (7, 10, 6, 12, 8, 6, 8, 8, 8, 8, 8)
_SUMMARY_WIDTHS = (19, 6, 9, 11, 11, 11, 11)


def say(text: str) -> None:
    print(text, flush=True)


def line(result: Result) -> str:
    """One point, in the columns of _LINE_HEADINGS; what failed stands at the end."""
    found = result["times_us"]
    peers = (shipped_us(result), tuned_us(result), found.get("fa3_bf16"), found.get("fa3_fp8"))
    reached = share(result)
    cells = (
        result["section"],
        f"{result['head_dim']} {result['q_heads']}/{result['kv_heads']}",
        str(result["batch"]),
        tokens(result["context"]) + (" ragged" if result["ragged"] else ""),
        us(found.get(OURS)),
        "-" if reached is None else f"{reached:.0%}",
        *(times(speedup(result, p)) for p in peers),
        result["source"],
    )
    failed = "; ".join(f"{name.partition('[')[0]}: {why[:60]}" for name, why in result["failures"].items())
    kind = "" if result["cache_format"] == "turboquant_4bit_nc" else f"  {result['cache_format']}"
    return _columns(cells, _LINE_WIDTHS) + kind + (f"  failed: {failed}" if failed else "")


def verdict_line(verdict: Verdict) -> str:
    failed = f", {verdict.failed} without a time of ours" if verdict.failed else ""
    if verdict.reached is None or verdict.worst is None:
        word = "not measured" if verdict.met is None else "MISSED"
        return f"{word}  {verdict.name} (0 of {verdict.asked} points{failed})"
    word = "met   " if verdict.met else "MISSED"
    short = verdict.reached < verdict.least
    miss = f", {1 - verdict.reached / verdict.least:.0%} short" if short and verdict.least else ""
    return (
        f"{word}  {verdict.name}: {verdict.statistic} {verdict.reached:.3g}, expected {verdict.least:g}{miss}"
        f" ({verdict.points} of {verdict.asked} points{failed}, {verdict.below} below;"
        f" worst {verdict.worst:.3g} at {verdict.worst_at})"
    )


def all_met(found: Sequence[Verdict]) -> bool:
    """Whether every target that points were asked for is met; what was not measured is not."""
    return all(v.met is True for v in found if v.asked)


def read_points(args: argparse.Namespace) -> list[Point]:
    """Raises UsageError for a shape, batch, context or format that cannot be."""
    chosen = {n: _QUICK[n] if args.quick and not getattr(args, n) else getattr(args, n) for n in _QUICK}
    shapes = [parse_shape(text) for text in chosen["shapes"].split(",")] if chosen["shapes"] else list(SHAPES)
    numbers = {}
    for name, default in (("batches", BATCHES), ("contexts", CONTEXTS)):
        try:
            numbers[name] = [int(n) for n in chosen[name].split(",")] if chosen[name] else list(default)
        except ValueError:
            raise UsageError(f"--{name} is {chosen[name]!r}: expected whole numbers, as 1,8,32") from None
    formats = OTHER_FORMATS if args.formats == "all" else tuple(filter(None, args.formats.split(",")))
    unknown = [f for f in formats if f not in VLLM_PRESETS]
    if unknown:
        raise UsageError(f"--formats names {unknown[0]!r}: expected all, or some of {', '.join(VLLM_PRESETS)}")
    return points(shapes, numbers["batches"], numbers["contexts"], formats, dequant=args.dequant)


def write(path: Path, device: str, driver: str | None, results: Sequence[Result], found: Sequence[Verdict]) -> None:
    data = {"verdicts": [asdict(v) for v in found], "results": list(results)}
    write_record(path, device, driver, data)


def run(args: argparse.Namespace) -> int:
    if args.recorded is not None:
        return show_recorded(args.recorded)
    from tuner.measure import Measurer

    asked = read_points(args)
    if args.arch is not None:
        return predict(args, asked)
    target = attached_gpu(args.gpu)
    driver = driver_of(args.gpu)
    start = time.monotonic()
    kernels = Kernels(args.tables, target, args.root)
    kernels.build_defaults(p for p in map(problem_of, asked) if kernels.table(p) is None)
    budget = Budget(args.rounds_s, args.point_s, total_s=args.timeout - (time.monotonic() - start))
    source = args.tables or "where the API looks"
    say(f"{len(asked)} races on {target.device_name}, {args.timeout:g} s at most; tables: {source}")
    say(_columns(_LINE_HEADINGS, _LINE_WIDTHS))
    done = 0

    def show(result: Result) -> None:
        nonlocal done
        done += 1
        say(f"{line(result)}  [{done}/{len(asked)}, {time.monotonic() - start:.0f} s]")

    with Measurer(args.gpu, log=args.work / "measure.log") as measurer:
        store = Store(args.work / "results.jsonl")
        results = Racer(measurer, kernels, target, store, budget, say, args.gpu, driver).run(asked, show)
    found = verdicts(results)
    write(args.json or args.work / "decode_grid.json", target.device_name, driver, results, found)
    conclude(results, found)
    if len(results) < len(asked):
        say(f"{len(asked) - len(results)} of {len(asked)} points not measured: run again to go on")
    return 0 if all_met(found) and len(results) == len(asked) else 1


def conclude(results: Sequence[Result], found: Sequence[Verdict]) -> None:
    """Means per shape, then the targets."""
    say("\nshare of the limit and times faster: geometric mean, worst")
    for row in (HEADINGS, *summary(results)):
        say(_columns(row, _SUMMARY_WIDTHS))
    say("\ntargets (times faster, or share)")
    for verdict in found:
        say(verdict_line(verdict))
    cost = graph_cost(results)
    if cost:
        say(f"one kernel per batch for all contexts, as a CUDA graph needs: {cost:.3f} x the time in the mean")
    plain = sum(r["source"] == "default" for r in results)
    if plain:
        say(f"{plain} of {len(results)} points ran the default configuration: no table has their problem")


def show_recorded(path: Path) -> int:
    """Prints a file that this command has written. Raises UsageError where it is something else."""
    try:
        data = json.loads(path.read_text())
        results = data["results"]
        say(f"measured on {data['device']}, {data['date']}: {data['command']}")
        say(_columns(_LINE_HEADINGS, _LINE_WIDTHS))
        for result in results:
            say(line(result))
        found = verdicts(results)
        conclude(results, found)
    except BrokenPipeError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__} {error}: expected what this command writes"
        raise UsageError(f"--recorded {path}: {reason}") from None
    return 0 if all_met(found) else 1


def predict(args: argparse.Namespace, asked: Sequence[Point]) -> int:
    """The targets for a GPU that is not attached, from the tables that were predicted for it."""
    target = get_target(args.arch)
    tables = predicted.tables_of(asked, args.tables, target)
    found = predicted.predictions(tables)
    say(f"{target.device_name} ({target.arch}), predicted by the static model; no such GPU took part")
    for shape, table in tables.items():
        if table is None:
            options = f"--arch {args.arch} --head-dim {shape.head_dim} --gqa {shape.gqa} --kv-heads {shape.kv_heads}"
            say(f"D={shape.head_dim} {shape.q_heads}/{shape.kv_heads}: no table: python tune.py {options}")
        else:
            say(predicted.summary(shape, found))
    say("\ntargets (share, or as named)")
    judged = predicted.verdicts(tables, found, target)
    for verdict in judged:
        say(verdict_line(verdict))
    return 0 if all_met(judged) else 1


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tables", type=Path, help="folder with tables and kernels/ (default: where the API looks)")
    made.add_argument("--shapes", help="head dim:query heads:KV heads,... (default: the seven of the grid)")
    made.add_argument("--batches", help="list (default: 1,2,...,128)")
    made.add_argument("--contexts", help="list in tokens (default: 1024,4096,16384,65536,131072)")
    made.add_argument("--formats", default="", help="all, or a list: their share of the limit against 4bit_nc's")
    made.add_argument("--dequant", action="store_true", help="dequantisation too, from 64k rows on")
    made.add_argument("--quick", action="store_true", help="two shapes, 24 points and their ragged batches")
    made.add_argument("--timeout", type=float, default=500.0, help="seconds, after which no race begins (500)")
    made.add_argument("--rounds-s", type=float, default=0.4, help="seconds of interleaved rounds per race (0.4)")
    made.add_argument(
        "--point-s", type=float, default=8.0, help="seconds per race with its preparation (8, first ones 40)"
    )
    made.add_argument("--work", type=Path, default=Path("build/decode_grid"), help="results so far, log")
    made.add_argument("--root", type=Path, default=Path("build"), help="where default configurations are compiled")
    made.add_argument("--json", type=Path, help="where the JSON goes (default: decode_grid.json in --work)")
    made.add_argument("--recorded", type=Path, metavar="FILE", help="print such a JSON file again; measures nothing")
    made.add_argument("--gpu", type=int, default=0)
    made.add_argument("--arch", help="a GPU that is not attached, as sm_121: what its tables predict")
    return made


def _columns(cells: Sequence[str], widths: Sequence[int]) -> str:
    return " ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))


if __name__ == "__main__":
    sys.exit(ended(run, parser()))
