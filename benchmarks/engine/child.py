"""One engine in a process of its own: runs what its plan says and keeps every finished part on disk."""

from __future__ import annotations

import json
import os
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.engine.model import beginnings, prompts
from benchmarks.engine.plan import TOKENS, Engine

PROGRESS_FD = "WPH_ENGINE_PROGRESS_FD"
"""Names the file descriptor of the parent's output: vLLM's log has standard output to itself."""
DECODE_TOKENS = 64
REPETITIONS = 3
_TOP = 5
"""Logprobs kept per token: of the chosen one and the next best, among which another run's choice should be."""


def tell(text: str) -> None:
    line = f"{time.strftime('%H:%M:%S')}   {text}\n"
    os.write(int(os.environ.get(PROGRESS_FD, "1")), line.encode())


class Record:
    """Results on disk, whole after every part; a later run of the same engine goes on behind them."""

    def __init__(self, path: Path, engine: Engine) -> None:
        self.path = path
        self.data: dict[str, Any] = {"engine": asdict(engine), "accuracy": [], "speed": [], "complete": False}
        if path.is_file():
            self.data = json.loads(path.read_text())

    def save(self) -> None:
        partial = self.path.with_suffix(".writing")
        partial.write_text(json.dumps(self.data))
        os.replace(partial, self.path)

    def has(self, part: str, **facts: Any) -> bool:
        return any(all(entry[k] == v for k, v in facts.items()) for entry in self.data[part])

    def add(self, part: str, entry: dict[str, Any]) -> None:
        self.data[part].append(entry)
        self.save()


class Running:
    """A started engine."""

    def __init__(self, engine: Engine, checkpoint: Path, record: Record) -> None:
        start = time.perf_counter()
        import torch
        import vllm

        imported = time.perf_counter()
        self.engine, self.record = engine, record
        self.llm = vllm.LLM(model=str(checkpoint), **engine.options())
        self._sampling = vllm.SamplingParams
        started = {"import_s": imported - start, "start_s": time.perf_counter() - imported}
        record.data |= {"vllm": vllm.__version__, "torch": torch.__version__, "device": torch.cuda.get_device_name()}
        record.data |= started
        record.save()
        tell(f"imports {started['import_s']:.1f} s, engine {started['start_s']:.1f} s")

    def generate(self, ids: list[list[int]], tokens: int, logprobs: int | None = None) -> tuple[float, list[Any]]:
        """Wall time in s, and one completion per prompt."""
        params = self._sampling(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=logprobs, detokenize=False
        )
        begin = time.perf_counter()
        done = self.llm.generate([{"prompt_token_ids": p} for p in ids], params, use_tqdm=False)
        return time.perf_counter() - begin, [d.outputs[0] for d in done]

    def accuracy(self, number: int, attempt: str) -> None:
        """Greedy tokens of one set of prompts, each with its logprob and those of the next best."""
        lengths = self.engine.accuracy[number]
        seconds, outputs = self.generate(prompts(lengths, number), TOKENS, logprobs=_TOP)
        top = [
            [
                sorted(((t, p.logprob) for t, p in step.items()), key=lambda pair: (pair[0] != token, -pair[1]))[:_TOP]
                for step, token in zip(o.logprobs, o.token_ids, strict=True)
            ]
            for o in outputs
        ]
        self.record.add("accuracy", {"set": number, "lengths": lengths, "attempt": attempt, "top": top, "s": seconds})
        tell(f"{len(lengths)} requests of up to {max(lengths)} tokens, {attempt}: {seconds:.1f} s")

    def speed(self, batch: int, context: int) -> None:
        """Time per decode step: longer generations less those of one token, both with the prompts in the cache."""
        ids = beginnings(batch, context)
        filling, _ = self.generate(ids, 1)
        steps_ms = []
        for _ in range(REPETITIONS):
            short, _ = self.generate(ids, 1)
            long, _ = self.generate(ids, 1 + DECODE_TOKENS)
            steps_ms.append(1000 * (long - short) / DECODE_TOKENS)
        entry = {"batch": batch, "context": context, "step_ms": statistics.median(steps_ms), "all_ms": steps_ms}
        self.record.add("speed", entry)
        tell(f"batch {batch} x {context}: {entry['step_ms']:.2f} ms per step (prompts computed in {filling:.1f} s)")


def attempts(kind: str) -> tuple[str, ...]:
    """How often each set runs: vLLM's own kernel a second time from nothing, to know it from itself."""
    return ("computed", "prefix cached", "computed again") if kind == "own" else ("computed", "prefix cached")


def run(engine: Engine, checkpoint: Path, out: Path) -> None:
    """Does what is still missing in ``out``."""
    record = Record(out, engine)
    running = Running(engine, checkpoint, record)
    for number, lengths in enumerate(engine.accuracy):
        missing = [a for a in attempts(engine.kind) if not record.has("accuracy", set=number, attempt=a)]
        if missing[:1] == ["prefix cached"]:  # computed by an earlier process, so this cache does not have it yet
            running.generate(prompts(lengths, number), 1)
        for attempt in missing:
            if attempt == "computed again" and not running.llm.reset_prefix_cache():
                tell("vLLM did not empty its prefix cache: nothing is computed a second time")
                continue
            running.accuracy(number, attempt)
    running.llm.reset_prefix_cache()
    for batch, context in engine.speed:
        if not record.has("speed", batch=batch, context=context):
            running.speed(batch, context)
    record.data["complete"] = True
    record.save()
