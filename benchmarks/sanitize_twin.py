"""Twins of kernels, for racecheck: the same accesses, ordered by what it can follow.

It is documented to follow mbarriers, but cannot be relied on (sanitize.py asks it) where

- warps meet at a named barrier without the rest of their CTA: a twin has another ``sync_named``, by mbarriers that lie
  behind the kernel's dynamic shared memory. A static array would come before that and move it, which kernels with a
  lookup table do not bear;
- one lane says for its warp, behind a barrier of the warp, that a stage has been read, and another warp fills it
  again: in a twin every lane says so;
- a thread arrives at an mbarrier that it has initialised itself, by an instruction that the compiler made one of the
  whole warp, without having met anyone: in a twin the CTA meets between the two.

A twin's edges may hide a fault: without the barrier of the warp in the second case, or the initialisation's fence in
the third, a kernel would race and its twin would not. A kernel without that barrier has no twin, and the emulator finds
both (tests/test_emulate_races.py).
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from tuner.errors import TunerError
from tuner.geometry import Geometry, dynamic_shared_bytes
from tuner.launch import LoadedKernel
from tuner.render import Source, render
from tuner.space import Config
from tuner.space.plan import DecodePlan

_MEETING = Path(__file__).resolve().parent / "sanitize_meeting.cuh"
_BARRIERS_BYTES, _PARITY_BYTES = 128, 4
"""Of all mbarriers, and of each thread's parity, in sanitize_meeting.cuh."""
_MEMORY = "extern __shared__ __align__(128) unsigned char smem[];\n"
_ENTRY = re.compile(r"^extern \"C\" __global__ .* wph_(?:decode|dequant)\(const __grid_constant__ \w+ p\) \{\n", re.M)
_CALL = "sync_named("
_TOGETHER = "sync_warp();\n        "
_BY_LANE = (
    (", STRIPE_WARPS);\n", ", 32 * STRIPE_WARPS);\n"),
    (f"{_TOGETHER}if (lane == 0) mbarrier_arrive(empty_barrier(", f"{_TOGETHER}mbarrier_arrive(empty_barrier("),
)
"""How a stage is given back, and how in a twin."""
_INBOX = (("    open_inbox(thread);\n", "    open_inbox(thread);\n    sync_cta();\n"),)
"""How the mbarrier is initialised that counts what a cluster stores, and how in a twin."""


def has_named_barriers(config: Config) -> bool:
    """Whether some of a CTA's warps meet without the others: those that share a token, or its two halves."""
    return config.problem.op in ("decode", "dequant") and config["dim_warps"] > 1


def needs_twin(config: Config) -> bool:
    """Whether the kernel does any of what racecheck cannot be relied on to follow. Where one warp fills all stages and
    none of the rest is done, it never went wrong.
    """
    if config.problem.op != "decode":
        return has_named_barriers(config)
    plan = DecodePlan(config)
    return has_named_barriers(config) or plan.asks_in_turn or plan.pushes


def _replaced(config: Config) -> tuple[tuple[str, str], ...]:
    """What of the kernel's text is replaced, each once, and by what."""
    if config.problem.op != "decode":
        return ()
    plan = DecodePlan(config)
    return (_BY_LANE if plan.bulk else ()) + (_INBOX if plan.pushes else ())


def twin(config: Config) -> Source:
    """The source of ``config``'s twin. Raises TunerError where it needs none, or where its text is not as expected."""
    text = render(config).text
    if not needs_twin(config):
        raise TunerError(f"no twin of {config.describe()}: racecheck follows the kernel itself")
    for old, new in _replaced(config):
        if text.count(old) != 1:
            raise TunerError(f"no twin of {config.describe()}: expected one {old.strip()!r}")
        text = text.replace(old, new)
    return Source(config, _with_meetings(config, text) if has_named_barriers(config) else text)


def _with_meetings(config: Config, text: str) -> str:
    """``text`` with another ``sync_named``."""
    before, _, after = text.partition(_MEMORY)
    entries = list(_ENTRY.finditer(after))
    # Before the shared memory the primitive is defined, behind it it is called.
    if before.count(_CALL) != 1 or _CALL not in after or _MEMORY in after or len(entries) != 1:
        raise TunerError(f"no twin of {config.describe()}: expected one {_MEMORY.strip()!r}, then calls of sync_named")
    meeting = f"constexpr int MEETINGS_AT = {dynamic_shared_bytes(config)};\n{_MEETING.read_text()}"
    ids, threads = config["warps"] // config["dim_warps"], 32 * config["dim_warps"]
    begin = entries[0].end()
    body = f"{after[:begin]}    open_meetings({ids}, {threads});\n{after[begin:]}"
    return f"{before}{_MEMORY}\n{meeting}#define sync_named meet\n{body}"


def with_room(config: Config, geometry: Geometry) -> Geometry:
    """The geometry of the kernel's twin: shared memory for the mbarriers at which warps meet, too."""
    if not has_named_barriers(config):
        return geometry
    more = _BARRIERS_BYTES + _PARITY_BYTES * 32 * config["warps"]
    return replace(geometry, shared_bytes=geometry.shared_bytes + more)


class TwinKernel(LoadedKernel):
    """A twin's cubin: every launch has its room."""

    def launch(self, entry: str, geometry: Geometry, parameters: int) -> None:
        roomy = with_room(self.config, geometry)
        self.reserve_shared(entry, roomy.shared_bytes)
        super().launch(entry, roomy, parameters)
