"""Dequantisation of one decode step: every row of every request, or only the rows that the step wrote.

    python benchmarks/incremental.py            # a minute or two
    python benchmarks/incremental.py --quick    # about 10 seconds on an H100

Both write the same image of the cache (bf16 keys and values, a block at its id) with the same kernel, the table's or
the default one: *full* reads the block table and all lengths, *incremental* the slots of the step's new tokens, one
per request. Before and after timing, the rows that incremental wrote are held against full, bit by bit. Both are CUDA
graphs of one call, L2 flushed before each replay, in shuffled interleaved rounds; medians. The ratio's interval is
the bootstrap's 95% of the paired ratio. Everything goes to a JSON file as well.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tuner  # noqa: E402
from benchmarks.command import attached_gpu, ended, write_record  # noqa: E402
from tuner.errors import TunerError  # noqa: E402
from tuner.formats import slot_layout  # noqa: E402
from tuner.kernels import Tables  # noqa: E402
from tuner.measure.samples import paired_ratio  # noqa: E402
from tuner.measure.timer import Timer  # noqa: E402
from tuner.reference import Case, bulk_case  # noqa: E402
from tuner.search.provenance import driver_of  # noqa: E402

SHAPES = ((128, 8, 16), (256, 2, 16), (256, 2, 4176))
"""Head dim, KV heads, block size; the last as hybrid models with state-space layers have it."""
FORMATS = ("turboquant_4bit_nc", "turboquant_seed")
BATCHES = (1, 8, 32, 128)
CONTEXTS = (1024, 8192, 32768)
_MEMORY_SHARE = 0.6
"""Of the free device memory, what a point may take: cache, image and the image that it is checked against."""


@dataclass(frozen=True)
class Row:
    """One point; times in us. ``ratio``: full over incremental, with its interval."""

    head_dim: int
    kv_heads: int
    block_size: int
    cache_format: str
    batch: int
    context: int
    full_us: float
    incremental_us: float
    ratio: float
    ratio_low: float
    ratio_high: float


@dataclass(frozen=True)
class Step:
    """One decode step after its store: what is in the cache, and the slots that it wrote."""

    case: Case
    slots: torch.Tensor

    @staticmethod
    def of(head_dim: int, kv_heads: int, block_size: int, cache_format: str, batch: int, context: int) -> Step:
        layout = slot_layout(cache_format, head_dim)
        # Live last blocks: lengths differ by request and end inside a block.
        lengths = [context - 3 * (b % 5) - 1 for b in range(batch)]
        case = bulk_case(layout, lengths, q_heads=kv_heads, kv_heads=kv_heads, block_size=block_size, device="cuda")
        last = case.seq_lens.long() - 1
        pages = case.block_table.long().gather(1, (last // block_size)[:, None])[:, 0]
        return Step(case, pages * block_size + last % block_size)

    def dequantize(self, image: torch.Tensor, tables: Tables, *, full: bool) -> None:
        """Into ``image``, bf16 [2, blocks, block_size, Hk, D]."""
        case = self.case
        key, value = image
        what = {"block_table": case.block_table, "seq_lens": case.seq_lens} if full else {"dirty": self.slots}
        tuner.dequantize(
            case.kv_cache,
            **what,
            cache_format=case.layout.format.name,
            head_dim=case.layout.head_dim,
            by_block_id=True,
            tables=tables,
            out=(key, value),
        )

    def new_image(self) -> torch.Tensor:
        case = self.case
        shape = (2, case.kv_cache.shape[0], case.block_size, case.kv_heads, case.layout.head_dim)
        return torch.zeros(shape, dtype=torch.bfloat16, device="cuda")

    def check(self, image: torch.Tensor, full: torch.Tensor, tables: Tables) -> None:
        """Raises TunerError unless incremental writes what full writes there. Zeroes ``image`` first."""
        image.zero_()
        self.dequantize(image, tables, full=False)
        self.dequantize(full, tables, full=True)
        block, row = self.slots // self.case.block_size, self.slots % self.case.block_size
        got, want = image[:, block, row].view(torch.int16), full[:, block, row].view(torch.int16)
        if not torch.equal(got, want) or not bool(got.any(-1).all()):
            raise TunerError("incremental and full dequantisation differ: the times would mean nothing")


Point = tuple[int, int, int, str, int, int]
"""Head dim, KV heads, block size, format, batch, context."""


def points(batches: tuple[int, ...], contexts: tuple[int, ...]) -> Iterator[Point]:
    """Those that fit the device."""
    free = torch.cuda.mem_get_info()[0]
    for head_dim, kv_heads, block_size in SHAPES:
        for cache_format in FORMATS:
            for batch in batches:
                for context in contexts:
                    slots = batch * -(-context // block_size) * block_size * kv_heads
                    images = 2 * slots * 2 * head_dim * 2
                    if images + slots * slot_layout(cache_format, head_dim).token_bytes <= _MEMORY_SHARE * free:
                        yield head_dim, kv_heads, block_size, cache_format, batch, context


def measure(timer: Timer, tables: Tables, point: Point, rounds_s: float) -> Row:
    step = Step.of(*point)
    image, other = step.new_image(), step.new_image()
    step.check(image, other, tables)
    replays = {
        "full": timer.capture(lambda: step.dequantize(image, tables, full=True)),
        "incremental": timer.capture(lambda: step.dequantize(image, tables, full=False)),
    }
    rounds, samples = timer.race(replays, rounds_s)
    step.check(image, other, tables)
    ratio, low, high = paired_ratio(rounds["full"], rounds["incremental"])
    return Row(*point, samples["full"].median_us, samples["incremental"].median_us, ratio, low, high)


def run(args: argparse.Namespace) -> int:
    device = attached_gpu(0).device_name
    batches, contexts = ((8, 128), (1024, 8192)) if args.quick else (BATCHES, CONTEXTS)
    print(f"{device}: measured, us; full over incremental with its 95% interval")
    print("   D  Hk block format               batch context      full   incr.   ratio")
    timer, tables = Timer(), tuner.load_tables()
    rows = []
    for point in points(batches, contexts):
        row = measure(timer, tables, point, args.rounds_s)
        rows.append(row)
        print(
            f"{row.head_dim:>4} {row.kv_heads:>3} {row.block_size:>5} {row.cache_format:<20} {row.batch:>5} "
            f"{row.context:>7} {row.full_us:>9.1f} {row.incremental_us:>7.1f} {row.ratio:>7.1f} "
            f"[{row.ratio_low:.1f}, {row.ratio_high:.1f}]",
            flush=True,
        )
    write_record(args.json, device, driver_of(0), {"rows": [asdict(row) for row in rows]})
    print(f"written: {args.json}")
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="two batches, two contexts")
    made.add_argument("--rounds-s", type=float, default=1.0, metavar="S", help="seconds of rounds per point (1)")
    made.add_argument("--json", type=Path, default=Path("build/incremental.json"), help="where the JSON goes")
    return made


if __name__ == "__main__":
    sys.exit(ended(run, parser()))
