"""What went wrong in the child process, as one line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tuner.errors import TunerError


class EmulationError(TunerError):
    """The kernel did something wrong. The message is one line; ``report`` is all that the child process wrote."""

    def __init__(self, message: str, report: str = "") -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class Status:
    """Where the child was: launch, CTA and thread; ``done`` is 1 after all launches."""

    launch: int
    x: int
    y: int
    z: int
    thread: int
    done: int


@dataclass(frozen=True)
class Guarded:
    """A buffer, or shared memory, in the child's memory: name, address (0: it was not there yet) and size."""

    name: str
    address: int
    size_bytes: int


_OWN = re.compile(r"^wph-emulate: line (\d+): (.*)$", re.M)
_UNDEFINED = re.compile(r"^\S+:\d+:\d+: runtime error: (.*)$", re.M)
_ADDRESS = re.compile(r"ERROR: AddressSanitizer:? (\S+)(?:.*?(0x[0-9a-f]+))?.*$", re.M)
_ACCESS = re.compile(r"^(?:READ|WRITE) of size \d+", re.M)
_RACING = re.compile(r"^  (?:Previous )?(read|write) of size \d+ at (0x[0-9a-f]+) by .*\n((?:    .*\n)*)", re.M | re.I)
_KERNEL_LINE = re.compile(r"\bkernel\.cu:(\d+)")
_NEAR_BYTES = 1 << 20
_FIRST_PAGE = 4096


def _buffer_place(address: int, buffers: Sequence[Guarded]) -> str:
    """Where ``address`` is relative to null or the nearest buffer; empty where none is near."""
    if address < _FIRST_PAGE:
        return " through a null pointer"
    distances = [(max(b.address - address, address - b.address - b.size_bytes, 0), b) for b in buffers if b.address]
    if not distances:
        return ""
    distance, near = min(distances, key=lambda pair: pair[0])
    if distance > _NEAR_BYTES:
        return ""
    return f" at byte {address - near.address} of {near.name}, which has {near.size_bytes}"


def _quoted(text: str, line: int) -> str:
    """``line`` of the source with its number; empty where the source has no such line."""
    lines = text.splitlines()
    return f"line {line}: {lines[line - 1].strip()}" if 1 <= line <= len(lines) else ""


def _race(text: str, accesses: Sequence[tuple[str, str, str]], buffers: Sequence[Guarded], shared: Guarded) -> str:
    """Where two accesses race, and what they are: of each the kind, the address and its stack."""
    address = int(accesses[0][1], 16)
    if shared.address <= address < shared.address + shared.size_bytes:
        where = f"shared memory at byte {address - shared.address}"
    else:
        place = _buffer_place(address, buffers)
        where = f"global memory{place}" if place else "local memory"
    kinds = []
    for kind, _, stack in accesses[:2]:
        line = _KERNEL_LINE.search(stack)
        kinds.append(f"a {kind.lower()} ({_quoted(text, int(line[1])) if line else 'of an unknown line'})")
    return f"data race in {where} between {' and '.join(kinds)}"


def failure(
    text: str,
    report: str,
    code: int | None,
    status: Status,
    launch: str,
    buffers: Sequence[Guarded],
    shared: Guarded,
    timeout_s: float,
) -> EmulationError:
    """The error for a child that ended with ``code`` (None: by time-out) during ``launch`` and wrote ``report``."""
    own, undefined, address = _OWN.search(report), _UNDEFINED.search(report), _ADDRESS.search(report)
    races = _RACING.findall(report)
    if code is None:
        what = f"no end after {timeout_s:g} s"
    elif races:
        what = _race(text, races, buffers, shared)
    elif address:
        access = _ACCESS.search(report)
        where = _buffer_place(int(address[2], 16), buffers) if address[2] else ""
        what = f"{own[2] + ': ' if own else ''}{address[1]}{': ' + access[0] if access else ''}{where}"
    elif undefined:
        what = undefined[1]
    elif own:
        what = own[2]
    else:
        what = f"the process ended with {code}: {(report.splitlines() or ['no message'])[0]}"
    frame = own or (code is not None and not races and _KERNEL_LINE.search(report))
    quoted = _quoted(text, int(frame[1])) if frame else ""
    place = f"{launch}, CTA ({status.x}, {status.y}, {status.z}), thread {status.thread}"
    return EmulationError(f"{place}: {what}{'; ' if quoted else ''}{quoted}", report)
