"""The parent's side: a handle on the child process that owns the GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tuner.measure.channel import Channel
from tuner.measure.samples import Failure, Sample, Timing
from tuner.space import Config
from tuner.workload import Bucket, Shape

if TYPE_CHECKING:
    from typing import Self

_IMPORT_ROOT = Path(__file__).resolve().parents[2]
FIRST_STEP = "dequantize+"
"""In a race of op decode, a dequantiser is called by this and the baseline that attends after it."""


@dataclass(frozen=True)
class Contestant:
    """Who races: a kernel (``config``, ``cubin``, ``splits``) or, where those are None, the baseline ``name``.

    ``dequantize+sdpa_bf16`` with a dequantiser is both steps in one call.
    """

    name: str
    config: Config | None = None
    cubin: Path | None = None
    splits: int = 1


@dataclass(frozen=True)
class Race:
    """Times per contestant, index i of each taken in the same shuffled round, None where it sat that one out;
    failures by name."""

    rounds_us: dict[str, tuple[float | None, ...]]
    samples: dict[str, Sample]
    failures: dict[str, Failure]


@dataclass(frozen=True)
class Checked:
    """A kernel that passed the gate; ``worst_error`` is relative, ``detail`` one line."""

    worst_error: float
    detail: str


class Measurer:
    """Owns one child process per device; starts it when first needed and again after it died.

    Every method returns a ``Failure`` instead of raising when the child crashes, hangs or refuses. Use as a context
    manager: leaving it ends the child. ``timeout_s`` bounds one request (a race has its budget on top). ``pool_bytes``
    bounds the cache that is timed on, None: 40% of the free memory. ``log`` receives the child's standard error.
    """

    def __init__(
        self,
        device: int = 0,
        *,
        timeout_s: float = 60.0,
        block_size: int = 16,
        pool_bytes: int | None = None,
        log: Path | None = None,
        seed: int = 0,
    ) -> None:
        options = {"device": device, "block_size": block_size, "pool_bytes": pool_bytes, "seed": seed}
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
        self.timeout_s = timeout_s
        # The child must find the package that this is, from whatever directory it is started.
        path = os.pathsep.join(filter(None, (str(_IMPORT_ROOT), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"PYTHONPATH": path}
        self.channel = Channel([sys.executable, "-m", "tuner.measure.child", *arguments], log, environment)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Starts the child, whose imports take seconds, ahead of its first request. Raises TunerError."""
        self.channel.start()

    def close(self) -> None:
        """Ends the child; harmless when there is none."""
        self.channel.close()

    def check(self, config: Config, cubin: Path, *, level: str = "quick", kv_heads: int = 2) -> Checked | Failure:
        """The correctness gate on the GPU; a failed gate is Failure("wrong result", ...)."""
        payload = {"config": config.to_dict(), "cubin": str(cubin), "level": level, "kv_heads": kv_heads}
        answer = self._request("check", payload)
        return answer if isinstance(answer, Failure) else Checked(**answer)

    def time(
        self,
        config: Config,
        cubin: Path,
        registers: int,
        shape: Shape,
        buckets: Sequence[Bucket],
        *,
        splits: Sequence[int] | None = None,
        reserve: Sequence[Bucket] = (),
    ) -> list[Timing] | Failure:
        """Short runs of one kernel on every bucket that fits the pool and the memory, for each of ``splits``.

        ``splits`` None: the candidates of ``geometry.split_candidates`` per bucket. Only op decode has splits (else 1).
        ``reserve``: buckets that will be timed next.
        """
        payload = {
            "config": config.to_dict(),
            "cubin": str(cubin),
            "registers": registers,
            "shape": asdict(shape),
            "buckets": [asdict(bucket) for bucket in buckets],
            "splits": None if splits is None else list(splits),
            "reserve": [asdict(bucket) for bucket in reserve],
        }
        answer = self._request("time", payload)
        return answer if isinstance(answer, Failure) else _timings(answer)

    def baseline(
        self, names: Sequence[str], shape: Shape, cache_format: str, buckets: Sequence[Bucket], *, op: str = "decode"
    ) -> dict[str, list[Timing] | Failure]:
        """Short runs of registered baselines, by name; one that is not available here is a Failure("error").

        One that runs out of memory on a bucket has no timing there. Each name is a request of its own, with five
        times the usual limit, because Triton compiles when first called.
        """
        results: dict[str, list[Timing] | Failure] = {}
        for name in names:
            payload = {
                "name": name,
                "kernel_op": op,
                "shape": asdict(shape),
                "cache_format": cache_format,
                "buckets": [asdict(bucket) for bucket in buckets],
            }
            answer = self._request("baseline", payload, 5 * self.timeout_s)
            results[name] = answer if isinstance(answer, Failure) else _timings(answer)
        return results

    def race(
        self,
        contestants: Sequence[Contestant],
        shape: Shape,
        cache_format: str,
        bucket: Bucket,
        *,
        op: str = "decode",
        budget_s: float = 5.0,
        total_s: float | None = None,
        reserve: Sequence[Bucket] = (),
    ) -> Race | Failure:
        """Shuffled interleaved rounds until every median's interval is under 1% or ``budget_s`` has passed.

        ``total_s`` bounds preparation and rounds together, but for the least samples of those that are prepared:
        kernels always are, the last baselines of the list then fail as timeouts. ``reserve``: buckets that will be
        raced next. A contestant that cannot be prepared is among ``failures``; one that crashes ends the race with a
        Failure.
        """
        payload = {
            "contestants": [
                {
                    "name": c.name,
                    "config": c.config.to_dict() if c.config else None,
                    "cubin": str(c.cubin) if c.cubin else None,
                    "splits": c.splits,
                }
                for c in contestants
            ],
            "kernel_op": op,
            "shape": asdict(shape),
            "cache_format": cache_format,
            "bucket": asdict(bucket),
            "budget_s": budget_s,
            "total_s": total_s,
            "reserve": [asdict(b) for b in reserve],
        }
        answer = self._request("race", payload, self.timeout_s + max(budget_s, total_s or 0.0))
        if isinstance(answer, Failure):
            return answer
        return Race(
            {name: tuple(times) for name, times in answer["rounds_us"].items()},
            {name: Sample(**sample) for name, sample in answer["samples"].items()},
            {name: Failure(**failure) for name, failure in answer["failures"].items()},
        )

    def _request(self, op: str, payload: dict[str, Any], timeout_s: float | None = None) -> Any | Failure:
        return self.channel.request(op, payload, timeout_s or self.timeout_s)


def _timings(answer: list[dict[str, Any]]) -> list[Timing]:
    return [Timing(t["bucket"], t["splits"], Sample(**t["sample"])) for t in answer]
