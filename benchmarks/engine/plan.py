"""What each engine does: kinds, batches, contexts, and the options vLLM is started with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.engine.model import Model
from benchmarks.grid.points import parse_shape

KINDS = ("ours", "own", "own_other_splits", "ours_own_store", "bf16", "damaged", "ours_speculative")
"""Ours; vLLM's kernels; the same with another number of splits, which rounds differently; our decode kernel on a cache
that vLLM's store writes; an uncompressed cache; ours with all its kernels' files cut short, so that vLLM's must run;
ours with speculative decoding."""
BY_DEFAULT = KINDS[:6]
OTHER_SPLITS = 24
"""vLLM's own number is 32."""
SPLIT_OPTION = "tq_max_kv_splits_for_cuda_graph"
TOKENS = 64
"""Tokens that each request of the accuracy part generates."""
UNCOMPRESSED_LAYERS = 4
"""vLLM keeps the first two and the last two attention layers of a dense model in bf16."""
_RAGGED = (17, 64, 129, 300, 511, 900, 1500, 2600, 4097, 5000, 7000, 9000, 12345)
_CAPTURED = (1, 2, 4, 8, 16, 24, 32, 64, 128)


@dataclass(frozen=True)
class Engine:
    """One engine run. ``accuracy``: lengths of the prompts of each set; ``speed``: (batch, context) pairs.

    ``compiled``: torch.compile and piecewise graphs for prefill, as vLLM does by default; else full graphs for decode
    alone, which start much faster. ``kv_cache_gib`` 0: as much memory as vLLM takes.
    """

    kind: str
    cache_format: str
    model: Model
    accuracy: tuple[tuple[int, ...], ...]
    speed: tuple[tuple[int, int], ...]
    max_batch: int
    compiled: bool
    kv_cache_gib: int

    @property
    def key(self) -> str:
        digest = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:10]
        return f"{self.kind}-{self.cache_format}-d{self.model.head_dim}-{digest}"

    @property
    def captured(self) -> tuple[int, ...]:
        """Batch sizes of the graphs; a batch in between runs in the next larger one, with padded rows."""
        return tuple(sorted({s for s in _CAPTURED if s <= self.max_batch} | {self.max_batch}))

    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``vllm.LLM`` besides the model."""
        graphs = {"mode": 3, "cudagraph_mode": "FULL_AND_PIECEWISE"}
        if not self.compiled:
            graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
        options: dict[str, Any] = {
            "skip_tokenizer_init": True,
            "dtype": "bfloat16",
            "kv_cache_dtype": "auto" if self.kind == "bf16" else self.cache_format,
            "max_model_len": self.model.max_length,
            "max_num_seqs": self.max_batch,
            "max_num_batched_tokens": 8192,
            "enable_chunked_prefill": True,
            "enable_prefix_caching": True,
            "gpu_memory_utilization": 0.85,
            "seed": 0,
            "compilation_config": {**graphs, "cudagraph_capture_sizes": list(self.captured)},
        }
        if self.kv_cache_gib:
            options["kv_cache_memory_bytes"] = self.kv_cache_gib << 30
        if self.kind == "own_other_splits":
            options["attention_config"] = {SPLIT_OPTION: OTHER_SPLITS}
        if self.kind == "ours_speculative":
            options["speculative_config"] = {
                "method": "ngram",
                "num_speculative_tokens": 3,
                "prompt_lookup_max": 3,
                "prompt_lookup_min": 1,
            }
        return options


def from_dict(data: Mapping[str, Any]) -> Engine:
    """The inverse of ``dataclasses.asdict``, also after a journey through JSON."""
    return Engine(
        **{
            **data,
            "model": Model(**data["model"]),
            "accuracy": tuple(map(tuple, data["accuracy"])),
            "speed": tuple(map(tuple, data["speed"])),
        }
    )


def base(shape: str, *, quick: bool, compiled: bool, kv_cache_gib: int) -> Engine:
    """Everything but kind and format. ``shape``: "head dim:query heads:KV heads". Raises UsageError."""
    parsed = parse_shape(shape)
    model = Model(head_dim=parsed.head_dim, q_heads=parsed.q_heads, kv_heads=parsed.kv_heads)
    if quick:
        model = replace(model, layers=8, max_length=17408)
        accuracy = ((2048,), (512,) * 8, _RAGGED)
        return Engine("", "", model, accuracy, ((8, 16384), (1, 16384)), 16, compiled, kv_cache_gib)
    accuracy = ((512,), (32640,), (8192,) * 4, (32640,) * 8, (2048,) * 32, _RAGGED)
    # Longest prompts first: they are computed once, and shorter ones are their beginnings.
    speed = ((8, 32640), (1, 32640), (32, 16384), (8, 16384), (1, 16384), (32, 4096), (8, 4096))
    return Engine("", "", model, accuracy, speed, 32, compiled, kv_cache_gib)


def engine_for(plan: Engine, kind: str, cache_format: str) -> Engine:
    """``plan`` for one kind: what is not compared is left out."""
    if kind == "bf16":  # one for all formats
        return replace(plan, kind=kind, cache_format="auto")
    if kind == "damaged":  # enough for one request and for several
        return replace(plan, kind=kind, cache_format=cache_format, accuracy=plan.accuracy[:3], speed=())
    if kind in ("own_other_splits", "ours_own_store", "ours_speculative"):
        return replace(plan, kind=kind, cache_format=cache_format, speed=())
    return replace(plan, kind=kind, cache_format=cache_format)
