"""The start-up summary: which layers run which kernel, on what evidence, and why the others do not."""

from __future__ import annotations

from collections.abc import Mapping

from tuner.table import Table
from tuner.vllm.layer import Layer


def summary(layers: Mapping[str, Layer], *, detail: bool = False) -> list[str]:
    """One line per kind of layer; with ``detail`` also one per layer."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault((layer.facts.describe(), verdict(layer)), []).append(name)
    lines = [f"{len(names)} layer{'s' * (len(names) > 1)} ({shape}): {what}" for (shape, what), names in groups.items()]
    if detail:
        lines += [f"{name}: {verdict(layer)}" for name, layer in layers.items()]
    return lines


def verdict(layer: Layer) -> str:
    """What runs ``layer``."""
    if layer.reason is not None:
        return f"vLLM's kernel: {layer.reason}"
    if layer.dispatch is None:
        return "vLLM's kernel: nothing was loaded for it"
    table = layer.dispatch.table
    return layer.dispatch.describe() + (f"; {share(table)}" if table is not None else "")


def share(table: Table) -> str:
    """Range of the memory-bound limit's share over the table's choices, and where each end is."""
    buckets = [(e.batch, e.timing) for e in table.by_batch_and_context]
    buckets = buckets or [(e.batch, t) for e in table.by_batch for t in e.timings]
    if not buckets:
        return "no times"
    ends = [f(buckets, key=lambda b: b[1].limit_share) for f in (min, max)]
    low, high = (f"{t.limit_share:.0%} (batch {batch} x {t.context})" for batch, t in ends)
    return f"{table.evidence} share of the memory limit {low} to {high}"
