"""Device memory that a decode needs: from vLLM's workspace where there is one, else our own, all before capture."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tuner.launch import Workspace

_ALIGN_FLOATS = 64


class Scratch:
    """Partial results, output rows and arrival counters of one device, shared by layers that run one after another.

    vLLM's workspace serves partials and outputs. The counters must be zero between launches, so they never share it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._own = Workspace(device)

    def reserve(self, floats: int, counters: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        """Makes room for ``floats`` partials, ``counters`` and an output [rows, heads, head dim]; before capture."""
        self.counters(counters)
        self.take(floats, shape, dtype)

    def counters(self, count: int) -> Tensor:
        """int32, zero. Raises TunerError where they are missing during capture."""
        return self._own.counters(count)

    def take(self, floats: int, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """fp32 [floats] and ``dtype`` [shape], valid until the next call.

        Raises where they do not fit in what was reserved and that is locked or a graph is being captured.
        """
        manager = workspace_manager()
        if manager is not None:
            partials, out = manager.get_simultaneous(((floats,), torch.float32), (shape, dtype))
            return partials, out
        start = -(-floats // _ALIGN_FLOATS) * _ALIGN_FLOATS
        wanted = -(-shape[0] * shape[1] * shape[2] * dtype.itemsize // 4)
        both = self._own.partials(start + wanted)
        rows = both[start : start + wanted].view(dtype)
        return both[:floats], rows[: shape[0] * shape[1] * shape[2]].view(shape)


def workspace_manager() -> Any:
    """vLLM's workspace manager, None where this process has none."""
    module = sys.modules.get("vllm.v1.worker.workspace")
    if module is None or not module.is_workspace_manager_initialized():
        return None
    return module.current_workspace_manager()


@cache
def scratch_for(device: torch.device) -> Scratch:
    return Scratch(device)
