"""Imports single modules of an unpacked vLLM without the rest of it.

The TurboQuant kernels need only torch and triton, but ``import vllm`` runs set-up code with many dependencies. Here
the packages on the way are empty modules that merely know their folder, and the two helpers that the kernels import
from vLLM itself are supplied. A process that does this cannot use the real vLLM.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

VARIABLE = "WPH_VLLM_SOURCE"
OPS = "vllm.v1.attention.ops"
TURBOQUANT = "vllm.model_executor.layers.quantization.turboquant"
_DECODE = "vllm/v1/attention/ops/triton_turboquant_decode.py"


def source() -> tuple[Path | None, str]:
    """(folder that contains vllm/, "") or (None, why there is none)."""
    value = os.environ.get(VARIABLE)
    if not value:
        return None, f"{VARIABLE} is not set: unpack a vLLM wheel (0.20 or later) and name the folder that holds vllm/"
    if not (Path(value) / _DECODE).is_file():
        return None, f"{VARIABLE}={value} holds no {_DECODE}"
    return Path(value), ""


def load(root: Path, name: str) -> ModuleType:
    """The module ``name`` ("vllm.x.y") from ``root``, unmodified."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        _supply(".".join(parts[:depth]), __path__=[str(root.joinpath(*parts[:depth]))])
    if "vllm.triton_utils" not in sys.modules:
        import triton
        import triton.language as tl

        _supply("vllm.triton_utils", triton=triton, tl=tl, HAS_TRITON=True)
        _supply("vllm.platforms", current_platform=_cpu_platform())
    return import_module(name)


def _supply(name: str, **attributes: object) -> None:
    if name not in sys.modules:
        module = ModuleType(name)
        vars(module).update(attributes)
        sys.modules[name] = module


def _cpu_platform() -> SimpleNamespace:
    def no() -> bool:
        return False

    return SimpleNamespace(is_cuda=no, is_rocm=no, is_xpu=no, is_cuda_alike=no, is_cpu=lambda: True)
