"""A cubin on the GPU: load it, keep its scratch, launch it on torch's current stream."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tuner.space import Config

if TYPE_CHECKING:
    from torch import Tensor

    from tuner.reference import Codec


class LoadedKernel:
    """The entry points of one configuration's cubin, loaded into the primary context of ``device``."""

    @classmethod
    def load(cls, cubin: bytes | Path, config: Config, device: int | None = None) -> LoadedKernel:
        """Loads ``cubin``; ``device`` None is torch's current one. Raises TunerError if the driver refuses it."""
        raise NotImplementedError


class Workspace:
    """Scratch of one device, grown before capture and never freed while a captured graph may use it."""


class DecodeCall:
    """One prepared decode: fixed tensors, any number of launches, none of which allocates, reads or waits."""

    def __init__(
        self,
        kernel: LoadedKernel,
        query: Tensor,
        kv_cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        out: Tensor,
        *,
        scale: float,
        codec: Codec,
        splits: int,
        workspace: Workspace | None = None,
    ) -> None:
        raise NotImplementedError

    def __call__(self) -> None:
        """Launches on torch's current stream of the kernel's device."""
        raise NotImplementedError


class DequantCall:
    """One prepared dequantisation; see DecodeCall."""

    def __init__(
        self,
        kernel: LoadedKernel,
        kv_cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        key_out: Tensor | None,
        value_out: Tensor | None,
        *,
        codec: Codec,
        by_block_id: bool = False,
    ) -> None:
        raise NotImplementedError

    def __call__(self) -> None:
        raise NotImplementedError
