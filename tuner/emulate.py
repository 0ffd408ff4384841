"""Runs a rendered kernel on the CPU, lane by lane, under address, undefined-behaviour and alignment sanitizers, or
under the thread sanitizer, which finds data races.

The source is compiled, unchanged, with g++ and ``-DWPH_EMULATE`` against ``tuner/emulator/emulate.h``, and runs in
a child process: whatever a kernel does wrong arrives here as an EmulationError.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.emulator.compile import DEFAULT_ROOT, HasText, compile_many, compile_source
from tuner.emulator.report import EmulationError, failure
from tuner.emulator.request import Buffers, Launch, Request, check_launches

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["EmulationError", "HasText", "Launch", "compile_many", "compile_source", "emulate"]


def emulate(
    source: HasText,
    launches: Launch | Sequence[Launch],
    params: ctypes.Structure,
    buffers: Mapping[str, Tensor | NDArray[Any] | None],
    *,
    seed: int = 0,
    concurrent_ctas: int = 1,
    races: bool = False,
    timeout_s: float = 120.0,
    root: Path = DEFAULT_ROOT,
) -> None:
    """Runs ``launches`` one after another, all with ``params``, and writes the buffers back in place.

    ``buffers`` maps each pointer field of ``params`` to a CPU tensor or array; None is a null pointer, a
    field left out keeps its value. A tensor stands for its whole storage, from which one byte too far on either side
    is an error; the pointer is that of its first element. Tensors that share a storage share a buffer. The storage
    starts on a 256-byte boundary, as a CUDA allocation does.

    ``seed`` other than 0 shuffles the order of CTAs, warps and lanes (odd: each warp runs as far as it can, even:
    they mix); ``concurrent_ctas`` lets so many CTAs take turns, rounded up to whole clusters (``__cluster_dims__``).

    A CTA's shared memory that others of its cluster read must not change between two of the cluster's barriers, nor
    end: either is an error in both modes. What is compared are values, so writing what was there before goes unseen.
    Where one stores in another's memory, poison lies until the other waits for the store: it is an error if anything
    else has been written there then, if another store to it is on its way, if the other one ends before, or if it has
    not shown the mbarrier that counts: initialised, fenced, and arrived at the cluster's barrier since.

    ``races`` looks for data races instead of bad addresses: a write and another access to the same byte of shared or
    global memory, by lanes or asynchronous copies of which nothing makes one come first. Barriers of all kinds, waits
    for copies, ``atomic_add_ordered`` of either width and ``load_ordered_u64`` do; shuffles, votes and matrix
    instructions do not, nor does the order in which a run happens to take the lanes. Not seen are

    - races of two CTAs of which one began in the place that the other left: ``concurrent_ctas`` are compared, and
      with 1 none are;
    - of shared memory, accesses before and after another CTA's turn: with ``concurrent_ctas=1`` all are compared;
    - two copies that one lane has under way, and missing proxy fences;
    - structures that a call leaves in memory or takes from there, which g++ does not instrument;
    - now and then one of more than four accesses to the same eight bytes.

    A lane takes 1 MB of memory, one that starts copies 2.

    Raises EmulationError for anything that a sanitizer or the emulator finds, including divergent collectives,
    deadlocks and a run longer than ``timeout_s``; then the buffers are as before. Raises UsageError for arguments
    that no GPU would take.
    """
    launches = (launches,) if isinstance(launches, Launch) else tuple(launches)
    check_launches(launches, concurrent_ctas)
    executable = compile_source(source, races=races, root=root)
    request = Request.of(launches, params, Buffers.of(params, buffers), seed=seed, concurrent_ctas=concurrent_ctas)
    with tempfile.TemporaryDirectory(prefix="wph-emulate-") as folder:
        path = Path(folder) / "request"
        path.write_bytes(request.content)
        report, code = _run(executable, path, timeout_s)
        answer = path.read_bytes()
    status = request.status(answer)
    if code != 0 or not status.done:
        launch = launches[status.launch]
        shared = request.shared(answer, launch.shared_bytes)
        raise failure(source.text, report, code, status, launch.entry, request.guarded(answer), shared, timeout_s)
    request.write_back(answer)


@lru_cache(maxsize=1)
def _fixed_addresses() -> tuple[str, ...]:
    """The command that runs another one without address randomisation, where that is allowed.

    Runs repeat exactly then; and older sanitizers do not start on kernels that randomise more bits than they expect.
    """
    command = ("setarch", platform.machine(), "-R")
    try:
        done = subprocess.run([*command, "true"], capture_output=True, check=False)
    except OSError:
        return ()
    return command if done.returncode == 0 else ()


def _run(executable: Path, request: Path, timeout_s: float) -> tuple[str, int | None]:
    """What the child wrote to stderr, and its exit code; None where it ran out of time."""
    options = {
        "ASAN_OPTIONS": "detect_leaks=0:redzone=2048:detect_stack_use_after_return=0:print_legend=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # What the run time does through the C library's functions is not the kernel's doing.
        "TSAN_OPTIONS": "halt_on_error=1:ignore_interceptors_accesses=1:history_size=5",
    }
    try:
        done = subprocess.run(
            [*_fixed_addresses(), executable, request],
            env=os.environ | options,
            stderr=subprocess.PIPE,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as e:
        return (e.stderr or b"").decode(errors="replace"), None
    return done.stderr.decode(errors="replace"), done.returncode
