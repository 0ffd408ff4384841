"""Small things that several baselines need: can Triton run here, the Hadamard matrix."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def interpreted() -> bool:
    """Triton kernels run on the CPU: TRITON_INTERPRET was set before triton was imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def package_folder(name: str) -> Path | None:
    """Where the installed package ``name`` lies, without importing it; None where it is not installed."""
    try:
        spec = find_spec(name)
    except ValueError:  # a stand-in without a spec is in its place
        return None
    folders = spec.submodule_search_locations if spec else None
    return Path(folders[0]) if folders else None


def no_cuda(device: Any) -> str | None:
    """Why CUDA code cannot run on ``device``, or None where it can."""
    import torch

    if torch.device(device).type != "cuda":
        return f"needs an NVIDIA GPU: the device is {torch.device(device).type}"
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU: torch sees none"
    return None


def no_triton_here(device: Any) -> str | None:
    """Why a Triton kernel cannot run on ``device``, or None where it can."""
    if interpreted():
        return None
    reason = no_cuda(device)
    return reason and f"{reason} (TRITON_INTERPRET=1 runs Triton on the CPU, slowly)"


def hadamard_matrix(n: int, device: Any) -> Tensor:
    """Sylvester's Hadamard matrix over sqrt(n), fp32 [n, n]: symmetric and orthogonal. ``n`` is a power of two."""
    import torch

    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return (matrix / n**0.5).float().to(device)
