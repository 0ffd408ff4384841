"""The layout study: warps per CTA x head/token/dim splits x rows in flight, measured or predicted.

On the attached GPU every layout passes the correctness gate and is timed at four buckets; without one, or with --arch
of another, its time is predicted by the static model. Data and plots go to docs/layout-study/, and
docs/layout-study.md is written anew from all data there. --timeout bounds the whole command: what it leaves no time
for is not in the data, which says how many layouts were tried.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.command import ended  # noqa: E402
from benchmarks.layouts.document import document, name, plots  # noqa: E402
from benchmarks.layouts.run import Study, study  # noqa: E402
from tuner.errors import TunerError, UsageError  # noqa: E402
from tuner.formats import check_head_dim  # noqa: E402

FIRST_SECTION = "## decode, "
"""Beginning of the first section after the overview: conclusions stand before it."""


def render(folder: Path) -> Path:
    """Plots beside the data in ``folder``, the page beside the folder. Raises TunerError for data that is none."""
    studies: list[Study] = []
    for path in sorted(folder.glob("*.json")):
        try:
            studies.append(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            raise TunerError(f"cannot read {path}: {error}") from None
    images = {}
    for found in studies:
        files = plots(found)
        for file, text in files.items():
            (folder / file).write_text(text)
        images[name(found)] = [f"{folder.name}/{file}" for file in files]
    page = folder.with_suffix(".md")
    kept = written_by_hand(page.read_text()) if page.is_file() else ""
    before, heading, after = document(studies, images).partition(FIRST_SECTION)
    page.write_text(before + kept + heading + after)
    return page


def written_by_hand(page: str) -> str:
    """The section "Conclusions" of a page that is there, which no data says; empty where it has none."""
    _, heading, rest = page.partition("## Conclusions\n")
    return heading + rest.partition("\n## ")[0] + "\n" if heading else ""


def run(args: argparse.Namespace) -> int:
    ops = args.op.split(",")
    unknown = [op for op in ops if op not in ("decode", "dequant")]
    if unknown:
        raise UsageError(f"--op is {unknown[0]!r}: expected decode, dequant or both")
    try:
        head_dims = [check_head_dim(int(d)) for d in args.head_dim.split(",")]
    except ValueError:
        raise UsageError(f"--head-dim is {args.head_dim!r}: expected a list, as 128,256,512") from None
    args.data.mkdir(parents=True, exist_ok=True)
    if not args.render:
        from tuner.cli.options import read_target

        target, evidence = read_target(args.arch, args.gpu)
        deadline = time.monotonic() + args.timeout
        problems = [(op, d) for op in ops for d in head_dims]
        for i, (op, head_dim) in enumerate(problems):
            left_s = (deadline - time.monotonic()) / (len(problems) - i)
            found = study(op, head_dim, target, evidence, left_s, args.root, args.gpu, say)
            (args.data / f"{name(found)}.json").write_text(json.dumps(found, indent=1) + "\n")
    say(f"wrote {render(args.data)}")
    return 0


def say(text: str) -> None:
    print(text, flush=True)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--op", default="decode,dequant", help="decode, dequant or both (default)")
    made.add_argument("--head-dim", default="128,256,512", help="list (default: 128,256,512)")
    made.add_argument("--arch", help="target (default: the attached GPU's, else sm_121)")
    made.add_argument("--timeout", type=float, default=150.0, help="seconds for all, in equal shares (150)")
    made.add_argument("--data", type=Path, default=ROOT / "docs" / "layout-study", help="folder of data and plots")
    made.add_argument("--root", type=Path, default=Path("build"), help="where kernels are compiled")
    made.add_argument("--gpu", type=int, default=0)
    made.add_argument("--render", action="store_true", help="only plots and page, from the data that is there")
    return made


if __name__ == "__main__":
    sys.exit(ended(run, parser()))
