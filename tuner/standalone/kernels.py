"""A table's kernels as files that stand alone: their names, their text, and what a launch must know of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from tuner import abi
from tuner.errors import TunerError
from tuner.geometry import entry_points, reduce_geometry
from tuner.render import Source, header, primitives, render
from tuner.report.terminal import kernel_names
from tuner.space import Config
from tuner.space.dequant import shape as dequant_shape
from tuner.space.plan import DecodePlan
from tuner.space.store import shape as store_shape
from tuner.table import Kernel, Table

OPS = ("decode", "dequant", "store")
LICENCE = "// SPDX-License-Identifier: Apache-2.0\n"


@dataclass(frozen=True)
class StandaloneKernel:
    """One kernel of an export. ``file`` is relative to the project, ``space`` the C++ namespace within ``wph``.

    ``facts``: fields of ``wph::Kernel`` (dispatch.h) beyond name and entry points, as C++.
    """

    kernel: Kernel
    config: Config
    name: str
    file: str
    space: str
    text: str
    facts: dict[str, Any]

    @property
    def op(self) -> str:
        return self.config.problem.op

    @property
    def entries(self) -> tuple[str, ...]:
        return entry_points(self.config)


def standalone_kernels(table: Table) -> list[StandaloneKernel]:
    """The kernels of ``table``, in its order.

    Raises TunerError where a kernel was made from other templates than are here: what is exported was measured.
    """
    p = table.problem
    sources = [render(kernel.config(p)) for kernel in table.kernels]
    stale = [k.id for k, source in zip(table.kernels, sources, strict=True) if source.digest != k.source_digest]
    if stale:
        commit = table.provenance.git_commit
        where = f", or export from commit {commit}" if commit else ""
        raise TunerError(
            f"{table.file_name}: {len(stale)} of {len(table.kernels)} kernels were made from other templates than "
            f"these ({', '.join(stale)}), and a source must be the one that was timed: tune again{where}"
        )
    letters = kernel_names(table)
    return [
        _standalone(table, kernel, source, letters[kernel.id].lower())
        for kernel, source in zip(table.kernels, sources, strict=True)
    ]


def parameters(op: str) -> str:
    """The C structure of ``op``'s arguments under its public name, comments in the words of the C interface."""
    text = abi.c_struct(op).replace(f"struct {abi.STRUCTURES[op][0]} ", f"struct wph_{op}_params ")
    for inside, outside in (
        ("scratch for split results, see decode_scratch()", "scratch for split results: plan.partials_bytes"),
        ("longest run of adjacent dirty slots that one entry decodes", "the launch sets it"),
        ("grid schedule: splits per request; stream schedule: CTAs in the grid's x", "the launch sets it: plan.splits"),
    ):
        text = text.replace(inside, outside)
    return text


_GUARD = re.compile(r"#if !defined\(WPH_EMULATE\)\n(.*?)#endif\n", re.DOTALL)


def shared_primitives(config: Config) -> str:
    """The device primitives of ``config``'s source without what only the emulator needs."""
    _, _, code = primitives(config).partition("#else\n")
    code, _, _ = code.rpartition("#endif")
    return (
        f"{LICENCE}// Device primitives that all kernels share. Everything beyond plain C++ is behind these names;\n"
        f"// half pairs travel as 32-bit words, low half first.\n#pragma once\n\n{code.strip()}\n"
    )


def _standalone(table: Table, kernel: Kernel, source: Source, letter: str) -> StandaloneKernel:
    p, arch = table.problem, table.device.arch
    group = f"_g{p.gqa}" if p.op == "decode" else ""
    name = f"{p.op}_d{p.head_dim}{group}_{p.cache_format.removeprefix('turboquant_')}_{letter}"
    space = f"{arch}_{name}"
    return StandaloneKernel(
        kernel, source.config, name, f"src/{arch}/{name}.cu", space, _text(table, kernel, source, space), _facts(source)
    )


def _text(table: Table, kernel: Kernel, source: Source, space: str) -> str:
    """The rendered source in a namespace, with primitives and parameters taken from the shared headers.

    Joined again in their old order the parts are the text whose code_digest the table holds, but for the guard around
    primitives of one kernel, for which the emulator has its own.
    """
    op = source.config.problem.op
    title = header(source.config)
    shared = f"{primitives(source.config)}\n{abi.c_struct(op)}\n"
    about, found, body = source.text.removeprefix(title).partition(shared)
    if not found or not source.text.startswith(title):
        raise TunerError(f"kernel {kernel.id} does not begin with title, primitives and parameters, as templates do")
    how = "measured on" if table.evidence == "measured" else "predicted for"
    comment = f"//\n{about.strip()}\n" if about.strip() else ""
    code = _GUARD.sub(r"\1", body).strip().replace('extern "C" __global__', "__global__")
    return (
        f"{LICENCE}{title.rstrip()}\n"
        f"// Chosen by a search, {how} {table.device.name}: {kernel.registers} registers, {kernel.spill_bytes} bytes "
        f"spilled.\n{comment}\n"
        f'#include "primitives.cuh"\n#include "wph.h"\n\nnamespace wph::{space} {{\n\n'
        f"using {abi.STRUCTURES[op][0]} = wph_{op}_params;\n\n{code}\n\n}}  // namespace wph::{space}\n"
    )


def _facts(source: Source) -> dict[str, Any]:
    """Fields of ``wph::Kernel`` in its order; what an op does not have is 0."""
    config = source.config
    facts: dict[str, Any] = {"block": 32 * config["warps"], "reduce_warps": 0, "shared_bytes": 0}
    facts |= {"head_warps": 0, "stream": 0, "counts": 0, "branch": 0, "cluster": 0, "row_floats": 0, "rows": 0}
    facts |= {"load": "DIRECT", "alignment": 1, "slot_bytes": config.problem.layout.slot_bytes}
    if config.problem.op == "dequant":
        shape = dequant_shape(config)
        return facts | {"shared_bytes": shape.shared_bytes, "rows": shape.slots}
    if config.problem.op == "store":
        rows = store_shape(config)
        return facts | {"shared_bytes": rows.shared_bytes, "rows": rows.pairs}
    plan = DecodePlan(config)
    return facts | {
        "reduce_warps": reduce_geometry(config, batch=1, kv_heads=1).block // 32,
        "shared_bytes": plan.shared_bytes,
        "head_warps": config["head_warps"],
        "stream": int(config["schedule"] != "grid"),
        "counts": plan.arrival_counters if plan.waits else int(config["reduction"] != "kernel"),
        "branch": plan.branch if config["reduction"] == "tree" else 0,
        "cluster": plan.cluster,
        "row_floats": plan.partial_row_floats,
        "load": config["load"].upper(),
        "alignment": plan.token_alignment,
    }
