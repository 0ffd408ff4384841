"""The vLLM part of ``doctor``: every link from the installed vLLM to a call that agrees with the reference."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from tuner.errors import TunerError
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
    """Every file that vLLM may find, in all folders that it looks in."""
    from tuner.table import verify
    from tuner.table.install import DEFAULTS_PATTERN, TABLE_PATTERN
    from tuner.table.store import PACKAGE_TABLES, folders

    broken: list[str] = []
    found: list[str] = []
    for folder in folders():
        tables, prebuilt = sorted(folder.glob(TABLE_PATTERN)), sorted(folder.glob(DEFAULTS_PATTERN))
        broken += [problem for path in tables for problem in verify(path)]
        broken += [str(problem) for path in prebuilt if (problem := _broken_defaults(path)) is not None]
        where = "with the package" if folder == PACKAGE_TABLES else f"in {folder}"
        counts = [f"{len(tables)} tables"] if tables else []
        counts += [f"{len(prebuilt)} sets of default kernels"] if prebuilt else []
        found += [f"{' and '.join(counts)} {where}"] if counts else []
    if broken:
        return Finding("vLLM tables", False, "; ".join(broken), "python tune.py install, or tune again")
    if not found:
        return Finding("vLLM tables", False, f"none in {', '.join(map(str, folders()))}", _TUNE)
    return Finding("vLLM tables", True, f"whole: {', '.join(found)}")


def _broken_defaults(path: Path) -> TunerError | None:
    from tuner.vllm import defaults

    try:
        defaults.read(path)
    except TunerError as error:
        return error
    return None


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
            problem = Problem("store", head_dim, 1, cache_format)
            if find(problem, target.device_name):
                yield _store_call(problem, device)


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
    layer.prepare(torch.device("cuda", device), what, 700)
    layer.reserve(len(case.seq_lens), case.query.dtype)
    out = layer.decode(case.query, case.kv_cache, case.block_table, case.seq_lens, case.codec.centroids, 700)
    if out is None or layer.dispatch is None:
        return False, f"{what}: {layer.reason or 'no kernel reads a fresh cache'}"
    difference = (out.double().cpu() - expected).norm(dim=-1)
    error = float((difference / expected.norm(dim=-1).clamp_min(1e-30))[[0, 2, 3]].max())
    if not error <= _TOLERANCE or bool(out[1].any()):
        return False, f"{what}: off by {error:.1e} from the reference"
    return True, f"{what}: {layer.dispatch.describe()}, error {error:.1e}"


def _store_call(problem: Problem, device: int) -> tuple[bool, str]:
    import torch

    from tuner.check_store import compare, store_case
    from tuner.reference import store
    from tuner.vllm.store import StoreLayer

    what = f"store of {problem.cache_format} head dim {problem.head_dim}"
    case = store_case(problem, 64, kv_heads=2, seed=0, device=f"cuda:{device}", index_dtype=torch.int64)
    layer = StoreLayer(problem.head_dim, 2, problem.cache_format)
    layer.prepare(torch.device("cuda", device))
    got, want = case.before.clone(), case.before.clone()
    if not layer.store(case.key, case.value, got, case.slot_mapping, case.codec.centroids) or layer.dispatch is None:
        return False, f"{what}: {layer.reason or 'no kernel for 64 tokens'}"
    store(want, case.key, case.value, case.slot_mapping, case.codec)
    fault = compare(got, want, case).fault
    return fault is None, f"{what}: {fault or 'agrees with the reference'}"
