"""What a dispatch table holds, as frozen dataclasses, and their JSON form.

One table serves one (op, head dim, group size, cache format, device). ``dispatch_table.schema.json`` beside this file
is the JSON Schema that every table is checked against before anything in it is used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tuner.errors import TunerError
from tuner.space import Config, Problem, get_space
from tuner.space.core import Value
from tuner.targets import device_slug
from tuner.workload.core import longest_request

SCHEMA_VERSION = 1
EVIDENCE = ("measured", "predicted")
_UNSAFE = re.compile(r"[^A-Za-z0-9_.+-]+")


class TableError(TunerError):
    """A dispatch table cannot be used; the message is one line that names the file and what is wrong with it."""


@dataclass(frozen=True)
class Device:
    """The GPU a table was made for. ``driver`` is None where none was attached."""

    name: str
    arch: str
    sms: int
    driver: str | None = None

    @property
    def slug(self) -> str:
        """``name`` as it stands in file names, where a family shares its tables (``device_slug``)."""
        return file_slug(self.name)


@dataclass(frozen=True)
class Provenance:
    """Versions and inputs a table came from; None where a package was absent. ``date`` is ISO 8601, UTC.

    ``history`` has one line per older table that was merged into this one. ``peers``: baselines that are somebody
    else's file, with the first 16 hex digits of its SHA-256.
    """

    date: str
    seed: int
    nvcc: str | None = None
    torch: str | None = None
    triton: str | None = None
    cupy: str | None = None
    vllm: str | None = None
    optuna: str | None = None
    git_commit: str | None = None
    template_hash: str | None = None
    history: tuple[str, ...] = ()
    peers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel. ``id`` is ``kernel_id(arch, cubin_sha256)``: files of different tables never collide.

    ``source_digest`` is ``render.code_digest`` of the source that was compiled.
    """

    id: str
    params: tuple[tuple[str, Value], ...]
    source_digest: str
    cubin_sha256: str
    arch: str
    registers: int
    shared_bytes: int
    spill_bytes: int

    def config(self, problem: Problem) -> Config:
        """Its configuration, with axes that came after it was recorded."""
        return Config(problem, tuple(get_space(problem.op).completed(dict(self.params)).items()))


@dataclass(frozen=True)
class Timing:
    """One choice on one bucket. ``context`` is the longest request; ``ragged`` batches mix lengths up to it, of which
    ``BucketEntry.longest`` is the longest.

    Times in microseconds: median and its 95% interval (predicted: all three equal). ``limit_us`` is compressed bytes
    (and the bf16 rows', for dequantisation and a store) over the achievable bandwidth, ``limit_share`` is
    limit_us / time_us. A store of N tokens has batch N and context 1.
    ``baselines_us`` maps a baseline's name to its median, None where it was not measured. ``samples``: timed calls
    behind a measured median; ``clock_mhz``: the median SM clock meanwhile, None where it cannot be read.
    """

    context: int
    ragged: bool
    time_us: float
    ci_low_us: float
    ci_high_us: float
    limit_us: float
    baselines_us: Mapping[str, float | None]
    bottleneck: str | None = None
    samples: int | None = None
    clock_mhz: float | None = None

    @property
    def limit_share(self) -> float:
        return self.limit_us / self.time_us


@dataclass(frozen=True)
class RunnerUp:
    """The next best choice by another kernel, and its cost as a multiple of the winner's (1.0: a tie)."""

    params: tuple[tuple[str, Value], ...]
    splits: int
    ratio: float
    tie: bool = False


@dataclass(frozen=True)
class BatchEntry:
    """One choice per batch, valid for every context (what a CUDA graph needs).

    ``worst_ratio`` and ``mean_ratio`` (geometric) compare it with the best choice of each context of that batch.
    """

    batch: int
    kernel: str
    splits: int
    worst_ratio: float
    mean_ratio: float
    timings: tuple[Timing, ...]
    runner_up: RunnerUp | None = None


@dataclass(frozen=True)
class BucketEntry:
    """The choice for one batch and context."""

    batch: int
    kernel: str
    splits: int
    timing: Timing
    runner_up: RunnerUp | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest request, as ``workload.Bucket`` has it."""
        return longest_request(self.batch, self.timing.context, self.timing.ragged)


@dataclass(frozen=True)
class Table:
    """A dispatch table. ``kv_heads`` is the number of KV heads it was tuned with (see ``lookup``)."""

    problem: Problem
    kv_heads: int
    device: Device
    provenance: Provenance
    evidence: str
    kernels: tuple[Kernel, ...]
    by_batch: tuple[BatchEntry, ...]
    by_batch_and_context: tuple[BucketEntry, ...]
    schema_version: int = SCHEMA_VERSION

    @property
    def file_name(self) -> str:
        return table_file_name(self.problem, self.device.name)

    def kernel(self, kernel_id: str) -> Kernel:
        for kernel in self.kernels:
            if kernel.id == kernel_id:
                return kernel
        raise TableError(f"table {self.file_name} has no kernel {kernel_id!r}")


def kernel_id(arch: str, cubin_sha256: str) -> str:
    """Name of a cubin in ``kernels/``: content-addressed, so that tables can share the folder."""
    return f"{arch}-{cubin_sha256[:16]}"


def table_file_name(problem: Problem, device_name: str) -> str:
    """``turboquant_decode,head_dim=256,gqa=16,device_name=NVIDIA_GB10,cache_dtype=turboquant_4bit_nc.json``."""
    device, p = file_slug(device_name), problem
    return f"turboquant_{p.op},head_dim={p.head_dim},gqa={p.gqa},device_name={device},cache_dtype={p.cache_format}.json"


def file_slug(device_name: str) -> str:
    """``device_slug``, safe as part of a file's name whatever a table says: letters, digits, ``_.+-``."""
    return _UNSAFE.sub("_", device_slug(device_name.strip()))


def to_json(table: Table) -> dict[str, Any]:
    """The JSON object of ``table``; ``from_json`` is its inverse."""
    p = table.problem
    return {
        "schema_version": table.schema_version,
        "problem": {"op": p.op, "head_dim": p.head_dim, "gqa": p.gqa, "cache_format": p.cache_format},
        "kv_heads": table.kv_heads,
        "device": asdict(table.device),
        "evidence": table.evidence,
        "provenance": provenance_json(table.provenance),
        "kernels": {k.id: _kernel_json(k) for k in table.kernels},
        "by_batch": {
            str(e.batch): _choice_json(e)
            | {"worst_ratio": e.worst_ratio, "mean_ratio": e.mean_ratio}
            | {"timings": [_timing_json(t) for t in e.timings]}
            for e in table.by_batch
        },
        "by_batch_and_context": [
            {"batch": e.batch} | _choice_json(e) | {"timing": _timing_json(e.timing)}
            for e in table.by_batch_and_context
        ],
    }


def from_json(data: Mapping[str, Any]) -> Table:
    """Inverse of ``to_json`` for an object that already passed the JSON Schema. Raises UsageError for a bad problem."""
    return Table(
        problem=Problem(**data["problem"]),
        kv_heads=data["kv_heads"],
        device=Device(**data["device"]),
        provenance=_provenance(data["provenance"]),
        evidence=data["evidence"],
        kernels=tuple(Kernel(id=i, **{**k, "params": tuple(k["params"].items())}) for i, k in data["kernels"].items()),
        by_batch=tuple(
            BatchEntry(
                int(batch),
                e["kernel"],
                e["splits"],
                e["worst_ratio"],
                e["mean_ratio"],
                tuple(_timing(t) for t in e["timings"]),
                _runner_up(e["runner_up"]),
            )
            for batch, e in data["by_batch"].items()
        ),
        by_batch_and_context=tuple(
            BucketEntry(e["batch"], e["kernel"], e["splits"], _timing(e["timing"]), _runner_up(e["runner_up"]))
            for e in data["by_batch_and_context"]
        ),
        schema_version=data["schema_version"],
    )


def _kernel_json(kernel: Kernel) -> dict[str, Any]:
    fields = asdict(kernel) | {"params": dict(kernel.params)}
    del fields["id"]
    return fields


def _choice_json(entry: BatchEntry | BucketEntry) -> dict[str, Any]:
    r = entry.runner_up
    runner_up = None if r is None else asdict(r) | {"params": dict(r.params)}
    return {"kernel": entry.kernel, "splits": entry.splits, "runner_up": runner_up}


def _runner_up(data: Mapping[str, Any] | None) -> RunnerUp | None:
    return None if data is None else RunnerUp(**{**data, "params": tuple(data["params"].items())})


def provenance_json(provenance: Provenance) -> dict[str, Any]:
    """As tables and comparisons keep it."""
    data = asdict(provenance) | {"history": list(provenance.history), "peers": dict(provenance.peers)}
    return {name: value for name, value in data.items() if name != "peers" or value}


def _provenance(data: Mapping[str, Any]) -> Provenance:
    peers = tuple(data.get("peers", {}).items())
    return Provenance(**{**data, "history": tuple(data["history"]), "peers": peers})


def _timing_json(timing: Timing) -> dict[str, Any]:
    data = asdict(timing) | {"baselines_us": dict(timing.baselines_us), "limit_share": timing.limit_share}
    absent = [name for name in ("samples", "clock_mhz") if data[name] is None]
    return {name: value for name, value in data.items() if name not in absent}


def _timing(data: Mapping[str, Any]) -> Timing:
    return Timing(**{k: v for k, v in data.items() if k != "limit_share"})
