"""Which releases of vLLM the plugin works with."""

from __future__ import annotations

import re
from importlib import metadata

SUPPORTED = "0.20.2, 0.22 to 0.25.0, 0.27 to 0.33"
_EXACT = {(0, 20, 2), (0, 25, 0)}
_MINORS = {22, 23, 24, *range(27, 34)}
_BROKEN = "TurboQuant itself is broken in vLLM 0.25.1 and 0.26 (cache dtype 'auto'); use 0.25.0, or 0.27 or later"


def installed() -> str | None:
    """Version of the installed vLLM, None without one."""
    try:
        return metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return None


def objection(version: str | None) -> str | None:
    """Why the plugin does not work with ``version`` of vLLM, None where it does."""
    if version is None:
        return f"vLLM is not installed (supported: {SUPPORTED})"
    match = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)(?:\.post\d+)?(?:\+.*)?", version)
    if not match:
        return f"vLLM {version} is no release (supported: {SUPPORTED})"
    release = tuple(map(int, match.groups()))
    if release in _EXACT or (release[0] == 0 and release[1] in _MINORS):
        return None
    if release[:2] == (0, 26) or (release[:2] == (0, 25) and release[2] > 0):
        return f"vLLM {version}: {_BROKEN}"
    return f"vLLM {version} is not known to this plugin (supported: {SUPPORTED})"
