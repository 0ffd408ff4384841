"""More GPUs for one search: a process for each, which works on the same study and writes no table."""

from __future__ import annotations

import multiprocessing
import sys
import time
from dataclasses import replace
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tuner.errors import UsageError

if TYPE_CHECKING:
    from tuner.search import TuneRequest


class Helpers:
    """Processes for ``devices`` beside the caller's own; ends them when left. None are started without a GPU."""

    def __init__(self, request: TuneRequest, devices: tuple[int, ...]) -> None:
        self._request = request
        self._devices = devices
        self._processes: list[BaseProcess] = []

    def start(self, left_s: float) -> None:
        """Starts the processes unless they run; to be called once a first event shows that the study exists.

        ``left_s``: seconds after which they begin no further trial.
        """
        if self._processes or not self._devices:
            return
        context, deadline = multiprocessing.get_context("spawn"), time.time() + left_s
        for device in self._devices:
            request = replace(self._request, device=device, output=None, resume=True)
            process = context.Process(target=_help, args=(request, deadline), daemon=True)
            process.start()
            self._processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.terminate()
            process.join()


def _help(request: TuneRequest, deadline: float) -> None:
    from tuner.errors import TunerError
    from tuner.search import work

    left_s = deadline - time.time()  # this process has taken seconds to start
    if left_s <= 0:
        return
    try:
        work(replace(request, timeout_s=left_s))
    except TunerError as error:
        sys.exit(f"GPU {request.device} stops helping: {error}")


def expect_attached(arch: str, devices: tuple[int, ...]) -> None:
    """Raises UsageError unless every one of ``devices`` is a GPU of ``arch``."""
    from tuner.targets import attached

    for device in devices:
        target = attached(device)
        if target is None or target.arch != arch:
            there = "is not attached" if target is None else f"is {target.arch}"
            raise UsageError(f"--gpus names GPU {device}, which {there}: expected GPUs of {arch}, or no --gpus")
