"""The file through which a run's launches, parameters and buffers reach the child: see main.cpp."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tuner.emulator.report import Guarded, Status
from tuner.errors import UsageError

SHARED_LIMIT_BYTES = 227 * 1024
_STATUS = struct.Struct("=6i")
_HEADER = struct.Struct("=6i4I2I3Q")
_SHARED_ADDRESS = struct.Struct("=Q")
_LAUNCH = struct.Struct("=64s3I2I4x")
_RELOCATION = struct.Struct("=2IQ")
_BUFFER = struct.Struct("=4Q")
_ALIGNMENT_BYTES = 256


@dataclass(frozen=True)
class Launch:
    """One launch: grid in CTAs (x, y, z), block in threads (a multiple of 32), dynamic shared memory in bytes."""

    entry: str
    grid: tuple[int, int, int]
    block: int
    shared_bytes: int = 0


@dataclass(frozen=True)
class _Storage:
    address: int
    size_bytes: int


def check_launches(launches: Sequence[Launch], concurrent_ctas: int) -> None:
    """Raises UsageError for what no GPU would take."""
    for launch in launches:
        if launch.block % 32 or not 32 <= launch.block <= 1024:
            raise UsageError(f"{launch.entry}: block of {launch.block} threads: expected a multiple of 32 up to 1024")
        if min(launch.grid) < 1 or max(launch.grid[1:]) > 65535:
            raise UsageError(f"{launch.entry}: grid {launch.grid}: expected at least 1, y and z at most 65535")
        if not 0 <= launch.shared_bytes <= SHARED_LIMIT_BYTES:
            raise UsageError(
                f"{launch.entry}: {launch.shared_bytes} bytes of shared memory: expected 0 to {SHARED_LIMIT_BYTES}"
            )
    if concurrent_ctas < 1:
        raise UsageError(f"concurrent_ctas {concurrent_ctas}: expected at least 1")


def _storage(name: str, value: Any) -> tuple[_Storage, int]:
    """The memory that ``value`` is a part of, and the byte at which its first element is."""
    if hasattr(value, "untyped_storage"):
        if value.device.type != "cpu":
            raise UsageError(f"buffer {name} is on {value.device}: the emulator takes CPU tensors")
        storage = value.untyped_storage()
        return _Storage(storage.data_ptr(), storage.nbytes()), value.storage_offset() * value.element_size()
    if not hasattr(value, "__array_interface__"):
        raise UsageError(f"buffer {name} is a {type(value).__name__}: expected a torch tensor or a NumPy array")
    owner = value
    while hasattr(owner.base, "__array_interface__"):
        owner = owner.base
    if not owner.flags.forc:
        raise UsageError(f"buffer {name}: expected an array whose base is contiguous")
    address = owner.__array_interface__["data"][0]
    return _Storage(address, owner.nbytes), value.__array_interface__["data"][0] - address


@dataclass(frozen=True)
class Buffers:
    """The distinct storages, and for each pointer field its storage's number and byte offset (None: null)."""

    storages: tuple[_Storage, ...]
    pointers: dict[str, tuple[int, int] | None]

    @classmethod
    def of(cls, params: ctypes.Structure, buffers: Mapping[str, Any]) -> Buffers:
        """``buffers`` as emulate() takes them; raises UsageError for one that is no field of ``params``."""
        fields = {field[0] for field in params._fields_}
        numbers: dict[_Storage, int] = {}
        pointers: dict[str, tuple[int, int] | None] = {}
        for name, value in buffers.items():
            if name not in fields:
                raise UsageError(f"buffer {name}: {type(params).__name__} has no such field")
            pointers[name] = None
            if value is not None:
                storage, offset = _storage(name, value)
                pointers[name] = numbers.setdefault(storage, len(numbers)), offset
        return cls(tuple(numbers), pointers)

    def name(self, number: int) -> str:
        """The field, or fields, that point into a storage."""
        return "/".join(name for name, pointer in self.pointers.items() if pointer and pointer[0] == number)


@dataclass(frozen=True)
class Request:
    """The file's content, where its buffer records start, and where each buffer's bytes do."""

    content: bytes
    records_at: int
    data_at: tuple[int, ...]
    buffers: Buffers

    @classmethod
    def of(
        cls, launches: Sequence[Launch], params: ctypes.Structure, buffers: Buffers, *, seed: int, concurrent_ctas: int
    ) -> Request:
        values = bytearray(bytes(params))
        relocations = b""
        for name, pointer in buffers.pointers.items():
            at = getattr(type(params), name).offset
            values[at : at + 8] = bytes(8)
            if pointer is not None:
                relocations += _RELOCATION.pack(at, *pointer)
        records = b"".join(_LAUNCH.pack(x.entry.encode(), *x.grid, x.block, x.shared_bytes) for x in launches)
        records_at = _HEADER.size + len(records) + len(relocations)
        params_at = records_at + len(buffers.storages) * _BUFFER.size
        data_at = []
        end = params_at + len(values)
        table = b""
        for storage in buffers.storages:
            data_at.append(end)
            table += _BUFFER.pack(end, storage.size_bytes, _ALIGNMENT_BYTES, 0)
            end += storage.size_bytes
        counts = len(launches), len(relocations) // _RELOCATION.size, len(buffers.storages), concurrent_ctas
        header = _HEADER.pack(*[0] * 6, *counts, len(values), 0, seed & (2**64 - 1), params_at, 0)
        data = (ctypes.string_at(s.address, s.size_bytes) if s.size_bytes else b"" for s in buffers.storages)
        content = b"".join([header, records, relocations, table, values, *data])
        return cls(content, records_at, tuple(data_at), buffers)

    def status(self, answer: bytes) -> Status:
        """Where the child was when it ended."""
        return Status(*_STATUS.unpack_from(answer))

    def guarded(self, answer: bytes) -> list[Guarded]:
        """Where the child had the buffers."""
        records = [_BUFFER.unpack_from(answer, self.records_at + i * _BUFFER.size) for i in range(len(self.data_at))]
        return [Guarded(self.buffers.name(i), address, size) for i, (_, size, _, address) in enumerate(records)]

    def shared(self, answer: bytes, size_bytes: int) -> Guarded:
        """Where the child had ``size_bytes`` of shared memory."""
        (address,) = _SHARED_ADDRESS.unpack_from(answer, _HEADER.size - _SHARED_ADDRESS.size)
        return Guarded("shared memory", address, size_bytes)

    def write_back(self, answer: bytes) -> None:
        """Copies the buffers of a run that went well into the caller's tensors."""
        for at, storage in zip(self.data_at, self.buffers.storages, strict=True):
            ctypes.memmove(storage.address, answer[at : at + storage.size_bytes], storage.size_bytes)
