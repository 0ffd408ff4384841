"""Twins of kernels in which some warps of a CTA meet by themselves: they meet at an mbarrier, for racecheck.

What racecheck says of named barriers cannot be relied on (sanitize.py asks); mbarriers it is documented to follow. A
twin is the kernel's own text with another ``sync_named``. Its mbarriers lie behind the kernel's dynamic shared memory:
a static array would come before that and move it, which kernels with a lookup table do not bear.
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

_MEETING = Path(__file__).resolve().parent / "sanitize_meeting.cuh"
_BARRIERS_BYTES, _PARITY_BYTES = 128, 4
"""Of all mbarriers, and of each thread's parity, in sanitize_meeting.cuh."""
_MEMORY = "extern __shared__ __align__(128) unsigned char smem[];\n"
_ENTRY = re.compile(r"^extern \"C\" __global__ .* wph_(?:decode|dequant)\(const __grid_constant__ \w+ p\) \{\n", re.M)
_CALL = "sync_named("


def twin(config: Config) -> Source:
    """The source of ``config`` with its named barriers replaced. Raises TunerError where it has none, or where the text
    around them is not as expected.
    """
    before, _, after = render(config).text.partition(_MEMORY)
    entries = list(_ENTRY.finditer(after))
    # Before the shared memory the primitive is defined, behind it it is called.
    if before.count(_CALL) != 1 or _CALL not in after or _MEMORY in after or len(entries) != 1:
        raise TunerError(f"no twin of {config.describe()}: expected one {_MEMORY.strip()!r}, then calls of sync_named")
    meeting = f"constexpr int MEETINGS_AT = {dynamic_shared_bytes(config)};\n{_MEETING.read_text()}"
    ids, threads = config["warps"] // config["dim_warps"], 32 * config["dim_warps"]
    begin = entries[0].end()
    body = f"{after[:begin]}    open_meetings({ids}, {threads});\n{after[begin:]}"
    text = f"{before}{_MEMORY}\n{meeting}#define sync_named meet\n{body}"
    return Source(config, text)


def with_room(config: Config, geometry: Geometry) -> Geometry:
    """The geometry of the kernel's twin: shared memory for the mbarriers, too."""
    more = _BARRIERS_BYTES + _PARITY_BYTES * 32 * config["warps"]
    return replace(geometry, shared_bytes=geometry.shared_bytes + more)


class TwinKernel(LoadedKernel):
    """A twin's cubin: every launch has its room."""

    def launch(self, entry: str, geometry: Geometry, parameters: int) -> None:
        roomy = with_room(self.config, geometry)
        self.reserve_shared(entry, roomy.shared_bytes)
        super().launch(entry, roomy, parameters)
