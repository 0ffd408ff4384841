"""Where a table comes from: versions, commit, date, device."""

from __future__ import annotations

import shutil
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from tuner.errors import TunerError
from tuner.search.request import TuneRequest
from tuner.table.schema import Device, Provenance

_CUPY = ("cupy-cuda13x", "cupy-cuda12x", "cupy")


def provenance_of(request: TuneRequest) -> Provenance:
    from tuner.baselines import fingerprints
    from tuner.render import templates_digest

    return Provenance(
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        seed=request.seed,
        nvcc=_nvcc(request.target.arch),
        torch=version("torch"),
        triton=version("triton"),
        cupy=next((v for name in _CUPY if (v := version(name))), None),
        vllm=version("vllm"),
        optuna=version("optuna"),
        git_commit=_commit(),
        template_hash=templates_digest(),
        peers=tuple(fingerprints().items()) if request.evidence == "measured" else (),
    )


def device_of(request: TuneRequest) -> Device:
    """The target; its driver only where it is attached and was measured on."""
    driver = driver_of(request.device) if request.evidence == "measured" else None
    return Device(request.target.device_name, request.target.arch, request.target.sms, driver)


def version(distribution: str) -> str | None:
    """Of an installed distribution; None where it is not."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _nvcc(arch: str) -> str | None:
    from tuner import toolchain

    try:
        return toolchain.find((arch,)).version
    except TunerError:
        return None


def _commit() -> str | None:
    """Of the checkout that this package runs from; None for an installed wheel, or where its code has changed since."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    same = _output([*git, "diff", "--quiet", "HEAD", "--", "templates", "tuner"])
    return None if same is None else _output([*git, "rev-parse", "HEAD"])


def driver_of(device: int) -> str | None:
    """Version of the driver of the GPU with that index; None without nvidia-smi."""
    return _output(["nvidia-smi", f"--id={device}", "--query-gpu=driver_version", "--format=csv,noheader"]) or None


def _output(command: list[str]) -> str | None:
    """What ``command`` prints; None where it fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    return done.stdout.strip()
