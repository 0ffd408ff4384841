"""Times from the static model, for a GPU that is not attached."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from tuner import geometry, model, pipes, sass, targets
from tuner import predict as prediction
from tuner import predict_dequant as prediction_dequant
from tuner.baselines import SHIPPED, Constants, DequantConstants, split_name, tuned_name
from tuner.errors import TunerError, UsageError
from tuner.predict import predict, predict_triton
from tuner.predict_dequant import predict_dequant, predict_triton_dequant
from tuner.sass import SassFacts, disassemble, facts_of
from tuner.search import compiled
from tuner.search.evaluate import Candidate, Final, Scored, Time, Timings, batches, splits_for_batch
from tuner.search.request import Failure, TuneRequest
from tuner.search.rivals import BASELINE, probes, sweep
from tuner.space.core import Config
from tuner.workload import Bucket

INDISTINCT = 1.005
"""Predicted times closer than this are a tie: the model's terms are not better than that."""
TRITON_TRIALS = 6
"""Constants of the Triton baseline that are tried: each is a compilation of some seconds."""
OPS = ("decode", "dequant")
"""What the model knows."""
_ROLES = {"decode": ("stage1",), "dequant": ("keys", "values")}


_Triton = tuple[tuple[SassFacts, int], ...]
"""Machine code and dynamic shared memory of the Triton kernels that the model reads (``_ROLES``)."""


class PredictedEvaluator:
    """Compiles for the target, reads the machine code, and asks the static model."""

    def __init__(self, request: TuneRequest) -> None:
        if request.problem.op not in OPS:
            device, op = request.target.device_name, request.problem.op
            raise UsageError(f"the static model knows {' and '.join(OPS)} only: attach a {device} to tune {op}")
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
        if candidate.spill_bytes:
            return Failure("resource", f"{candidate.spill_bytes} bytes of spills, whose cost the model cannot tell")
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

    def rivals(self, tell: Callable[[str], None], budget_s: float) -> tuple[str, ...]:
        request = self._request
        sample = probes(request.buckets)

        def measure(constants: Constants) -> dict[str, float]:
            times = {b.key: self._triton_us(constants, b) for b in sample}
            return {key: us for key, us in times.items() if us is not None}

        found = sweep(request.problem, measure, seed=request.seed, limit=TRITON_TRIALS, budget_s=budget_s, tell=tell)
        return tuple(tuned_name(BASELINE[request.problem.op], constants) for constants in found)

    def final(
        self,
        contestants: Sequence[tuple[Candidate, int]],
        bucket: Bucket,
        rivals: Sequence[str] | None,
        budget_s: float,
    ) -> Final | Failure:
        times = tuple(self._time(c, bucket, s) for c, s in contestants)
        fastest = min(range(len(times)), key=lambda i: times[i].median_us)
        winner = next(i for i, t in enumerate(times) if t.median_us <= times[fastest].median_us * INDISTINCT)
        return Final(times, winner, winner != fastest, {} if rivals is None else self._baselines_us(bucket, rivals))

    def close(self) -> None:
        self._compiler.close()

    def _time(self, candidate: Candidate, bucket: Bucket, splits: int) -> Time:
        request = self._request
        built, sass = self._compiler.built[candidate.source_digest], self._facts[candidate.source_digest]
        if request.problem.op == "dequant":
            p = predict_dequant(candidate.config, built, sass, request.target, request.shape, bucket)
        else:
            p = predict(candidate.config, built, sass, request.target, request.shape, bucket, splits)
        return Time(p.time_us, p.time_us, p.time_us, p.bottleneck)

    def _baselines_us(self, bucket: Bucket, rivals: Sequence[str]) -> dict[str, float | None]:
        """Of the Triton kernels: the model knows no others."""
        chosen, op = self._request.baselines, self._request.problem.op
        names = (BASELINE[op],) if chosen is None else [n for n in chosen if split_name(n)[0] == BASELINE[op]]
        return {n: self._triton_us(split_name(n)[1] or SHIPPED[op], bucket) for n in (*names, *rivals)}

    def _triton_us(self, constants: Constants, bucket: Bucket) -> float | None:
        """Predicted time; None where these constants do not compile or fit."""
        if constants not in self._triton:
            self._triton[constants] = self._compile_triton(constants)
        kernels = self._triton[constants]
        if kernels is None:
            return None
        request, c = self._request, constants
        where = (request.target, request.shape, request.problem.layout, bucket)
        try:
            if isinstance(c, DequantConstants):
                return predict_triton_dequant(kernels, *where, rows=c.rows, warps=c.num_warps)
            sass, shared_bytes = kernels[0]
            prediction = predict_triton(
                sass,
                *where,
                block_kv=c.block_kv,
                splits=c.splits,
                warps=c.num_warps,
                heads_per_cta=min(c.block_h, request.shape.gqa),
                shared_bytes=shared_bytes,
            )
        except TunerError:  # a CTA that does not fit, or code without a loop
            return None
        return prediction.time_us

    def _compile_triton(self, constants: Constants) -> _Triton | None:
        from tuner.baselines.compile import compile_for

        request = self._request
        try:
            binaries = compile_for(constants, request.problem, request.target.arch, root=request.root)
        except TunerError:  # no such kernel for this format, or no working Triton: the table says null
            return None
        read = [b for b in binaries if b.role in _ROLES[request.problem.op]]
        facts = disassemble((b.cubin, b.kernel) for b in read)
        return tuple((f, b.shared_bytes) for f, b in zip(facts, read, strict=True))


def _model_digest() -> str:
    """Of the model's own code and constants: times of another version are not comparable."""
    state = hashlib.sha256()
    for module in (prediction, prediction_dequant, model, pipes, sass, geometry, targets):
        state.update(Path(str(module.__file__)).read_bytes())
    return state.hexdigest()[:16]
