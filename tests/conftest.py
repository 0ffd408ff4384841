"""GPU tests skip where there is no GPU; the run ends by saying what was skipped and why."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import pytest


def _gpus() -> list[str]:
    """Which GPUs the tests may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def pytest_xdist_auto_num_workers() -> int | None:
    """One process for each GPU, since tests time kernels on it; None where there is none: as many as cores."""
    return len(_gpus()) or None


def pytest_configure(config: pytest.Config) -> None:
    """A shell starts what runs in the background with SIGINT ignored, and so would every process of a test be. The
    tests' processes are as many as cores, so torch has one thread in each. Of several GPUs each process has its own."""
    if hasattr(config, "workerinput") and (gpus := _gpus()):
        number = int(config.workerinput["workerid"].removeprefix("gw"))
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
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
