"""The entry point: replaces vLLM's TURBOQUANT backend by ours, by name, or says in one line why not."""

from __future__ import annotations

import os
from importlib import util
from pathlib import Path

from tuner.vllm import log, seam, versions

CLASS_PATH = "tuner.vllm.backend.WphTurboQuantBackend"
ENTRY_POINT_GROUP, ENTRY_POINT = "vllm.general_plugins", "wph"


def register() -> None:
    """Called by vLLM in every process, before CUDA: registers a class path and imports nothing heavy.

    May be called any number of times. Never raises: an exception here would end vLLM's start-up.
    """
    try:
        reason = objection()
        if reason is None:
            reason = _register()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        log.say(f"stepping aside, vLLM's own TurboQuant kernels run: {reason}")


def objection() -> str | None:
    """Why the plugin does not take part here, None where it does. Imports no vLLM module beyond package files."""
    if os.environ.get("WPH_DISABLE", "") not in ("", "0"):
        return "WPH_DISABLE is set"
    reason = versions.objection(versions.installed())
    if reason is not None:
        return reason
    spec = util.find_spec(seam.MODULE)
    if spec is None or spec.origin is None:
        return f"this vLLM has no {seam.MODULE}"
    reason = seam.objection(Path(spec.origin).read_text(encoding="utf-8"))
    if reason is not None:
        return reason
    return _damage()


def _register() -> str | None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    member = AttentionBackendEnum.TURBOQUANT
    if member.is_overridden() and member.get_path() != CLASS_PATH:
        return f"another plugin provides TURBOQUANT: {member.get_path()}"
    register_backend(member, CLASS_PATH)
    return None


def _damage() -> str | None:
    """vLLM imports our backend later, where a file that does not parse would end it: looked at now."""
    backend = Path(__file__).with_name("backend.py")
    try:
        compile(backend.read_bytes(), str(backend), "exec")
    except (OSError, SyntaxError, ValueError) as error:
        return f"{backend} is damaged: {error}"
    return None
