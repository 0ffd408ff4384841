"""Facts of a cubin's machine code: what the hot loop issues, without a GPU.

Opcodes and branch targets come from ``nvdisasm -json``; stall counts from the control word in each instruction's
upper eight bytes (four bits from bit 41 on: cycles until the warp may issue again). The disassembler takes most of a
second to start and next to nothing per kernel, so many kernels go through it as one image of raw code.
"""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import reduce
from operator import and_
from pathlib import Path
from typing import Any

from tuner import toolchain
from tuner.build import Built
from tuner.cubin import Kernel, read_cubin
from tuner.errors import TunerError

_VERSION = 1
"""Of what facts.json holds: raise it when the analysis changes."""
_CACHE = "facts.json"
_INSTRUCTION_BYTES = 16
_TIMEOUT_S = 60
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


def count(opcodes: Mapping[str, int], *names: str) -> int:
    """Instructions whose opcode without modifiers is one of ``names``."""
    return sum(n for opcode, n in opcodes.items() if opcode.partition(".")[0] in names)


def access_bytes(opcode: str) -> int:
    """Bytes per lane that a load, store or asynchronous copy moves: ``LDG.E.128`` 16, ``LDS.U8`` 1, ``LDS`` 4."""
    return next((_WIDTHS[m] for m in reversed(opcode.split(".")) if m in _WIDTHS), 4)


@dataclass(frozen=True)
class Loop:
    """A natural loop, its inner loops included, rare paths that the compiler moved out of line excluded.

    ``start`` and ``end`` are byte offsets in the kernel, ``depth`` is 1 for an outermost loop. ``stall_cycles`` is the
    least time of one iteration for a warp that never waits for memory.
    """

    start: int
    end: int
    depth: int
    instructions: int
    stall_cycles: int
    opcodes: Mapping[str, int]

    def contains(self, other: Loop) -> bool:
        return self is not other and self.start <= other.start and other.end <= self.end


@dataclass(frozen=True)
class SassFacts:
    """One kernel of a cubin. ``loops`` are innermost first, larger ones first within a depth.

    ``opcodes`` are complete, with modifiers (``LDG.E.128``); counts are static, each instruction once. ``registers``
    and ``shared_bytes`` (static) are what the cubin asks for.
    """

    kernel: str
    arch: str
    registers: int
    shared_bytes: int
    instructions: int
    stall_cycles: int
    opcodes: Mapping[str, int]
    loops: tuple[Loop, ...]


@dataclass(frozen=True)
class _Instruction:
    opcode: str
    stall: int
    target: int | None
    """Index of the instruction that a branch goes to."""
    falls_through: bool


def _decode(listing: list[dict[str, Any]], code: bytes, base_address: int) -> list[_Instruction]:
    """Instructions of one kernel that stands at ``base_address`` of the disassembled image."""
    instructions = []
    for i, item in enumerate(listing):
        (control,) = struct.unpack_from("<Q", code, i * _INSTRUCTION_BYTES + 8)
        opcode, operands = item["opcode"], item.get("operands", "")
        base = opcode.partition(".")[0]
        address = re.search(r"0x([0-9a-f]+)$", operands) if base == "BRA" else None
        # A branch may depend on a guard before the opcode or on a predicate among its operands.
        always = item.get("predicate", "@PT") == "@PT" and "," not in operands
        ends = always and base in ("BRA", "EXIT", "RET", "BRX", "JMX", "JMP")
        target = (int(address[1], 16) - base_address) // _INSTRUCTION_BYTES if address else None
        instructions.append(_Instruction(opcode, max(1, control >> 41 & 15), target, not ends))
    while instructions and instructions[-1].opcode == "NOP":
        instructions.pop()
    if instructions and instructions[-1].target == len(instructions) - 1:
        instructions.pop()  # the trap behind the last EXIT
    return instructions


def _blocks(code: list[_Instruction]) -> tuple[list[range], list[list[int]]]:
    """Basic blocks in address order as ranges of instruction indices, and each block's successors."""
    leaders = {0}
    for i, instruction in enumerate(code):
        if instruction.target is not None and instruction.target < len(code):
            leaders.add(instruction.target)
        if instruction.target is not None or not instruction.falls_through:
            leaders.add(i + 1)
    starts = sorted(i for i in leaders if i < len(code))
    blocks = [range(a, b) for a, b in zip(starts, [*starts[1:], len(code)], strict=True)]
    number = {block.start: i for i, block in enumerate(blocks)}
    successors = []
    for i, block in enumerate(blocks):
        last = code[block[-1]]
        after = {number[last.target]} if last.target in number else set()
        if last.falls_through and i + 1 < len(blocks):
            after.add(i + 1)
        successors.append(sorted(after))
    return blocks, successors


def _reversed(successors: list[list[int]]) -> list[list[int]]:
    predecessors: list[list[int]] = [[] for _ in successors]
    for i, after in enumerate(successors):
        for s in after:
            predecessors[s].append(i)
    return predecessors


def _dominators(predecessors: list[list[int]]) -> list[int]:
    """Per block the set of its dominators as a bit mask (0: unreachable), by iteration to the fixed point."""
    masks = [1] + [0] * (len(predecessors) - 1)
    changed = True
    while changed:
        changed = False
        for i in range(1, len(predecessors)):
            reached = [masks[p] for p in predecessors[i] if masks[p]]
            if not reached:
                continue
            mask = reduce(and_, reached) | 1 << i
            changed |= mask != masks[i]
            masks[i] = mask
    return masks


def _natural_loops(successors: list[list[int]]) -> dict[int, set[int]]:
    """Blocks of each loop by its header: what reaches a back edge's source without passing the header."""
    predecessors = _reversed(successors)
    masks = _dominators(predecessors)
    latches: dict[int, list[int]] = {}
    for source, after in enumerate(successors):
        for head in after:
            if masks[source] >> head & 1:
                latches.setdefault(head, []).append(source)
    loops = {}
    for head, sources in latches.items():
        body = {head}
        waiting = list(sources)
        while waiting:
            block = waiting.pop()
            if block not in body:
                body.add(block)
                waiting += predecessors[block]
        # Slow paths (a shuffle of a diverged warp, a division) stand behind the last back edge.
        loops[head] = {b for b in body if b <= max(sources)}
    return loops


def _loops(code: list[_Instruction]) -> tuple[Loop, ...]:
    blocks, successors = _blocks(code)
    loops = []
    bodies = _natural_loops(successors)
    for head, body in bodies.items():
        inside = [code[i] for b in sorted(body) for i in blocks[b]]
        loops.append(
            Loop(
                start=blocks[min(body)].start * _INSTRUCTION_BYTES,
                end=blocks[max(body)].stop * _INSTRUCTION_BYTES,
                depth=sum(head in other for other in bodies.values()),
                instructions=len(inside),
                stall_cycles=sum(i.stall for i in inside),
                opcodes=_histogram(inside),
            )
        )
    return tuple(sorted(loops, key=lambda loop: (-loop.depth, -loop.instructions, loop.start)))


def _histogram(code: Iterable[_Instruction]) -> dict[str, int]:
    return dict(sorted(Counter(i.opcode for i in code).items()))


def _listing(code: bytes, arch: str) -> list[dict[str, Any]]:
    """nvdisasm's account of raw machine code, one item per instruction."""
    with tempfile.NamedTemporaryFile(prefix="sass-", suffix=".bin") as file:
        file.write(code)
        file.flush()
        model = arch.replace("sm_", "SM")
        command = [str(toolchain.find_nvdisasm([arch])), "-json", "-ndf", "-b", model, file.name]
        try:
            done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=True)
            listing: list[dict[str, Any]] = json.loads(done.stdout)[1][0]["sass-instructions"]
        except subprocess.CalledProcessError as e:
            raise TunerError(f"nvdisasm fails on {arch} code: {e.stderr.decode(errors='replace').strip()}") from None
        except (OSError, subprocess.TimeoutExpired, ValueError, LookupError) as e:
            raise TunerError(f"nvdisasm fails on {arch} code: {e}") from None
    if len(listing) * _INSTRUCTION_BYTES != len(code):
        raise TunerError(f"nvdisasm lists {len(listing)} instructions, expected {len(code) // _INSTRUCTION_BYTES}")
    return listing


def disassemble(cubins: Iterable[tuple[Path, str | None]]) -> list[SassFacts]:
    """Facts of one kernel (None: the largest) of each cubin, whoever compiled it, in the given order.

    Raises ToolchainError without a disassembler, TunerError for a file that is no cubin or lacks the kernel.
    """
    by_arch: dict[str, list[tuple[int, Kernel]]] = {}
    for place, (path, name) in enumerate(cubins):
        cubin = read_cubin(path)
        by_arch.setdefault(cubin.arch, []).append((place, cubin.kernel(name)))
    found: dict[int, SassFacts] = {}
    for arch, kernels in by_arch.items():
        listing = _listing(b"".join(k.code for _, k in kernels), arch)
        at = 0
        for place, kernel in kernels:
            size = len(kernel.code) // _INSTRUCTION_BYTES
            code = _decode(listing[at : at + size], kernel.code, at * _INSTRUCTION_BYTES)
            at += size
            found[place] = SassFacts(
                kernel.name, arch, kernel.registers, kernel.shared_bytes, len(code), sum(i.stall for i in code),
                _histogram(code), _loops(code),
            )  # fmt: skip
    return [found[i] for i in sorted(found)]


def _cached(built: Built) -> SassFacts | None:
    try:
        stored = json.loads(built.cubin.with_name(_CACHE).read_text())
        if stored.pop("version") == _VERSION and stored.pop("cubin_sha256") == built.cubin_sha256:
            return SassFacts(**(stored | {"loops": tuple(Loop(**loop) for loop in stored["loops"])}))
    except (OSError, ValueError, LookupError, TypeError):
        pass
    return None


def facts_of(builts: Iterable[Built]) -> list[SassFacts]:
    """Facts of each build's main kernel, kept in ``facts.json`` beside the cubin; unknown ones are found together."""
    builts = list(builts)
    found = {b.cubin: facts for b in builts if (facts := _cached(b))}
    missing = list({b.cubin: b for b in builts if b.cubin not in found}.values())
    for built, facts in zip(missing, disassemble((b.cubin, b.entry) for b in missing), strict=True):
        text = json.dumps({"version": _VERSION, "cubin_sha256": built.cubin_sha256} | asdict(facts))
        unfinished = built.cubin.with_name(f"{_CACHE}.{os.getpid()}")
        unfinished.write_text(text)
        unfinished.replace(built.cubin.with_name(_CACHE))
        found[built.cubin] = facts
    return [found[b.cubin] for b in builts]


def facts(built: Built) -> SassFacts:
    """Facts of one build's main kernel; for many, facts_of() is a great deal faster."""
    return facts_of([built])[0]
