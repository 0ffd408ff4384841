"""Before anything is served: which layers of a model will use which kernel, and what will fall back, and why."""

from __future__ import annotations

from tuner.errors import TunerError
from tuner.table import find, read
from tuner.targets import Target
from tuner.vllm import defaults
from tuner.vllm.dispatch import coverage
from tuner.vllm.eligible import LayerFacts, objection
from tuner.vllm.summary import share
from tuner.workload import Shape, Workload

BOUNDARY = "vLLM itself keeps the first and last two attention layers of a dense model uncompressed"


def forecast(workload: Workload, cache_format: str, target: Target) -> list[str]:
    """One line per kind of layer, from the tables and default kernels that vLLM would find for ``target``."""
    lines = []
    for shape, count in workload.shapes:
        facts = _facts(shape, cache_format)
        layers = f"{count} layer{'s' * (count > 1)}"
        lines.append(f"{layers} ({facts.describe()}): {_kernel(facts, target)}")
    return [*lines, BOUNDARY]


def _facts(shape: Shape, cache_format: str) -> LayerFacts:
    features = (shape.wants,) if shape.wants else ()
    return LayerFacts(shape.head_dim, shape.q_heads, shape.kv_heads, cache_format, 1.0, features)


def _kernel(facts: LayerFacts, target: Target) -> str:
    reason = objection(facts)
    if reason is not None:
        return f"vLLM's kernel: {reason}"
    problem = facts.problem
    path = find(problem, target.device_name)
    prebuilt = defaults.find(problem, target.arch)
    try:
        if path is not None:
            table = read(path, arch=target.arch)
            return f"{len(table.kernels)} kernels of {path.name}{coverage(table, facts.kv_heads)}; {share(table)}"
        if prebuilt is not None:
            defaults.read(prebuilt, problem, target.arch)
            return f"default kernel of {prebuilt.name}"
    except TunerError as error:
        return f"vLLM's kernel: {error}"
    return f"vLLM's kernel: no table for {target.device_name}; tune with --head-dim {facts.head_dim} or --model"
