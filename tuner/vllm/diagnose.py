"""The vLLM part of ``doctor``: every link from the installed vLLM to a call that agrees with the reference."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib import metadata

from tuner.findings import Finding
from tuner.formats import VLLM_PRESETS
from tuner.space.core import Problem
from tuner.vllm import plugin, versions

_TOLERANCE = 5e-3
"""Relative error of one call per request and head; the rounding of bf16 output alone is 2e-3."""
_TUNE = "python tune.py --model ..., then python tune.py install"


def checks() -> list[tuple[str, Callable[[], Finding]]]:
    """Name and check of each link, in order; a check may raise."""
    return [
        ("vLLM", _version),
        ("vLLM plugin", _visible),
        ("vLLM seam", _seam),
        ("vLLM tables", _tables),
        ("vLLM kernels", _kernels),
    ]


def _version() -> Finding:
    version = versions.installed()
    reason = versions.objection(version)
    if reason is None:
        return Finding("vLLM", True, f"{version}, supported")
    return Finding("vLLM", False, reason, f"to serve with vLLM, install one of {versions.SUPPORTED}")


def _visible() -> Finding:
    name = "vLLM plugin"
    points = [p for p in metadata.entry_points(group=plugin.ENTRY_POINT_GROUP) if p.name == plugin.ENTRY_POINT]
    if not points:
        return Finding(name, False, "its entry point is not installed", "pip install this package, not only a checkout")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and plugin.ENTRY_POINT not in allowed.split(","):
        return Finding(
            name, False, f"VLLM_PLUGINS={allowed} leaves it out", f"add {plugin.ENTRY_POINT} to it, or unset it"
        )
    if os.environ.get("WPH_DISABLE", "") not in ("", "0"):
        return Finding(name, False, "WPH_DISABLE is set", "unset it")
    return Finding(name, True, f"{points[0].name} = {points[0].value}")


def _seam() -> Finding:
    if versions.installed() is None:
        return Finding("vLLM seam", False, "no vLLM to look at", "install vLLM to serve with it")
    reason = plugin.objection()
    if reason is None:
        return Finding("vLLM seam", True, "its TurboQuant backend is the one that the plugin knows")
    return Finding("vLLM seam", False, reason, f"vLLM's own kernels run; supported: {versions.SUPPORTED}")


def _tables() -> Finding:
    from tuner.table import verify
    from tuner.table.install import DEFAULTS_PATTERN, TABLE_PATTERN, install_folder

    folder = install_folder()
    tables = sorted(folder.glob(TABLE_PATTERN))
    broken = [problem for path in tables for problem in verify(path)]
    if broken:
        return Finding("vLLM tables", False, "; ".join(broken), "python tune.py install, or tune again")
    prebuilt = len(list(folder.glob(DEFAULTS_PATTERN)))
    if not tables and not prebuilt:
        return Finding("vLLM tables", False, f"none in {folder}", _TUNE)
    return Finding("vLLM tables", True, f"{len(tables)} whole in {folder}, and {prebuilt} sets of default kernels")


def _kernels() -> Finding:
    """Loads what a worker with this GPU would load, and runs each problem once against the reference."""
    import torch

    if not torch.cuda.is_available():
        return Finding("vLLM kernels", False, "no GPU to load them on", "run doctor on the machine that serves")
    results = list(_calls())
    wrong = [text for ok, text in results if not ok]
    if wrong:
        return Finding("vLLM kernels", False, "; ".join(wrong), "vLLM's own kernels run there: tune and install again")
    if not results:
        return Finding("vLLM kernels", False, f"none for {torch.cuda.get_device_name()}", _TUNE)
    return Finding("vLLM kernels", True, "; ".join(text for _, text in results))


def _calls() -> Iterator[tuple[bool, str]]:
    """(agrees, text) for every problem with a table or default kernels for the current device."""
    import torch

    from tuner.formats import HEAD_DIMS
    from tuner.space.core import MAX_GQA
    from tuner.table import find
    from tuner.targets import attached
    from tuner.vllm.defaults import find as find_defaults

    device = torch.cuda.current_device()
    target = attached(device)
    if target is None:
        return
    for cache_format in VLLM_PRESETS:
        for head_dim in HEAD_DIMS:
            for gqa in range(1, MAX_GQA + 1):
                problem = Problem("decode", head_dim, gqa, cache_format)
                if find(problem, target.device_name) or find_defaults(problem, target.arch):
                    yield _call(problem, device)


def _call(problem: Problem, device: int) -> tuple[bool, str]:
    import torch

    from tuner.reference import synthetic_cache
    from tuner.vllm.eligible import LayerFacts
    from tuner.vllm.layer import Layer

    kv_heads = 2
    what = f"{problem.cache_format} head dim {problem.head_dim} gqa {problem.gqa}"
    case = synthetic_cache(problem.layout, (1, 0, 77, 700), q_heads=kv_heads * problem.gqa, kv_heads=kv_heads)
    expected = case.expected()
    case = case.to(torch.device("cuda", device))
    facts = LayerFacts(problem.head_dim, kv_heads * problem.gqa, kv_heads, problem.cache_format, case.scale)
    layer = Layer(facts)
    out = layer.decode(case.query, case.kv_cache, case.block_table, case.seq_lens, case.codec.centroids, 700)
    if out is None or layer.dispatch is None:
        return False, f"{what}: {layer.reason or 'no kernel reads a fresh cache'}"
    difference = (out.double().cpu() - expected).norm(dim=-1)
    error = float((difference / expected.norm(dim=-1).clamp_min(1e-30))[[0, 2, 3]].max())
    if not error <= _TOLERANCE or bool(out[1].any()):
        return False, f"{what}: off by {error:.1e} from the reference"
    return True, f"{what}: {layer.dispatch.describe()}, error {error:.1e}"
