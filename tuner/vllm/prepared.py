"""Launches whose arguments were checked once: shapes and strides are their key, addresses come with every call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from tuner.abi import STRUCTURES
from tuner.geometry import Geometry
from tuner.launch import LoadedKernel

_REMEMBERED = 2048
_CODE = ("centroids", "signs", "channels")


class Prepared:
    """``params`` is the kernel's structure. The driver copies it when it launches or captures, so one serves any number
    of calls; ``keep``: tensors that it goes on pointing to.
    """

    def __init__(
        self, kernel: LoadedKernel, launches: list[tuple[str, Geometry]], params: Any, keep: tuple[Tensor, ...]
    ) -> None:
        self._kernel, self._launches, self._params, self._keep = kernel, launches, params, keep
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        fields = STRUCTURES[kernel.config.problem.op][1]
        self._varying = tuple(name for name, kind, _ in fields if isinstance(kind, str) and name not in _CODE)

    def launch(self, **tensors: Tensor) -> None:
        """One tensor for every pointer of the structure but the format's constants. Raises KeyError for one left out:
        an address of an earlier call may be freed memory."""
        for name in self._varying:
            setattr(self._params, name, tensors[name].data_ptr())
        for entry, geometry in self._launches:
            self._kernel.launch(entry, geometry, ctypes.addressof(self._pointers))


class Launches:
    """The prepared launches of one layer, by all that their arguments depend on but addresses."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Prepared] = {}

    def get(self, key: Hashable, prepare: Callable[[], Prepared]) -> Prepared:
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            found = self._known[key] = prepare()
        return found
