"""The child process: owns the GPU, compiles nothing, answers one JSON line per request.

``python -m tuner.measure.child --device=0``. After a CUDA error the context is lost: the child says so and ends.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from tuner.baselines import get_baseline, prepare, split_name
from tuner.check import CheckResult, check_decode, check_dequant
from tuner.errors import TunerError
from tuner.geometry import split_candidates
from tuner.kernels import device_arch
from tuner.launch import DecodeCall, DequantCall, LoadedKernel, ResourceError, Workspace
from tuner.measure.measurer import FIRST_STEP
from tuner.measure.parent import end_with_parent
from tuner.measure.peer import vllm_errors
from tuner.measure.pool import Pool
from tuner.measure.samples import Failure
from tuner.measure.store_pool import StorePool, check_loaded, store_call
from tuner.measure.timer import Replay, Timer
from tuner.measure.two_step import dequantize_then_attend
from tuner.reference import Case
from tuner.space import Config
from tuner.suits import reads_head_major
from tuner.targets import attached, get_target
from tuner.workload import Bucket, Shape

PREPARING = 0.6
"""Share of a race's time after which no further contestant is prepared."""
_CHECK_SPLITS = (1, 3, 16)
_LOST_CONTEXT = 3


class Child:
    """The operations. Each takes the request and returns what JSON can hold; exceptions become failures."""

    loads: type[LoadedKernel] = LoadedKernel
    """What ``check`` and ``time`` load a cubin as."""

    def __init__(self, device: int, block_size: int, pool_bytes: int | None, seed: int) -> None:
        if not torch.cuda.is_available():
            raise TunerError("no NVIDIA GPU: torch sees none, so nothing can be timed")
        torch.cuda.set_device(device)
        self.device = device
        self.target = attached(device) or get_target(device_arch(device))
        self.timer = Timer()
        self.pool = Pool(block_size, pool_bytes, seed)
        self.store_pool = StorePool(block_size, seed)
        self.workspace = Workspace(device)
        self._dequantized: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def check(self, request: dict[str, Any]) -> dict[str, Any] | Failure:
        """The gate, a decode with several split counts."""
        config = Config.from_dict(request["config"])
        with self._loaded(config, request["cubin"]) as kernel:
            result = self._check(kernel, request["level"], request["kv_heads"])
        if not result.passed:
            return Failure("wrong result", result.detail)
        return {"worst_error": result.worst_error, "detail": result.detail}

    def _check(self, kernel: LoadedKernel, level: Any, kv_heads: int) -> CheckResult:
        problem = kernel.config.problem
        if problem.op == "store":
            return check_loaded(kernel, level, kv_heads)
        if problem.op == "dequant":

            def run_dequant(case: Case, key: Tensor, value: Tensor) -> None:
                self._dequant_call(kernel, case, key, value)()

            return check_dequant(run_dequant, problem, device="cuda", level=level, kv_heads=kv_heads)
        results = []
        bar = vllm_errors(problem, "cuda", level, kv_heads)
        token_major = not reads_head_major(kernel.config)
        for splits in _CHECK_SPLITS:

            def run(case: Case, out: Tensor, splits: int = splits) -> None:
                self._decode_call(kernel, case, out, splits)()

            checked = check_decode(
                run,
                problem,
                device="cuda",
                level=level,
                kv_heads=kv_heads,
                peer_errors=bar,
                token_major=token_major,
            )
            results.append(checked)
            if not results[-1].passed:
                detail = f"splits {splits}: {results[-1].detail}"
                return CheckResult(False, results[-1].worst_error, detail)
        return max(results, key=lambda r: r.worst_error)

    def time(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """Short runs on every bucket and split count; a bucket that the memory does not suffice for has none."""
        config, shape = Config.from_dict(request["config"]), Shape(**request["shape"])
        buckets = {b.key: b for b in (Bucket(**b) for b in request["buckets"])}
        pool, coming = self._pool(config.problem.op), [Bucket(**b) for b in request["reserve"]]
        pool.reserve(shape, config.problem.cache_format, [*buckets.values(), *coming])  # grows once
        cases = pool.cases(shape, config.problem.cache_format, list(buckets.values()))
        timings = []
        with self._loaded(config, request["cubin"]) as kernel:
            for key, case in cases.items():
                try:
                    for splits in self._splits(config, request, shape, buckets[key]):
                        replay = self.timer.capture(self._prepare(kernel, case, splits))
                        timings.append({"bucket": key, "splits": splits, "sample": asdict(self.timer.short(replay))})
                        del replay  # the graph, before the module that it launches
                except torch.cuda.OutOfMemoryError as e:
                    print(f"{key}: {_failure(e).message}", file=sys.stderr)
                    self._dequantized.clear()
                    self._release()
        return timings

    def baseline(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """Short runs of one baseline on every bucket that it has the memory for."""
        shape, name = Shape(**request["shape"]), request["name"]
        buckets = [Bucket(**b) for b in request["buckets"]]
        cases = self._pool(request["kernel_op"]).cases(shape, request["cache_format"], buckets)
        timings = []
        for key, case in cases.items():
            with suppress(torch.cuda.OutOfMemoryError):
                sample = self.timer.short(self.timer.capture(self._prepare_baseline(name, request["kernel_op"], case)))
                timings.append({"bucket": key, "splits": 0, "sample": asdict(sample)})
            self._release()
        return timings

    def race(self, request: dict[str, Any]) -> dict[str, Any]:
        """Interleaved rounds of kernels and baselines on one bucket.

        Kernels are prepared, then baselines in the order given, as long as ``PREPARING`` of ``total_s`` lasts; the
        rounds take what is left of it, ``budget_s`` at most.
        """
        start, total_s = time.monotonic(), request["total_s"] or math.inf
        shape, bucket = Shape(**request["shape"]), Bucket(**request["bucket"])
        coming = [Bucket(**b) for b in request["reserve"]]
        pool = self._pool(request["kernel_op"])
        pool.reserve(shape, request["cache_format"], [bucket, *coming])
        cases = pool.cases(shape, request["cache_format"], [bucket])
        if bucket.key not in cases:
            raise TunerError(f"bucket {bucket.key} does not fit: its cache needs more memory than may be used")
        case = cases[bucket.key]
        kernels: list[LoadedKernel] = []
        replays: dict[str, Replay] = {}
        failures: dict[str, dict[str, Any]] = {}
        for contestant in request["contestants"]:
            name, ours = contestant["name"], contestant["config"] is not None
            if replays and not ours and time.monotonic() - start > PREPARING * total_s:
                failures[name] = asdict(Failure("timeout", f"no time left of {total_s:.1f} s to prepare it"))
                continue
            try:
                if not ours:
                    call = self._prepare_baseline(name, request["kernel_op"], case)
                else:
                    config = Config.from_dict(contestant["config"])
                    kernels.append(LoadedKernel.load(Path(contestant["cubin"]), config, self.device))
                    call = self._prepare(kernels[-1], case, contestant["splits"])
                    if name.startswith(FIRST_STEP):
                        rows, second = self._dequant_outputs(case), name.removeprefix(FIRST_STEP)
                        call = dequantize_then_attend(call, *rows, case, second)
                replays[name] = self.timer.capture(call)
            except (TunerError, torch.cuda.OutOfMemoryError) as e:
                failures[name] = asdict(_failure(e))
        left_s = min(request["budget_s"], total_s - (time.monotonic() - start))
        rounds, samples = self.timer.race(replays, left_s) if replays else ({}, {})
        replays.clear()
        self._release()
        for kernel in kernels:
            kernel.unload()
        return {"rounds_us": rounds, "samples": {n: asdict(s) for n, s in samples.items()}, "failures": failures}

    @contextmanager
    def _loaded(self, config: Config, cubin: str) -> Iterator[LoadedKernel]:
        kernel = self.loads.load(Path(cubin), config, self.device)
        try:
            yield kernel
            torch.cuda.synchronize()
        finally:
            with suppress(RuntimeError):  # a lost context has no modules either
                kernel.unload()

    def _splits(self, config: Config, request: dict[str, Any], shape: Shape, bucket: Bucket) -> Sequence[int]:
        if config.problem.op != "decode":
            return (1,)
        if request["splits"] is not None:
            return list(request["splits"])
        return split_candidates(
            config,
            registers=request["registers"],
            batch=bucket.batch,
            kv_heads=shape.kv_heads,
            max_context=bucket.context,
            target=self.target,
        )

    def _pool(self, op: str) -> Any:
        return self.store_pool if op == "store" else self.pool

    def _prepare(self, kernel: LoadedKernel, case: Any, splits: int) -> Callable[[], None]:
        """A call of ``kernel`` on a case of its op's pool."""
        if kernel.config.problem.op == "store":
            return store_call(kernel, case)
        if kernel.config.problem.op == "dequant":
            return self._dequant_call(kernel, case, *self._dequant_outputs(case))
        return self._decode_call(kernel, case, torch.empty_like(case.query), splits)

    def _decode_call(self, kernel: LoadedKernel, case: Case, out: Tensor, splits: int) -> DecodeCall:
        return DecodeCall(
            kernel,
            case.query,
            case.kv_cache,
            case.block_table,
            case.seq_lens,
            out,
            scale=case.scale,
            codec=case.codec,
            splits=splits,
            workspace=self.workspace,
        )

    def _dequant_call(self, kernel: LoadedKernel, case: Case, key: Tensor, value: Tensor) -> DequantCall:
        return DequantCall(kernel, case.kv_cache, case.block_table, case.seq_lens, key, value, codec=case.codec)

    def _dequant_outputs(self, case: Case) -> tuple[Tensor, Tensor]:
        """Room for both outputs, shared by all calls of one shape; only the latest shape's is kept."""
        shape = (case.block_table.numel(), case.block_size, case.kv_heads, case.layout.head_dim)
        if shape not in self._dequantized:
            self._dequantized.clear()
            key, value = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
            self._dequantized[shape] = (key, value)
        return self._dequantized[shape]

    def _prepare_baseline(self, name: str, op: str, case: Any) -> Callable[[], Any]:
        baseline = get_baseline(split_name(name)[0])
        if baseline.op != op:
            raise TunerError(f"baseline {name} is of op {baseline.op}: expected one of op {op}")
        return prepare(name, self._pool(op).inputs(case, dense=baseline.kind == "peer"))

    def forget_scratch(self) -> None:
        """New scratch: a kernel that went wrong may have left counters that are not zero."""
        self.workspace = Workspace(self.device)

    def _release(self) -> None:
        self.pool.forget_dense()
        gc.collect()
        torch.cuda.empty_cache()


def _failure(error: Exception) -> Failure:
    """The failure that ``error`` stands for; a crash where the context may be lost."""
    message = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, ResourceError | torch.cuda.OutOfMemoryError):
        return Failure("resource", message)
    if isinstance(error, TunerError):
        return Failure("error", message)
    if isinstance(error, RuntimeError):  # torch's and CuPy's CUDA errors are
        return Failure("crash", message)
    return Failure("error", f"{type(error).__name__}: {message}")


def _context_is_lost() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def serve(requests: TextIO, answers: TextIO, make: Callable[[], Child]) -> int:
    """Answers until ``requests`` ends; returns the exit status. ``make`` runs at the first request."""
    child: Child | None = None
    for line in requests:
        number = None
        try:
            request = json.loads(line)
            number = request["id"]
            operation = request["op"]
            if operation not in ("check", "time", "baseline", "race"):
                raise TunerError(f"unknown operation {operation!r}: expected check, time, baseline or race")
            child = child or make()
            answer = getattr(child, operation)(request)
        except Exception as e:  # whatever it is, the parent must hear of it
            traceback.print_exc()
            answer = _failure(e)
        body = {"failure": asdict(answer)} if isinstance(answer, Failure) else {"result": answer}
        lost = isinstance(answer, Failure) and child is not None and _context_is_lost()
        if lost and answer.kind != "crash":
            body = {"failure": asdict(Failure("crash", answer.message))}
        answers.write(json.dumps({"id": number, **body}) + "\n")
        answers.flush()
        if lost:
            return _LOST_CONTEXT
        if child is not None and isinstance(answer, Failure):
            child.forget_scratch()
    return 0


def main() -> int:
    """Serves standard input; whatever else prints to standard output lands in standard error."""
    parser = argparse.ArgumentParser(description="Times kernels for its parent process.")
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--pool-bytes", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    status = serve(
        sys.stdin, answers, lambda: Child(options.device, options.block_size, options.pool_bytes, options.seed)
    )
    answers.flush()
    os._exit(status)  # a lost context makes an orderly end hang or complain


if __name__ == "__main__":
    main()
