"""vLLM's own TurboQuant decode kernel, unmodified: from an installed vLLM, or from its sources alone.

``WPH_VLLM_SOURCE`` names a directory that contains ``vllm/v1/attention/ops/`` with triton_turboquant_decode.py and
triton_decode_attention.py (for the store also triton_turboquant_store.py). Beside each other those files import only
``vllm.platforms`` and ``vllm.triton_utils``, so empty packages that point at the directory and two small modules are
enough; nothing else of vLLM runs.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from tuner.baselines.inputs import Constants, DecodeInputs
from tuner.baselines.support import hadamard_matrix, no_triton_here, package_folder
from tuner.errors import TunerError
from tuner.formats import VLLM_PRESETS
from tuner.space.core import Problem

SOURCE_VARIABLE = "WPH_VLLM_SOURCE"
SPLITS = 32
OPS = "vllm.v1.attention.ops"
"""The package of vLLM's kernels."""
_MODULE = f"{OPS}.triton_turboquant_decode"
_FILES = ("triton_turboquant_decode.py", "triton_decode_attention.py")


class _Platform:
    """What the files ask of ``current_platform``: which vendor. These baselines run on CUDA or interpreted."""

    def is_cuda(self) -> bool:
        import torch

        return torch.cuda.is_available()

    def is_cuda_alike(self) -> bool:
        return self.is_cuda()

    def is_rocm(self) -> bool:
        return False

    def is_xpu(self) -> bool:
        return False


def unavailable(name: str, device: Any, problem: Problem, files: tuple[str, ...] = _FILES) -> str | None:
    """Why vLLM's kernel, whose sources are ``files``, cannot run on ``device`` for ``problem``, or None."""
    if problem.cache_format not in VLLM_PRESETS:
        return f"vLLM has no format {problem.cache_format}"
    return missing_source(files) or no_triton_here(device)


def prepare(name: str, inputs: DecodeInputs, constants: Constants | None = None) -> Any:
    """A call of vLLM's launcher with its scratch made here, as vLLM's workspace does; returns out [B, Hq, D]."""
    import torch

    problem = inputs.problem("decode")
    reason = unavailable(name, inputs.query.device, problem)
    if reason:
        raise TunerError(f"baseline {name} is not available: {reason}")
    launcher = load_launcher()
    layout, query = inputs.layout, inputs.query
    batch, q_heads, head_dim = query.shape
    rotation = hadamard_matrix(head_dim, query.device)
    arguments = {
        "query": query,
        "kv_cache": inputs.kv_cache,
        "block_table": inputs.block_table,
        "seq_lens": inputs.seq_lens,
        "Pi": rotation,
        "PiT": rotation,
        "centroids": inputs.codec.centroids,
        "scale": inputs.scale,
        "mse_bits": layout.key.bits,
        "key_packed_size": layout.key.size,
        "value_quant_bits": layout.value.bits,
        "key_fp8": not layout.format.key_codebook,
        "norm_correction": layout.format.norm_correction,
        "mid_o_buf": torch.empty(batch, q_heads, SPLITS, head_dim + 1, dtype=torch.float32, device=query.device),
        "output_buf": torch.empty_like(query, memory_format=torch.contiguous_format),
        "lse_buf": torch.empty(batch, q_heads, dtype=torch.float32, device=query.device),
        "max_num_kv_splits": SPLITS,
    }
    return lambda: launcher(**arguments)


def load_launcher() -> Any:
    """vLLM's ``triton_turboquant_decode_attention``. Raises TunerError where vLLM and its sources are missing."""
    reason = missing_source()
    if reason:
        raise TunerError(reason)
    return load_op(_MODULE, "triton_turboquant_decode_attention")


def load_op(module: str, launcher: str) -> Any:
    """``launcher`` of a ``module`` of vLLM's package ``OPS``, from where ``missing_source`` found it.

    Raises TunerError where this vLLM has none: versions without TurboQuant.
    """
    source = os.environ.get(SOURCE_VARIABLE)
    if source and "vllm" not in sys.modules:
        _install_packages(Path(source))
    try:
        return getattr(importlib.import_module(module), launcher)
    except (ImportError, AttributeError) as error:
        raise TunerError(f"this vLLM has no {module}.{launcher}: {error}") from error


def source_file() -> Path | None:
    """Of vLLM's kernel, where it is at hand."""
    source = os.environ.get(SOURCE_VARIABLE)
    root = Path(source) / "vllm" if source else package_folder("vllm")
    path = root / "v1" / "attention" / "ops" / _FILES[0] if root else None
    return path if path is not None and path.is_file() else None


def missing_source(files: tuple[str, ...] = _FILES) -> str | None:
    """What to do where neither vLLM nor ``files`` of its kernels are at hand, or None."""
    source = os.environ.get(SOURCE_VARIABLE)
    if source:
        missing = [f for f in files if not (Path(source) / "vllm/v1/attention/ops" / f).is_file()]
        return f"{SOURCE_VARIABLE}={source} has no vllm/v1/attention/ops/{missing[0]}" if missing else None
    if package_folder("vllm"):
        return None
    return f"vLLM is not installed: install it, or set {SOURCE_VARIABLE} to a directory with its sources"


def _install_packages(source: Path) -> None:
    """Makes the parent packages of the kernel's module importable without running their own ``__init__``."""
    import triton
    import triton.language as tl

    package = ""
    for part in _MODULE.split(".")[:-1]:
        package = f"{package}.{part}" if package else part
        module = ModuleType(package)
        module.__path__ = [str(source / package.replace(".", "/"))]
        sys.modules[package] = module
    _module("vllm.platforms", current_platform=_Platform())
    _module("vllm.triton_utils", triton=triton, tl=tl)


def _module(name: str, **attributes: Any) -> None:
    module = ModuleType(name)
    module.__dict__.update(attributes)
    sys.modules[name] = module
