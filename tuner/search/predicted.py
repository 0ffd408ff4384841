"""Times from the static model, for a GPU that is not attached."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuner import geometry, model, pipes, sass, targets
from tuner import predict as prediction
from tuner.baselines import SHIPPED, Constants, TritonConstants, split_name, tuned_name
from tuner.errors import TunerError, UsageError
from tuner.predict import predict, predict_triton
from tuner.sass import SassFacts, disassemble, facts_of
from tuner.search import compiled
from tuner.search.evaluate import Candidate, Final, Scored, Time, Timings, batches, splits_for_batch
from tuner.search.request import Failure, TuneRequest
from tuner.search.rivals import probes, sweep
from tuner.space.core import Config
from tuner.workload import Bucket

INDISTINCT = 1.005
"""Predicted times closer than this are a tie: the model's terms are not better than that."""
TRITON_TRIALS = 6
TRITON_BUDGET_S = 30.0
"""For the constants of the Triton baseline: each is a compilation of some seconds."""


@dataclass(frozen=True)
class _Triton:
    """Machine code of the Triton kernel's first stage."""

    constants: TritonConstants
    sass: SassFacts
    shared_bytes: int


class PredictedEvaluator:
    """Compiles for the target, reads the machine code, and asks the static model."""

    def __init__(self, request: TuneRequest) -> None:
        if request.problem.op != "decode":
            device, op = request.target.device_name, request.problem.op
            raise UsageError(f"the static model knows op decode only: attach a {device} to tune {op}")
        self._request = request
        self._compiler = compiled.Compiler(request.target.arch, request.root, request.workers)
        self._facts: dict[str, SassFacts] = {}
        self._triton: dict[Constants, _Triton | None] = {}
        self.fingerprint = f"{compiled.fingerprint(request.target.arch)}-model{_model_digest()}"

    def build(self, configs: Sequence[Config]) -> list[Candidate | Failure]:
        """Builds, and disassembles in one go what was built."""
        results = self._compiler.build(configs)
        digests = list(dict.fromkeys(r.source_digest for r in results if isinstance(r, Candidate)))
        found = facts_of(self._compiler.built[d] for d in digests)
        self._facts.update(zip(digests, found, strict=True))
        return results

    def score(self, candidate: Candidate, best: Timings | None) -> Scored | Failure:
        request = self._request
        timings: Timings = {}
        try:
            for group in batches(request.buckets).values():
                splits = splits_for_batch(candidate.config, candidate.registers, request.shape, group, request.target)
                for bucket in group:
                    timings[bucket.key] = {s: self._time(candidate, bucket, s) for s in splits}
        except UsageError as error:
            return Failure("resource", str(error))
        except TunerError as error:  # machine code that the model cannot read
            return Failure("compile", str(error))
        return Scored(timings)

    def confirm(self, candidate: Candidate) -> Failure | None:
        """Nothing runs here; templates are checked on the CPU by the tests."""
        return None

    def rivals(self, tell: Callable[[str], None]) -> tuple[str, ...]:
        request = self._request
        sample = probes(request.buckets)

        def measure(constants: Constants) -> dict[str, float]:
            times = {b.key: self._triton_us(constants, b) for b in sample}
            return {key: us for key, us in times.items() if us is not None}

        found = sweep(
            request.problem, measure, seed=request.seed, limit=TRITON_TRIALS, budget_s=TRITON_BUDGET_S, tell=tell
        )
        return tuple(tuned_name("triton", constants) for constants in found)

    def final(
        self, contestants: Sequence[tuple[Candidate, int]], bucket: Bucket, rivals: Sequence[str]
    ) -> Final | Failure:
        times = tuple(self._time(c, bucket, s) for c, s in contestants)
        fastest = min(range(len(times)), key=lambda i: times[i].median_us)
        winner = next(i for i, t in enumerate(times) if t.median_us <= times[fastest].median_us * INDISTINCT)
        return Final(times, winner, winner != fastest, self._baselines_us(bucket, rivals))

    def close(self) -> None:
        """Nothing is held."""

    def _time(self, candidate: Candidate, bucket: Bucket, splits: int) -> Time:
        request = self._request
        built, sass = self._compiler.built[candidate.source_digest], self._facts[candidate.source_digest]
        p = predict(candidate.config, built, sass, request.target, request.shape, bucket, splits)
        return Time(p.time_us, p.time_us, p.time_us, p.bottleneck)

    def _baselines_us(self, bucket: Bucket, rivals: Sequence[str]) -> dict[str, float | None]:
        """Of the Triton kernels: the model knows no others."""
        chosen = self._request.baselines
        names = ("triton",) if chosen is None else [n for n in chosen if split_name(n)[0] == "triton"]
        return {n: self._triton_us(split_name(n)[1] or SHIPPED["decode"], bucket) for n in (*names, *rivals)}

    def _triton_us(self, constants: Constants, bucket: Bucket) -> float | None:
        """Predicted time; None where these constants do not compile or fit."""
        if constants not in self._triton:
            self._triton[constants] = self._compile_triton(constants)
        kernel = self._triton[constants]
        if kernel is None:
            return None
        request, c = self._request, kernel.constants
        try:
            prediction = predict_triton(
                kernel.sass,
                request.target,
                request.shape,
                request.problem.layout,
                bucket,
                block_kv=c.block_kv,
                splits=c.splits,
                warps=c.num_warps,
                heads_per_cta=min(c.block_h, request.shape.gqa),
                shared_bytes=kernel.shared_bytes,
            )
        except TunerError:  # a CTA that does not fit, or code without a loop
            return None
        return prediction.time_us

    def _compile_triton(self, constants: Constants) -> _Triton | None:
        from tuner.baselines.compile import compile_for

        request = self._request
        assert isinstance(constants, TritonConstants)
        try:
            binaries = compile_for(constants, request.problem, request.target.arch, root=request.root)
        except TunerError:  # no such kernel for this format, or no working Triton: the table says null
            return None
        stage1 = next(b for b in binaries if b.role == "stage1")
        return _Triton(constants, disassemble([(stage1.cubin, stage1.kernel)])[0], stage1.shared_bytes)


def _model_digest() -> str:
    """Of the model's own code and constants: times of another version are not comparable."""
    state = hashlib.sha256()
    for module in (prediction, model, pipes, sass, geometry, targets):
        state.update(Path(str(module.__file__)).read_bytes())
    return state.hexdigest()[:16]
