"""A real vLLM engine with our kernels, with vLLM's own, and with an uncompressed cache: same tokens, and how fast.

    python benchmarks/vllm_engine.py --tables build/tables     # everything
    python benchmarks/vllm_engine.py --quick                   # 8 layers, shorter contexts, the first format only
    python benchmarks/vllm_engine.py --prepare sm_90           # no GPU: compiles the default kernels only

Writes a checkpoint of a random Qwen3-like model whose queries and keys are scaled so that attention decides the
tokens, then runs one engine per process: greedy decoding with logprobs (batches, ragged batches, long contexts, prefix
caching, chunked prefill, full CUDA graphs), then the time per decode step. Every finished part is kept in ``--work``
and not repeated: after ``--budget`` seconds it stops, says what it has, and the same command goes on from there. Needs
a GPU, a vLLM that the plugin supports, and nvcc where ``--tables`` has no default kernels.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.command import attached_gpu, ended  # noqa: E402
from benchmarks.engine import plan  # noqa: E402
from benchmarks.engine.compare import accuracy_verdict, damage_verdict, speed_verdict  # noqa: E402
from benchmarks.engine.launch import add_default_kernels, gather_tables, launch, say  # noqa: E402
from benchmarks.engine.model import write_checkpoint  # noqa: E402
from tuner.errors import TunerError, UsageError  # noqa: E402
from tuner.formats import get_format  # noqa: E402

_LEAST_S = 60
"""No engine is started with less time left than this."""
START_UP_LIMIT_S = 2.0


def run_engines(args: argparse.Namespace, formats: list[str]) -> dict[str, dict[str, Any]]:
    """Results by format and kind, of all engines that had time to do anything."""
    arch = attached_gpu(0).arch
    deadline = time.monotonic() + args.budget
    base = plan.base(args.shape, quick=args.quick, compiled=args.compiled, kv_cache_gib=args.kv_cache_gib)
    checkpoint = write_checkpoint(base.model, args.work)
    tables = gather_tables(args.tables, args.work)
    for cache_format in formats:
        try:
            add_default_kernels(tables, args.work, args.shape, cache_format, arch)
        except TunerError as error:
            say(f"no default kernels for {cache_format}: {error}")
    results: dict[str, dict[str, Any]] = {f: {} for f in formats}
    for cache_format in formats:
        for kind in args.kinds.split(","):
            engine = plan.engine_for(base, kind, cache_format)
            if kind == "ours_own_store" and not results[cache_format].get("ours", {}).get("our_store", True):
                say(f"{engine.key}: not run, ours has vLLM's store as well")
                continue
            left = deadline - time.monotonic()
            result = launch(engine, args.work, checkpoint, tables, left) if left > _LEAST_S else None
            if result is None:
                say(f"{engine.key}: not run{'' if left > _LEAST_S else ', no time left'}")
            else:
                results[cache_format][kind] = result
    return results


def report(results: dict[str, dict[str, Any]], shape: str) -> tuple[str, list[str]]:
    """(what was found, in Markdown; what misses its target)."""
    lines, failures = [], []
    for cache_format, by_kind in results.items():
        lines += [f"## {cache_format}, {shape}", ""]
        for kind, result in by_kind.items():
            state = "" if result["complete"] else ", not complete"
            started = f"imports {result['import_s']:.1f} s, engine started in {result['start_s']:.1f} s"
            ours = ""
            if kind == "ours":
                store = "ours" if result["our_store"] else "vLLM's"
                ours = f", of which our kernels {result['plugin_s']:.2f} s; the store is {store}"
            lines.append(f"- {kind}: vLLM {result['vllm']}, {result['device']}: {started}{ours}{state}")
            if kind == "ours" and result["plugin_s"] > START_UP_LIMIT_S:
                took = f"our start-up took {result['plugin_s']:.2f} s"
                failures.append(f"{cache_format}: {took}, expected at most {START_UP_LIMIT_S:g} s")
            if not result["complete"]:
                failures.append(f"{cache_format}: {kind} is not complete")
        verdicts = [accuracy_verdict(by_kind), speed_verdict(by_kind)]
        if "damaged" in by_kind:
            verdicts.append(damage_verdict(by_kind["damaged"], by_kind.get("own")))
        for found, missed in verdicts:
            lines += ["", *found]
            failures += [f"{cache_format}: {m}" for m in missed]
        lines.append("")
    lines += [f"MISSED: {f}" for f in failures] or ["all held"]
    return "\n".join(lines) + "\n", failures


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--work", type=Path, default=Path("build/vllm_engine"), help="checkpoint, logs, results")
    made.add_argument("--tables", type=Path, help="folder with dispatch tables and kernels/")
    made.add_argument("--formats", default="turboquant_4bit_nc,turboquant_k8v4")
    made.add_argument("--shape", default="128:32:8", help="head dim : query heads : KV heads")
    made.add_argument("--kinds", default=",".join(plan.BY_DEFAULT), help=f"of {', '.join(plan.KINDS)}")
    made.add_argument("--budget", type=float, default=3600, help="seconds for all engines together")
    made.add_argument("--kv-cache-gib", type=int, default=0, help="cache of each engine; 0: what vLLM takes")
    made.add_argument("--compiled", action="store_true", help="with torch.compile, as vLLM starts by default")
    made.add_argument("--quick", action="store_true", help="8 layers, shorter contexts, the first format only")
    made.add_argument(
        "--prepare", metavar="ARCH", help="compile default kernels for ARCH into the work folder's tables/, run nothing"
    )
    return made


def run(args: argparse.Namespace) -> int:
    unknown = set(args.kinds.split(",")) - set(plan.KINDS)
    if unknown:
        raise UsageError(f"--kinds {','.join(sorted(unknown))}: expected some of {', '.join(plan.KINDS)}")
    for cache_format in args.formats.split(","):
        get_format(cache_format)
    if not args.prepare:
        attached_gpu(0)
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    formats = args.formats.split(",")[: 1 if args.quick else None]
    if args.prepare:
        tables = gather_tables(args.tables, args.work)
        for cache_format in formats:
            add_default_kernels(tables, args.work, args.shape, cache_format, args.prepare)
        say(f"wrote {tables}")
        return 0
    results = run_engines(args, formats)
    text, failures = report(results, args.shape)
    print("\n" + text, flush=True)
    (args.work / "report.md").write_text(text)
    (args.work / "results.json").write_text(json.dumps(results))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(ended(run, parser()))
