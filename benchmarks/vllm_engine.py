"""A real vLLM engine with our kernels, with vLLM's own, and with an uncompressed cache: same tokens, and how fast.

    python benchmarks/vllm_engine.py --tables build/tables            # everything, under an hour on an H200
    python benchmarks/vllm_engine.py --quick                          # minutes; default kernels where there is no table

Writes a checkpoint of a random Qwen3-like model whose queries and keys are scaled so that attention decides the
tokens, then runs one engine per process: greedy decoding with logprobs (batches, ragged batches, long contexts,
prefix caching, chunked prefill, full CUDA graphs) and decode throughput. Results of finished engines are kept in
``--work`` and not repeated, so an interrupted run goes on where it stopped. Needs a GPU, a vLLM that the plugin
supports, and nvcc where no prebuilt default kernels are in ``--tables``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 8192
TOKENS = 64
DECODE_TOKENS = 128
REPETITIONS = 3
LOGPROB_SLACK = 0.02
"""Logprob difference allowed beyond that between two runs of vLLM's own kernel."""


@dataclass(frozen=True)
class Model:
    """The random model. ``sharpness``: standard deviation of the scores before softmax."""

    head_dim: int = 128
    q_heads: int = 32
    kv_heads: int = 8
    layers: int = 28
    hidden: int = 2048
    intermediate: int = 2048
    sharpness: float = 1.5
    max_length: int = 33280


@dataclass(frozen=True)
class Engine:
    """One engine run. ``kind``: ours, own (vLLM's kernel), own_other_splits (the same, rounding differently), bf16,
    ours_speculative."""

    kind: str
    cache_format: str
    model: Model
    accuracy: tuple[tuple[int, ...], ...]
    speed: tuple[tuple[int, int], ...]
    max_batch: int

    @property
    def key(self) -> str:
        digest = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:10]
        return f"{self.kind}-{self.cache_format}-d{self.model.head_dim}-{digest}"


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


def write_checkpoint(model: Model, work: Path) -> Path:
    """A Qwen3 checkpoint with weights of real size; kept if it is there."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3Config

    digest = hashlib.sha256(json.dumps(asdict(model)).encode()).hexdigest()[:10]
    folder = work / f"model-{digest}"
    if (folder / "model.safetensors").is_file():
        return folder
    say(f"writing {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=model.layers,
        num_attention_heads=model.q_heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=model.max_length + 1024,
        tie_word_embeddings=False,
        architectures=["Qwen3ForCausalLM"],
        torch_dtype="bfloat16",
    ).save_pretrained(folder)
    torch.manual_seed(0)

    def normal(rows: int, columns: int, gain: float) -> torch.Tensor:
        return (torch.randn(rows, columns) * gain * columns**-0.5).bfloat16()

    # Per-head RMS norms make |q| = |k| = sqrt(D) times their weights, so scores have the product's standard deviation.
    norm = torch.full((model.head_dim,), model.sharpness**0.5).bfloat16()
    ones = torch.ones(model.hidden).bfloat16()
    q_size, kv_size = model.q_heads * model.head_dim, model.kv_heads * model.head_dim
    # What attention writes decides the next token, yet rounding grows little from layer to layer: with these gains a
    # bf16 run departs from an fp32 one by some 0.02 in logprob, while two prompts depart from each other by 2.
    output_gain = 1.7 * model.layers**-0.5
    weights = {
        "model.embed_tokens.weight": (torch.randn(VOCABULARY, model.hidden)).bfloat16(),
        "model.norm.weight": ones,
        "lm_head.weight": normal(VOCABULARY, model.hidden, 3.0),
    }
    for i in range(model.layers):
        p = f"model.layers.{i}."
        weights |= {
            p + "input_layernorm.weight": ones.clone(),
            p + "post_attention_layernorm.weight": ones.clone(),
            p + "self_attn.q_norm.weight": norm.clone(),
            p + "self_attn.k_norm.weight": norm.clone(),
            p + "self_attn.q_proj.weight": normal(q_size, model.hidden, 1.0),
            p + "self_attn.k_proj.weight": normal(kv_size, model.hidden, 1.0),
            p + "self_attn.v_proj.weight": normal(kv_size, model.hidden, 1.0),
            p + "self_attn.o_proj.weight": normal(model.hidden, q_size, output_gain),
            p + "mlp.gate_proj.weight": normal(model.intermediate, model.hidden, 1.0),
            p + "mlp.up_proj.weight": normal(model.intermediate, model.hidden, 1.0),
            p + "mlp.down_proj.weight": normal(model.hidden, model.intermediate, 0.1),
        }
    save_file(weights, folder / "writing.safetensors", metadata={"format": "pt"})
    os.replace(folder / "writing.safetensors", folder / "model.safetensors")
    return folder


def prompts(lengths: tuple[int, ...], seed: int) -> list[list[int]]:
    """Random token ids; every prompt ends in the same 16 tokens, so that only attention can tell them apart."""
    draw = random.Random(seed)
    ending = [draw.randrange(VOCABULARY) for _ in range(16)]
    return [[draw.randrange(VOCABULARY) for _ in range(n - 16)] + ending for n in lengths]


def run_engine(engine: Engine, checkpoint: Path, out: Path) -> None:
    """In a process of its own: runs one engine and writes its results to ``out``."""
    import torch
    import vllm
    from vllm import LLM, SamplingParams

    sizes = sorted({s for s in (1, 2, 4, 8, 16, 32, 64) if s <= engine.max_batch} | {engine.max_batch})
    options: dict[str, Any] = {}
    if engine.kind == "own_other_splits":
        options["attention_config"] = {"tq_max_kv_splits_for_cuda_graph": 24}
    if engine.kind == "ours_speculative":
        options["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        }
    start = time.perf_counter()
    llm = LLM(
        model=str(checkpoint),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        kv_cache_dtype=engine.cache_format if engine.kind != "bf16" else "auto",
        max_model_len=engine.model.max_length,
        max_num_seqs=engine.max_batch,
        max_num_batched_tokens=8192,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        gpu_memory_utilization=0.85,
        seed=0,
        compilation_config={"cudagraph_mode": "FULL_AND_PIECEWISE", "cudagraph_capture_sizes": sizes},
        **options,
    )
    result: dict[str, Any] = {
        "engine": asdict(engine),
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
        "start_s": time.perf_counter() - start,
        "accuracy": [],
        "speed": [],
    }

    def generate(ids: list[list[int]], tokens: int, logprobs: int | None = None) -> tuple[float, list[Any]]:
        params = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=logprobs, detokenize=False
        )
        torch.cuda.synchronize()
        begin = time.perf_counter()
        done = llm.generate([{"prompt_token_ids": p} for p in ids], params, use_tqdm=False)
        return time.perf_counter() - begin, [d.outputs[0] for d in done]

    for number, lengths in enumerate(engine.accuracy):
        for attempt in ("computed", "prefix cached"):
            seconds, outputs = generate(prompts(lengths, number), TOKENS, logprobs=1)
            say(f"{engine.key}: {len(lengths)} requests of up to {max(lengths)}, {attempt}: {seconds:.1f} s")
            tokens = [list(o.token_ids) for o in outputs]
            chosen = [[s[t].logprob for s, t in zip(o.logprobs, o.token_ids, strict=True)] for o in outputs]
            result["accuracy"].append({"lengths": lengths, "attempt": attempt, "tokens": tokens, "logprobs": chosen})
    for batch, context in engine.speed:
        ids = prompts((context,) * batch, 1000 + batch)
        generate(ids, 1)  # fills the prefix cache, so that what is timed below is decoding
        times: list[float] = []
        for _ in range(REPETITIONS):
            short, _ = generate(ids, 1)
            long, _ = generate(ids, 1 + DECODE_TOKENS)
            times.append(long - short)
        step_ms = 1000 * statistics.median(times) / DECODE_TOKENS
        say(f"{engine.key}: batch {batch} x {context}: {step_ms:.2f} ms per step")
        spread = [1000 * s / DECODE_TOKENS for s in times]
        result["speed"].append({"batch": batch, "context": context, "step_ms": step_ms, "all_ms": spread})
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(result))
    os.replace(partial, out)


def environment(engine: Engine, tables: Path, work: Path) -> dict[str, str]:
    """Of the child: ours with the tables, everything else without the plugin."""
    env = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_TUNED_CONFIG_FOLDER": str(tables),
        "WPH_LOG": "debug",
    }
    env.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    env.pop("WPH_DISABLE", None)
    if not engine.kind.startswith("ours"):
        env["WPH_DISABLE"] = "1"
    path = [str(ROOT), *([str(entry_point(work))] if not installed() else []), os.environ.get("PYTHONPATH", "")]
    return env | {"PYTHONPATH": os.pathsep.join(p for p in path if p)}


def installed() -> bool:
    from importlib import metadata

    return any(p.name == "wph" for p in metadata.entry_points(group="vllm.general_plugins"))


def entry_point(work: Path) -> Path:
    """A folder with what pip would write for this checkout, so that vLLM discovers the plugin in it."""
    info = work / "site" / "wph_tuner-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: wph-tuner\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nwph = tuner.vllm.plugin:register\n")
    return info.parent


def gather_tables(source: Path | None, work: Path, model: Model, formats: list[str]) -> Path:
    """``source``'s tables and default kernels in one folder; missing defaults are compiled."""
    sys.path.insert(0, str(ROOT))
    import torch

    from tuner.space import Problem
    from tuner.vllm import defaults

    folder = work / "tables"
    if source is not None:
        shutil.copytree(source, folder, dirs_exist_ok=True)
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    for cache_format in formats:
        problem = Problem("decode", model.head_dim, model.q_heads // model.kv_heads, cache_format)
        if not (folder / defaults.file_name(problem, arch)).is_file():
            try:
                for made in defaults.build_defaults([problem], arch, work / "build"):
                    defaults.write(made, folder)
            except Exception as error:
                say(f"no default kernels for {cache_format}: {error}")
    return folder


def launch(engine: Engine, args: argparse.Namespace, checkpoint: Path, tables: Path) -> dict[str, Any] | None:
    """The engine's results, from the work folder or from a new process; None where it failed."""
    out = args.work / f"{engine.key}.json"
    log = out.with_suffix(".log")
    if not out.is_file():
        spec = out.with_suffix(".spec")
        spec.write_text(json.dumps(asdict(engine)))
        command = [sys.executable, __file__, "--child", str(spec), "--checkpoint", str(checkpoint), "--out", str(out)]
        say(f"{engine.key}: starting, log in {log}")
        with log.open("w") as file:
            env = environment(engine, tables, args.work)
            child = subprocess.Popen(command, stdout=file, stderr=file, env=env, start_new_session=True)
            try:
                child.wait(args.timeout)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                say(f"{engine.key}: killed after {args.timeout} s")
    text = log.read_text(errors="replace") if log.is_file() else ""
    for line in dict.fromkeys(part for part in text.splitlines() if "wph:" in part and ": batch " not in part):
        say(f"  {line[line.index('wph:') :]}")
    if not out.is_file():
        say(f"{engine.key}: failed; the log ends with\n" + "\n".join(text.splitlines()[-25:]))
        return None
    result: dict[str, Any] = json.loads(out.read_text())
    result["used_ours"] = "in a graph: " in text and "runs from here on" not in text
    return result


def compare(name: str, a: dict[str, Any], b: dict[str, Any]) -> dict[str, float]:
    """How far two engines agree: share of equal sequences, first difference, logprobs up to there."""
    equal = total = tokens = 0
    differences = []
    for left, right in zip(a["accuracy"], b["accuracy"], strict=True):
        for t, u, p, q in zip(left["tokens"], right["tokens"], left["logprobs"], right["logprobs"], strict=True):
            same = next((i for i, (x, y) in enumerate(zip(t, u, strict=True)) if x != y), len(t))
            total, equal, tokens = total + 1, equal + (same == len(t)), tokens + same
            differences += [abs(x - y) for x, y in zip(p[:same], q[:same], strict=True)]
    differences.sort()
    facts = {
        "sequences": total,
        "equal": equal / total,
        "equal_tokens": tokens / (total * TOKENS),
        "median_logprob": statistics.median(differences) if differences else float("nan"),
        "p99_logprob": differences[int(0.99 * (len(differences) - 1))] if differences else float("nan"),
    }
    say(f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in facts.items()))
    return facts


def control(result: dict[str, Any]) -> bool:
    """Prompts that share their last tokens must continue differently, else attention does not decide."""
    sets = [entry["tokens"] for entry in result["accuracy"] if len(entry["tokens"]) > 1]
    distinct = [len({tuple(t[:8]) for t in tokens}) / len(tokens) for tokens in sets]
    return bool(distinct) and min(distinct) > 0.9


def accuracy_verdict(results: dict[str, dict[str, Any]]) -> list[str]:
    """Failures of the comparison of ours with vLLM's kernel, against vLLM's kernel with itself."""
    ours, own, other = (results.get(k) for k in ("ours", "own", "own_other_splits"))
    if not (ours and own and other):
        return ["an engine is missing: tokens not compared"]
    failures = [] if control(own) else ["attention does not decide the tokens: equal tokens would prove nothing"]
    if not ours["used_ours"]:
        failures.append("our kernels did not run in the engine that should use them")
    itself = compare("vLLM's kernel with itself (32 and 24 splits)", own, other)
    with_ours = compare("ours with vLLM's kernel", ours, own)
    if with_ours["equal_tokens"] < 0.9 * itself["equal_tokens"]:
        failures.append("ours departs from vLLM's tokens earlier than vLLM's kernel departs from itself")
    if with_ours["p99_logprob"] > 2 * itself["p99_logprob"] + LOGPROB_SLACK:
        failures.append("logprobs differ by more than vLLM's kernel differs from itself")
    if results.get("ours_speculative"):
        compare("ours with speculative decoding", results["ours_speculative"], ours)
    return failures


def speed_report(results: dict[str, dict[str, Any]]) -> list[str]:
    """Prints the table; returns what misses: 2 x vLLM's kernel, and bf16 at 16k and more."""
    rows = {k: {(s["batch"], s["context"]): s["step_ms"] for s in r["speed"]} for k, r in results.items()}
    failures = []
    print("\n| batch | context | ours ms | vLLM's ms | bf16 ms | ours / vLLM's | ours / bf16 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for bucket, ours in rows.get("ours", {}).items():
        own, bf16 = rows.get("own", {}).get(bucket), rows.get("bf16", {}).get(bucket)
        ratios = [f"{x / ours:.2f} x" if x else "-" for x in (own, bf16)]
        times = [f"{x:.2f}" if x else "-" for x in (ours, own, bf16)]
        print(f"| {bucket[0]} | {bucket[1]} | {' | '.join([*times, *ratios])} |")
        if own and own < 2 * ours and bucket[1] >= 16384:
            failures.append(f"batch {bucket[0]} x {bucket[1]}: {own / ours:.2f} x vLLM's throughput, expected 2")
        if bf16 and bf16 < ours and bucket[1] >= 16384:
            failures.append(f"batch {bucket[0]} x {bucket[1]}: {bf16 / ours:.2f} x bf16's throughput, expected 1")
    print()
    return failures


def plan(args: argparse.Namespace) -> Engine:
    """What every engine does, before its kind and format are filled in."""
    head_dim, q_heads, kv_heads = map(int, args.shape.split(":"))
    model = Model(head_dim=head_dim, q_heads=q_heads, kv_heads=kv_heads)
    ragged = (17, 64, 129, 300, 511, 900, 1500, 2600, 4097, 5000, 7000, 9000, 12345)
    if args.quick:
        model = replace(model, layers=8, max_length=17408)
        return Engine("", "", model, ((2048,), (512,) * 8, ragged), ((1, 16384), (8, 16384)), 16)
    accuracy = ((512,), (32640,), (8192,) * 4, (32640,) * 8, (2048,) * 32, ragged)
    speed = ((1, 4096), (1, 32640), (8, 4096), (8, 16384), (8, 32640), (32, 4096), (32, 16384))
    return Engine("", "", model, accuracy, speed, 32)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/vllm_engine"), help="checkpoint, logs, results")
    parser.add_argument("--tables", type=Path, help="folder with dispatch tables and kernels/")
    parser.add_argument("--formats", default="turboquant_4bit_nc,turboquant_k8v4")
    parser.add_argument("--shape", default="128:32:8", help="head dim : query heads : KV heads")
    parser.add_argument("--kinds", default="ours,own,own_other_splits,bf16,ours_speculative")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds per engine")
    parser.add_argument("--quick", action="store_true", help="8 layers, shorter contexts, the first format only")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        spec = json.loads(args.child.read_text())
        accuracy = tuple(map(tuple, spec["accuracy"]))
        spec |= {"model": Model(**spec["model"]), "accuracy": accuracy, "speed": tuple(map(tuple, spec["speed"]))}
        run_engine(Engine(**spec), args.checkpoint, args.out)
        return 0
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    base = plan(args)
    formats = args.formats.split(",")[: 1 if args.quick else None]
    checkpoint = write_checkpoint(base.model, args.work)
    tables = gather_tables(args.tables, args.work, base.model, formats)
    failures: list[str] = []
    bf16 = None
    for cache_format in formats:
        results: dict[str, dict[str, Any]] = {}
        for kind in args.kinds.split(","):
            shared = kind == "bf16"
            engine = replace(base, kind=kind, cache_format="auto" if shared else cache_format)
            if kind != "ours" and kind != "own":
                engine = replace(engine, speed=base.speed if shared else ())
            if shared:
                engine = replace(engine, accuracy=())
            result = bf16 if shared and bf16 else launch(engine, args, checkpoint, tables)
            if result is None:
                failures.append(f"{engine.key} failed")
                continue
            results[kind] = result
            bf16 = result if shared else bf16
        say(f"== {cache_format}, shape {args.shape}")
        failures += [f"{cache_format}: {f}" for f in (*accuracy_verdict(results), *speed_report(results))]
    for failure in failures:
        say(f"MISSED: {failure}")
    say("all held" if not failures else f"{len(failures)} missed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
