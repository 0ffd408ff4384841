"""GPU tests skip where there is no GPU; the run ends by saying what was skipped and why."""

from __future__ import annotations

import os
import signal
from collections import Counter
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from xdist.workermanage import WorkerController


@cache
def _gpus() -> tuple[str, ...]:
    """The GPUs that CUDA sees, as CUDA_VISIBLE_DEVICES names them."""
    if not Path("/dev/nvidiactl").exists():
        return ()
    import torch

    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(named.split(",") if named else map(str, range(count)))[:count]


def pytest_xdist_auto_num_workers() -> int | None:
    """One process for each GPU, since tests time kernels on it; None where there is none: as many as cores."""
    return len(_gpus()) or None


def pytest_configure_node(node: WorkerController) -> None:
    """Says to a process that is about to start which GPU is its own."""
    if _gpus():
        number = int(node.workerinput["workerid"].removeprefix("gw"))
        node.workerinput["gpu"] = _gpus()[number % len(_gpus())]


def pytest_configure(config: pytest.Config) -> None:
    """A process sees the GPU that it was given, if any. A shell starts what runs in the background with SIGINT ignored,
    and so would every process of a test be. Where there is no GPU the tests' processes are as many as cores, so torch
    has one thread in each."""
    if gpu := getattr(config, "workerinput", {}).get("gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU: torch sees none"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons: dict[str, Counter[str]] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        files = reasons.setdefault(reason.removeprefix("Skipped: "), Counter())
        files[Path(report.nodeid.partition("::")[0]).name] += 1
    if not reasons:
        return
    terminalreporter.section("not tested here, and why")
    for reason, files in sorted(reasons.items()):
        where = ", ".join(f"{name} ({count})" for name, count in sorted(files.items()))
        terminalreporter.write_line(f"{sum(files.values())} skipped: {reason}: {where}")
