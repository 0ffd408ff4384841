"""The SM clock, through NVML's C library: no package is needed, and none of it may be there."""

from __future__ import annotations

import ctypes
import statistics
from collections import deque

_SM_CLOCK = 1
DROP = 0.9
"""A sample counts as throttled below this share of the usual clock."""
_MEMORY = 128
"""Readings whose median is the usual clock: an idle GPU may boost higher than any kernel lets it."""


class Clock:
    """Reads the SM clock of the GPU with this UUID ("GPU-..."); every reading is None where NVML fails."""

    def __init__(self, uuid: str) -> None:
        self._readings: deque[float] = deque(maxlen=_MEMORY)
        self._handle: ctypes.c_void_p | None = None
        try:
            self._library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return
        handle = ctypes.c_void_p()
        if self._library.nvmlInit_v2() == 0:
            name = ctypes.c_char_p(uuid.encode())
            if self._library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)) == 0:
                self._handle = handle

    def read_mhz(self) -> float | None:
        """The clock now."""
        if self._handle is None:
            return None
        value = ctypes.c_uint()
        if self._library.nvmlDeviceGetClockInfo(self._handle, _SM_CLOCK, ctypes.byref(value)) != 0:
            return None
        self._readings.append(float(value.value))
        return self._readings[-1]

    def throttled(self, clock_mhz: float | None) -> bool:
        """Whether the clock had dropped; False where it could not be read."""
        return clock_mhz is not None and clock_mhz < DROP * statistics.median(self._readings)
