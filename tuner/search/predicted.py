"""Times from the static model, for a GPU that is not attached."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import tuner.predict
import tuner.sass
from tuner.baselines import SHIPPED
from tuner.baselines.inputs import TritonConstants
from tuner.errors import TunerError, UsageError
from tuner.predict import predict, predict_triton
from tuner.sass import SassFacts, disassemble, facts_of
from tuner.search import compiled
from tuner.search.evaluate import Candidate, Final, Scored, Time, Timings, batches, splits_for_batch
from tuner.search.request import Failure, TuneRequest
from tuner.space.core import Config
from tuner.workload import Bucket

INDISTINCT = 1.005
"""Predicted times closer than this are a tie: the model's terms are not better than that."""


class PredictedEvaluator:
    """Compiles for the target, reads the machine code, and asks the static model."""

    def __init__(self, request: TuneRequest) -> None:
        if request.problem.op != "decode":
            device, op = request.target.device_name, request.problem.op
            raise UsageError(f"the static model knows op decode only: attach a {device} to tune {op}")
        self._request = request
        self._compiler = compiled.Compiler(request.target.arch, request.root, request.workers)
        self._facts: dict[str, SassFacts] = {}
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

    def final(self, contestants: Sequence[tuple[Candidate, int]], bucket: Bucket) -> Final | Failure:
        times = tuple(self._time(c, bucket, s) for c, s in contestants)
        fastest = min(range(len(times)), key=lambda i: times[i].median_us)
        winner = next(i for i, t in enumerate(times) if t.median_us <= times[fastest].median_us * INDISTINCT)
        return Final(times, winner, winner != fastest, self._baselines_us(bucket))

    def close(self) -> None:
        """Nothing is held."""

    def _time(self, candidate: Candidate, bucket: Bucket, splits: int) -> Time:
        request = self._request
        built, sass = self._compiler.built[candidate.source_digest], self._facts[candidate.source_digest]
        p = predict(candidate.config, built, sass, request.target, request.shape, bucket, splits)
        return Time(p.time_us, p.time_us, p.time_us, p.bottleneck)

    @cached_property
    def _triton(self) -> tuple[TritonConstants, SassFacts, int] | None:
        """Constants, machine code and shared bytes of vLLM's structure; None where it cannot be compiled."""
        from tuner.baselines.compile import compile_for

        request = self._request
        constants = SHIPPED["decode"]
        assert isinstance(constants, TritonConstants)
        try:
            binaries = compile_for(constants, request.problem, request.target.arch, root=request.root)
        except TunerError:  # no such kernel for this format, or no working Triton: the table says null
            return None
        stage1 = next(b for b in binaries if b.role == "stage1")
        return constants, disassemble([(stage1.cubin, stage1.kernel)])[0], stage1.shared_bytes

    def _baselines_us(self, bucket: Bucket) -> dict[str, float | None]:
        request = self._request
        if request.baselines is not None and "triton" not in request.baselines:
            return {}
        if self._triton is None:
            return {"triton": None}
        constants, sass, shared_bytes = self._triton
        prediction = predict_triton(
            sass,
            request.target,
            request.shape,
            request.problem.layout,
            bucket,
            block_kv=constants.block_kv,
            splits=constants.splits,
            warps=constants.num_warps,
            heads_per_cta=constants.block_h,
            shared_bytes=shared_bytes,
        )
        return {"triton": prediction.time_us}


def _model_digest() -> str:
    """Of the model's own code: times of another version are not comparable."""
    state = hashlib.sha256()
    for module in (tuner.predict, tuner.sass):
        state.update(Path(str(module.__file__)).read_bytes())
    return state.hexdigest()[:16]
