"""What a prepared launch hands to the driver the second time: nothing that belonged to the first call."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import pytest
import torch

from tuner import abi
from tuner.abi import STRUCTURES
from tuner.arguments import decode_params, store_params
from tuner.geometry import Geometry, decode_scratch
from tuner.reference import synthetic_cache
from tuner.space import Config, Problem, default_config
from tuner.vllm.prepared import Launches, Prepared

FORMAT = "turboquant_4bit_nc"
GEOMETRY = Geometry((1, 1, 1), (32, 1, 1), 0)


@dataclass
class Recorder:
    """Reads the structure as the driver does: all of it, when it is launched."""

    config: Config
    seen: list[dict[str, int | float]] = field(default_factory=list)

    def launch(self, entry: str, geometry: Geometry, parameters: int) -> None:
        name, fields = STRUCTURES[self.config.problem.op]
        pointer = ctypes.c_void_p.from_address(parameters).value
        assert pointer is not None
        params = getattr(abi, name).from_address(pointer)
        self.seen.append({n: getattr(params, n) for n, _, _ in fields})


def pointers(op: str) -> list[str]:
    return [n for n, kind, _ in STRUCTURES[op][1] if isinstance(kind, str)]


def decode_call(seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    problem = Problem("decode", 64, 2, FORMAT)
    case = synthetic_cache(problem.layout, (17, 40), q_heads=4, kv_heads=2, seed=seed)
    scratch = decode_scratch(default_config(problem), batch=2, kv_heads=2, splits=2)
    tensors = {
        "query": case.query,
        "kv_cache": case.kv_cache,
        "block_table": case.block_table,
        "seq_lens": case.seq_lens,
        "out": torch.empty_like(case.query),
        "partials": torch.zeros(scratch.partial_floats),
        "counters": torch.zeros(scratch.counters, dtype=torch.int32),
    }
    return tensors, case.codec.centroids


def prepare_decode(kernel: Recorder, tensors: dict[str, torch.Tensor], centroids: torch.Tensor) -> Prepared:
    ordered = [tensors[n] for n in ("query", "kv_cache", "block_table", "seq_lens", "out")]
    rest = {n: tensors[n] for n in ("partials", "counters")}
    params, _ = decode_params(*ordered, cache_format=FORMAT, scale=1.0, splits=2, centroids=centroids, **rest)
    return Prepared(kernel, [("wph_decode", GEOMETRY)], params, (centroids,))  # type: ignore[arg-type]


def test_a_second_cache_of_the_same_shape_is_the_one_that_is_read() -> None:
    kernel = Recorder(default_config(Problem("decode", 64, 2, FORMAT)))
    first, centroids = decode_call(1)
    prepared = prepare_decode(kernel, first, centroids)
    prepared.launch(**first)
    second, _ = decode_call(2)
    prepared.launch(**second)
    for tensors, seen in zip((first, second), kernel.seen, strict=True):
        for name in pointers("decode"):
            expected = {"centroids": centroids.data_ptr(), "signs": 0, "channels": 0}.get(name)
            assert seen[name] == (tensors[name].data_ptr() if expected is None else expected), name
    assert {n: v for n, v in kernel.seen[0].items() if n not in first} == {
        n: v for n, v in kernel.seen[1].items() if n not in first
    }


def test_store_likewise() -> None:
    problem = Problem("store", 64, 1, FORMAT)
    kernel = Recorder(default_config(problem))

    def call() -> dict[str, torch.Tensor]:
        key, value = torch.randn(2, 5, 2, 64)
        cache = torch.zeros(3, 16, 2, problem.layout.slot_bytes, dtype=torch.uint8)
        return {
            "key": key.bfloat16(), "value": value.bfloat16(), "kv_cache": cache, "slot_mapping": torch.arange(5)
        }  # fmt: skip

    first, second, centroids = call(), call(), torch.arange(16.0)
    ordered = (first["kv_cache"], first["key"], first["value"], first["slot_mapping"])
    params, _ = store_params(*ordered, cache_format=FORMAT, centroids=centroids)
    prepared = Prepared(kernel, [("wph_store", GEOMETRY)], params, (centroids,))  # type: ignore[arg-type]
    prepared.launch(**second)
    assert all(kernel.seen[0][name] == tensor.data_ptr() for name, tensor in second.items())


def test_a_forgotten_pointer_is_an_error_and_nothing_is_launched() -> None:
    kernel = Recorder(default_config(Problem("decode", 64, 2, FORMAT)))
    tensors, centroids = decode_call(1)
    prepared = prepare_decode(kernel, tensors, centroids)
    for name in tensors:
        with pytest.raises(KeyError, match=name):
            prepared.launch(**{n: t for n, t in tensors.items() if n != name})
    assert kernel.seen == []


def test_launches_are_prepared_once_per_key_and_forgotten_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.vllm.prepared._REMEMBERED", 3)
    launches = Launches()
    prepared = object()
    assert launches.get(1, lambda: prepared) is launches.get(1, lambda: object()) is prepared  # type: ignore[arg-type, return-value]
    for key in range(2, 9):
        launches.get(key, lambda: prepared)  # type: ignore[arg-type, return-value]
        assert len(launches._known) <= 3
