"""Data races in the tables' kernels, looked for on the CPU: no GPU is needed.

    python benchmarks/races.py                          # the package's tables, eight minutes
    python benchmarks/races.py --tables build/tables
    python benchmarks/races.py --ops dequant,store      # the package's, half a minute

Every kernel runs twice in the emulator under the thread sanitizer, with two CTAs at a time and with one: of decode
attention over requests of 0 to 300 tokens in ten splits, of dequantisation over the same requests and over what a step
stored, of the store over 70 tokens. Ends with 1 where a race is found.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.command import ended  # noqa: E402
from tests.emulated import emulate_decode, emulate_dequant, emulate_store  # noqa: E402
from tuner.check_store import store_case  # noqa: E402
from tuner.emulate import EmulationError  # noqa: E402
from tuner.errors import UsageError  # noqa: E402
from tuner.reference import synthetic_cache  # noqa: E402
from tuner.space import Config  # noqa: E402
from tuner.space.plan import DecodePlan  # noqa: E402
from tuner.table import read  # noqa: E402
from tuner.table.install import TABLE_PATTERN  # noqa: E402
from tuner.table.store import PACKAGE_TABLES  # noqa: E402

LENGTHS, SPLITS, STORED = (0, 1, 300, 17), 10, 70
RUNS = ((1, 2), (2, 1))
"""Seed of the order of lanes, CTAs at a time."""


def decode(config: Config, kv_heads: int, **options: Any) -> None:
    heads = kv_heads if DecodePlan(config).bulk else 2  # bulk copies want whole heads and aligned tokens
    problem = config.problem
    case = synthetic_cache(problem.layout, LENGTHS, q_heads=problem.gqa * heads, kv_heads=heads)
    emulate_decode(config, case, SPLITS, **options)


def dequant(config: Config, kv_heads: int, **options: Any) -> None:
    case = synthetic_cache(config.problem.layout, LENGTHS, q_heads=kv_heads, kv_heads=kv_heads)
    shape = (case.block_table.numel(), case.block_size, kv_heads, config.problem.head_dim)
    key, value = (torch.empty(shape, dtype=torch.bfloat16) for _ in range(2))
    rows = {"block_table": case.block_table, "seq_lens": case.seq_lens}
    emulate_dequant(config, case.codec, case.kv_cache, key, value, **rows, **options)
    image = torch.empty(2, case.kv_cache.shape[0], *shape[1:], dtype=torch.bfloat16)
    dirty = torch.tensor([3, -1, 17, 18, 19, 2 * case.block_size - 1])
    emulate_dequant(config, case.codec, case.kv_cache, *image, dirty=dirty, **options)


def store(config: Config, kv_heads: int, **options: Any) -> None:
    case = store_case(config.problem, STORED, kv_heads=kv_heads)
    emulate_store(config, case.before.clone(), case, **options)


OPS = {"decode": decode, "dequant": dequant, "store": store}


def race(config: Config, kv_heads: int, root: Path) -> str | None:
    """What the emulator finds in a kernel, None where that is nothing."""
    try:
        for seed, ctas in RUNS:
            OPS[config.problem.op](config, kv_heads, seed=seed, concurrent_ctas=ctas, races=True, root=root)
    except EmulationError as error:
        return str(error)
    return None


def run(args: argparse.Namespace) -> int:
    ops = args.ops.split(",")
    unknown = [op for op in ops if op not in OPS]
    if unknown:
        raise UsageError(f"--ops names {unknown[0]!r}: expected some of {', '.join(OPS)}")
    clean = found = 0
    for path in sorted(args.tables.glob(TABLE_PATTERN)):
        table = read(path, cubins=False)
        p = table.problem
        for kernel in table.kernels if p.op in ops else ():
            said = race(kernel.config(p), table.kv_heads, args.root)
            clean, found = clean + (said is None), found + (said is not None)
            print(f"{p.op} D={p.head_dim} group {p.gqa} {p.cache_format} {kernel.id}: {said or 'no race'}", flush=True)
    print(f"{clean} without a race, {found} with one")
    return 1 if found else 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tables", type=Path, default=PACKAGE_TABLES, help="folder of tables (the package's)")
    made.add_argument("--ops", default=",".join(OPS), help=f"list (default: {','.join(OPS)})")
    made.add_argument("--root", type=Path, default=Path("build/emulate"), help="where emulated kernels are compiled")
    return made


if __name__ == "__main__":
    sys.exit(ended(run, parser()))
