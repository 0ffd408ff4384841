"""What a cubin, a 64-bit little-endian ELF file, says about its kernels without a disassembler.

Section names and attributes 0x2f (registers) and 0x11 (stack) are what ``cuobjdump -elf`` shows; they are the same for
nvcc's and Triton's output.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from tuner.errors import TunerError
from tuner.targets import RESERVED_SHARED_BYTES

_MAGIC = b"\x7fELF\x02\x01"
_SYMBOL_TABLE, _NO_BITS = 2, 8
_REGISTER_COUNT, _FRAME_SIZE = 0x2F, 0x11
_SIZED = 4  # format of an attribute whose payload follows its header
_PAIR_BYTES = 8  # payload of the attributes wanted here: symbol, value
_ABI_ARCH_SHIFTED = 8  # from this ABI version on, the arch stands in the second byte of the flags


@dataclass(frozen=True)
class Kernel:
    """One kernel: machine code, registers and stack bytes per thread, static shared memory in bytes."""

    name: str
    code: bytes
    registers: int
    stack_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Cubin:
    """``arch`` as in "sm_121"."""

    arch: str
    kernels: tuple[Kernel, ...]

    def kernel(self, name: str | None = None) -> Kernel:
        """The kernel called ``name``, by default the largest. Raises TunerError where there is none."""
        if name is None and self.kernels:
            return max(self.kernels, key=lambda k: len(k.code))
        for kernel in self.kernels:
            if kernel.name == name:
                return kernel
        names = ", ".join(k.name for k in self.kernels) or "none"
        raise TunerError(f"the cubin has no kernel {name or 'at all'}: it has {names}")


@dataclass(frozen=True)
class _Section:
    name: str
    kind: int
    offset: int
    size: int
    link: int


def _sections(image: bytes) -> list[_Section]:
    (table,) = struct.unpack_from("<Q", image, 40)
    size, number, names = struct.unpack_from("<3H", image, 58)
    headers = [struct.unpack_from("<IIQQQQI", image, table + i * size) for i in range(number)]
    strings = headers[names][4]
    return [
        _Section(_string(image, strings + name), kind, offset, length, link)
        for name, kind, _, _, offset, length, link in headers
    ]


def _check_complete(image: bytes, sections: list[_Section]) -> None:
    """Raises ValueError where the file ends before its last section or program header."""
    (table,) = struct.unpack_from("<Q", image, 32)
    size, number = struct.unpack_from("<2H", image, 54)
    ends = [table + size * number, *(s.offset + s.size for s in sections if s.kind != _NO_BITS)]
    if max(ends) > len(image):
        raise ValueError("truncated")


def _string(image: bytes, start: int) -> str:
    return image[start : image.index(b"\0", start)].decode()


def _attributes(image: bytes, sections: list[_Section]) -> dict[tuple[str, int], int]:
    """Value by kernel name and attribute, of the attributes in ``.nv.info`` that give a kernel a number."""
    by_name = {s.name: s for s in sections}
    info = by_name.get(".nv.info")
    symbols = next((s for s in sections if s.kind == _SYMBOL_TABLE), None)
    if info is None or symbols is None:
        return {}
    strings = sections[symbols.link].offset
    found = {}
    at = info.offset
    while at < info.offset + info.size:
        form, attribute, size = struct.unpack_from("<BBH", image, at)
        if form == _SIZED and size == _PAIR_BYTES:
            symbol, value = struct.unpack_from("<II", image, at + 4)
            (name,) = struct.unpack_from("<I", image, symbols.offset + 24 * symbol)
            found[_string(image, strings + name), attribute] = value
        at += 4 + (size if form == _SIZED else 0)
    return found


def read_cubin(path: Path) -> Cubin:
    """The kernels of a cubin, whoever compiled it. Raises TunerError for anything else."""
    try:
        image = path.read_bytes()
    except OSError as e:
        raise TunerError(f"cannot read cubin {path}: {e.strerror}") from None
    return parse_cubin(image, str(path))


def parse_cubin(image: bytes, path: str) -> Cubin:
    """As ``read_cubin`` for the bytes of a file that messages call ``path``."""
    if not image.startswith(_MAGIC):
        raise TunerError(f"{path} is not a cubin: expected a 64-bit ELF file")
    try:
        (flags,) = struct.unpack_from("<I", image, 48)
        number = flags >> 8 & 0xFF if image[8] >= _ABI_ARCH_SHIFTED else flags & 0xFF
        sections = _sections(image)
        _check_complete(image, sections)
        numbers = _attributes(image, sections)
    except (struct.error, LookupError, ValueError):
        raise TunerError(f"{path} is a damaged cubin: build it again") from None
    shared = {
        s.name.removeprefix(".nv.shared."): max(0, s.size - RESERVED_SHARED_BYTES)
        for s in sections
        if s.name.startswith(".nv.shared.")
    }
    kernels = tuple(
        Kernel(
            name,
            image[s.offset : s.offset + s.size],
            registers=numbers.get((name, _REGISTER_COUNT), 0),
            stack_bytes=numbers.get((name, _FRAME_SIZE), 0),
            shared_bytes=shared.get(name, 0),
        )
        for s in sections
        if s.name.startswith(".text.") and (name := s.name.removeprefix(".text."))
    )
    return Cubin(f"sm_{number}", kernels)
