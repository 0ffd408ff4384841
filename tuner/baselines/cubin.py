"""Registers and stack of a kernel, read from its cubin: Triton itself only learns them from a GPU.

A cubin is a 64-bit ELF file. Its ``.nv.info`` section is a list of attributes: format byte, attribute byte, and for
format 4 a 16-bit length with that many bytes; the attributes wanted here are pairs (symbol index, value). Numbers of
attributes as ``cuobjdump -elf`` prints them: 0x2f register count, 0x11 frame size.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from tuner.errors import TunerError

_REGISTERS, _FRAME = 0x2F, 0x11
_SIZED = 4


@dataclass(frozen=True)
class KernelFacts:
    """Registers and local-memory stack bytes, both per thread."""

    registers: int
    stack_bytes: int


def kernel_facts(cubin: bytes, kernel: str) -> KernelFacts:
    """Facts of entry ``kernel``. Raises TunerError where the file is no cubin or has no such entry."""
    if cubin[:5] != b"\x7fELF\x02":
        raise TunerError(f"cannot read kernel {kernel}: not a 64-bit ELF file")
    (table_offset,) = struct.unpack_from("<Q", cubin, 40)
    entry_size, count, names_index = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQII", cubin, table_offset + i * entry_size) for i in range(count)]
    sections = {_text(cubin, headers[names_index][4] + h[0]): h for h in headers}
    try:
        info, symbols, strings = sections[".nv.info"], sections[".symtab"], sections[".strtab"]
    except KeyError as missing:
        raise TunerError(f"cannot read kernel {kernel}: the cubin has no section {missing}") from None
    found: dict[int, int] = {}
    for attribute, symbol, value in _attributes(cubin[info[4] : info[4] + info[5]]):
        (name_offset,) = struct.unpack_from("<I", cubin, symbols[4] + 24 * symbol)
        if _text(cubin, strings[4] + name_offset) == kernel:
            found[attribute] = value
    if _REGISTERS not in found:
        raise TunerError(f"the cubin has no kernel {kernel}")
    return KernelFacts(found[_REGISTERS], found.get(_FRAME, 0))


def _attributes(info: bytes) -> Iterator[tuple[int, int, int]]:
    """(attribute, symbol index, value) of every attribute that is such a pair."""
    at = 0
    while at + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == _SIZED:
            if size == 8:
                yield attribute, *struct.unpack_from("<II", info, at)
            at += size


def _text(data: bytes, start: int) -> str:
    return data[start : data.index(b"\0", start)].decode()
