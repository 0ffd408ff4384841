"""The parent's side: a handle on the child process that owns the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from tuner.check import CheckResult
from tuner.measure.samples import Failure, Sample, Timing
from tuner.space import Config
from tuner.workload import Bucket, Shape

if TYPE_CHECKING:
    from typing import Self


@dataclass(frozen=True)
class Contestant:
    """Who races: a kernel (``config``, ``cubin``, ``splits``) or, where those are None, the baseline ``name``."""

    name: str
    config: Config | None = None
    cubin: Path | None = None
    splits: int = 1


@dataclass(frozen=True)
class Race:
    """Times per contestant, index i of each taken in the same shuffled round; failures by name."""

    rounds_us: dict[str, tuple[float, ...]]
    samples: dict[str, Sample]
    failures: dict[str, Failure]


class Measurer:
    """Owns one child process per device; starts it when first needed and again after it died.

    Every method returns a ``Failure`` instead of raising when the child crashes, hangs or refuses. Use as a context
    manager: leaving it ends the child. ``log`` receives the child's standard error.
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
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child; harmless when there is none."""
        raise NotImplementedError

    def check(self, config: Config, cubin: Path, *, level: str = "quick") -> CheckResult | Failure:
        """The correctness gate on the GPU; a failed gate is Failure("wrong result", ...)."""
        raise NotImplementedError

    def time(
        self,
        config: Config,
        cubin: Path,
        registers: int,
        shape: Shape,
        buckets: Sequence[Bucket],
        *,
        splits: Sequence[int] | None = None,
    ) -> list[Timing] | Failure:
        """Short runs of one kernel on every bucket that fits the pool, for each of ``splits``.

        ``splits`` None: the candidates of ``geometry.split_candidates`` per bucket. Op dequant ignores splits (1).
        """
        raise NotImplementedError

    def baseline(
        self, names: Sequence[str], shape: Shape, cache_format: str, buckets: Sequence[Bucket], *, op: str = "decode"
    ) -> dict[str, list[Timing] | Failure]:
        """Short runs of registered baselines, by name; one that is not available here is a Failure("error")."""
        raise NotImplementedError

    def race(
        self,
        contestants: Sequence[Contestant],
        shape: Shape,
        cache_format: str,
        bucket: Bucket,
        *,
        op: str = "decode",
        budget_s: float = 5.0,
    ) -> Race | Failure:
        """Shuffled interleaved rounds until every median's interval is under 1% or ``budget_s`` has passed."""
        raise NotImplementedError
