"""A search whose times come from a formula over the real decode space, in place of a GPU."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tuner.baselines import TritonConstants, tuned_name
from tuner.geometry import dynamic_shared_bytes
from tuner.search import (
    Candidate,
    Event,
    Failure,
    Time,
    Timings,
    TuneRequest,
    TuneResult,
    tune,
)
from tuner.search.evaluate import Final, Scored, limit_us
from tuner.space import Config, Problem
from tuner.targets import get_target
from tuner.workload import Bucket, Shape

SHAPE = Shape(128, 32, 8)
PROBLEM = Problem("decode", 128, 4, "turboquant_4bit_nc")
TARGET = get_target("sm_121")
BUCKETS = (Bucket(1, 1024), Bucket(1, 65536), Bucket(16, 1024), Bucket(16, 65536), Bucket(16, 65536, ragged=True))
TRIALS = 6
TUNED = tuned_name("triton", TritonConstants(block_kv=16, num_warps=4, num_stages=1, splits=32, block_h=16))


class Analytic:
    """Deterministic times: more warps suit long contexts, few suit short ones. Keeps a log of what it did."""

    fingerprint = "analytic"

    def __init__(self, root: Path, pause_s: float = 0.0, buckets: tuple[Bucket, ...] = BUCKETS) -> None:
        self.root, self.pause_s, self.buckets = root, pause_s, buckets
        self.log: list[tuple[str, float, float, tuple[Config, ...]]] = []
        self.sweeps = 0
        self.off = 0.0
        """By how much of itself a time of the search may be wrong, differently for every kernel, bucket and splits."""
        self.race_s = 0.0
        self.shares_s: dict[str, float] = {}
        """Of each race with baselines, in their order: the time it was given."""
        self.alone: list[str] = []
        """Buckets of the races without, in their order."""

    def build(self, configs: Sequence[Config]) -> list[Candidate | Failure]:
        start = time.monotonic()
        time.sleep(self.pause_s)
        results = [self._build(c) for c in configs]
        self.log.append(("build", start, time.monotonic(), tuple(configs)))
        return results

    def _build(self, config: Config) -> Candidate | Failure:
        digest = hashlib.sha256(config.describe().encode()).hexdigest()
        (self.root / "cubins").mkdir(parents=True, exist_ok=True)
        cubin = self.root / "cubins" / digest
        whole = cubin.with_name(f"{digest}.{os.getpid()}")  # another worker may read it at any time
        whole.write_bytes(digest.encode())
        whole.replace(cubin)
        sha = hashlib.sha256(digest.encode()).hexdigest()
        return Candidate(config, digest, sha, str(cubin), 64 + config["tokens"], dynamic_shared_bytes(config), 0)

    def score(self, candidate: Candidate, best: Timings | None) -> Scored | Failure:
        start = time.monotonic()
        time.sleep(self.pause_s / 4)
        self.log.append(("score", start, time.monotonic(), (candidate.config,)))
        return Scored({b.key: {s: self.screened(candidate.config, b, s) for s in (1, 8)} for b in self.buckets})

    def screened(self, config: Config, bucket: Bucket, splits: int) -> Time:
        """What the search sees of ``time``."""
        t = self.time(config, bucket, splits)
        seen = 1 + random.Random(f"{config.describe()} {bucket.key} {splits}").uniform(-self.off, self.off)
        return Time(seen * t.median_us, seen * t.ci_low_us, seen * t.ci_high_us)

    def time(self, config: Config, bucket: Bucket, splits: int) -> Time:
        c = config
        fit = c["warps"] / (16 if bucket.context > 4096 else 1)
        cost = (
            1.2
            + abs(fit - 1)
            + 0.3 * (c["math"] == "fma")
            + 0.1 * c["stages"]
            + 0.5 * (splits == 8) * (bucket.batch > 8)
        )
        us = cost * limit_us(PROBLEM, SHAPE, bucket, TARGET)
        return Time(us, 0.99 * us, 1.01 * us)

    def confirm(self, candidate: Candidate) -> Failure | None:
        return None

    def rivals(self, tell: Callable[[str], None], budget_s: float) -> tuple[str, ...]:
        self.sweeps += 1
        tell("tuning the Triton baseline")
        return (TUNED,)

    def final(
        self,
        contestants: Sequence[tuple[Candidate, int]],
        bucket: Bucket,
        rivals: Sequence[str] | None,
        budget_s: float,
    ) -> Final | Failure:
        times = tuple(self.time(c.config, bucket, s) for c, s in contestants)
        winner = min(range(len(times)), key=lambda i: times[i].median_us)
        baselines_us: dict[str, float | None] = {}
        if rivals is None:
            assert not self.shares_s and budget_s > 0, "first of all"
            self.alone.append(bucket.key)
        else:
            self.shares_s[bucket.key] = budget_s
            time.sleep(self.race_s)
            us = times[winner].median_us
            baselines_us = {"triton": 10 * us, "fa3_bf16": None} | {n: 4 * us for n in rivals}
        return self.outcome(bucket, Final(times, winner, False, baselines_us), alone=rivals is None)

    def outcome(self, bucket: Bucket, final: Final, alone: bool) -> Final:
        """What a race without noise, ``alone`` or with baselines, is made to say."""
        return final

    def close(self) -> None:
        pass

    def scored(self) -> list[Config]:
        return [configs[0] for kind, _, _, configs in self.log if kind == "score"]


def request_for(root: Path, **changes: object) -> TuneRequest:
    request = TuneRequest(
        PROBLEM, SHAPE, BUCKETS, TARGET, "predicted", trials=TRIALS, batch_size=4, root=root, output=root / "tables"
    )
    return replace(request, **changes)  # type: ignore[arg-type]


def search(
    root: Path, evaluator: Analytic | None = None, **changes: object
) -> tuple[TuneResult, Analytic, list[Event]]:
    evaluator = evaluator or Analytic(root)
    events: list[Event] = []
    return tune(request_for(root, **changes), events.append, evaluator), evaluator, events


_CHILD = """
import sys; from pathlib import Path
sys.path.insert(0, {tests!r})
from analytic_search import Analytic, request_for
from tuner.search import tune
root = Path({root!r})
request = request_for(root, **{changes!r})
tune(request, lambda e: print(e.progress.done, flush=True), Analytic(root, pause_s={pause_s}))
"""


def child(root: Path, trials: int, pause_s: float = 0.4, **changes: object) -> subprocess.Popen[str]:
    """A worker of its own, which prints how many trials are done; ``pause_s`` as in Analytic."""
    tests, changes = str(Path(__file__).parent), {"trials": trials, **changes}
    code = _CHILD.format(tests=tests, root=str(root), changes=changes, pause_s=pause_s)
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )


_OPEN = """
import sys
from tuner.search.storage import open_storage
import optuna, sqlalchemy
print("ready", flush=True)
sys.stdin.readline()
open_storage(sys.argv[1])
print("open")
"""


def open_together(url: str, count: int = 3) -> list[str]:
    """What processes say that open the storage at the same moment."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _OPEN, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, cwd=Path(__file__).parents[1],
        )
        for _ in range(count)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    return [process.communicate(timeout=60)[0].strip() for process in processes]
