"""Writes the project: generated files from templates beside this module, the others as they are."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from tuner.build import NVCC_FLAGS
from tuner.check import TOLERANCE
from tuner.errors import TunerError, UsageError
from tuner.formats import FORMATS, RowLayout, SlotLayout
from tuner.reference import Codec
from tuner.render import environment, float_literal
from tuner.standalone.kernels import OPS, StandaloneKernel, parameters, shared_primitives, standalone_kernels
from tuner.standalone.points import orders, points
from tuner.table import CUT_OFF, BatchEntry, BucketEntry, Table

_FILES = Path(__file__).parent / "files"
_GENERATED = (
    *("README.md", "CMakeLists.txt", "include/wph.h", "src/dispatch.h", "src/tables.h"),
    *("test/layouts.h", "test/test_dispatch.cu"),
)
_ABOUT = {
    "decode": (
        "// Fused split-KV attention of one query token per request, straight from the compressed cache.",
        " `params->splits` is not read: the plan's counts.",
    ),
    "dequant": (
        "// Gather-free dequantisation: paged compressed slots to bf16 rows, of whole requests or of a list of slots.",
        "",
    ),
    "store": ("// New keys and values to compressed slots: normalised, rotated, coded, scattered in one launch.", ""),
}


def export_standalone(tables: Sequence[Table], folder: Path) -> list[StandaloneKernel]:
    """Writes a project with the kernels of ``tables`` to ``folder``, which must be new or empty; returns the kernels.

    Raises TunerError where a kernel's source is not the one that was timed, UsageError where two tables would answer
    the same call or the folder holds something. What cannot be written whole is taken away again.
    """
    ensure_new(folder)
    exported = [(table, standalone_kernels(table)) for table in _distinct(tables)]
    kernels = [kernel for _, found in exported for kernel in found]
    _write(_files(kernels, _context(exported, kernels)), folder)
    return kernels


def ensure_new(folder: Path) -> None:
    """Raises UsageError unless ``folder`` is new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not empty: expected a new folder for a standalone export, for example --to wph")


def _files(kernels: list[StandaloneKernel], context: dict[str, Any]) -> dict[str, str]:
    """Every file of the project: its name there -> its text."""
    templates = environment(_FILES)
    files = {"src/primitives.cuh": shared_primitives(kernels[0].config)} | {k.file: k.text for k in kernels}
    for name in _GENERATED:
        files[name] = templates.get_template(f"{Path(name).name}.j2").render(context)
    files["test/tolerance.h"] = _tolerance()
    static = [*context["library"], "test/codec.h", "test/cache.h"]
    for name in (*static, *(f"test/test_{op}.cu" for op in context["op_names"])):
        files[name] = (_FILES / Path(name).name).read_text()
    return files


def _write(files: dict[str, str], folder: Path) -> None:
    """Writes ``files`` to ``folder``: all of them, or none. Raises TunerError."""
    was_there = folder.exists()
    try:
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    except BaseException as error:
        _take_away(files, folder, was_there)
        if isinstance(error, OSError):
            raise TunerError(f"cannot write {folder / name}: {error.strerror}; choose another folder") from None
        raise


def _take_away(files: Iterable[str], folder: Path, was_there: bool) -> None:
    for top in {Path(name).parts[0] for name in files}:
        shutil.rmtree(folder / top, ignore_errors=True)
        with suppress(OSError):
            (folder / top).unlink(missing_ok=True)
    if not was_there:
        with suppress(OSError):
            folder.rmdir()


def _distinct(tables: Sequence[Table]) -> list[Table]:
    """``tables`` by device and problem. Raises UsageError for none, an empty one, or two that answer the same call."""
    if not tables:
        raise UsageError("no tables to export")
    seen: dict[object, Table] = {}
    for table in tables:
        if not table.by_batch:
            raise UsageError(f"{table.file_name} has no entries: there is nothing to export")
        other = seen.setdefault((table.device.arch, table.problem), table)
        if other is not table:
            raise UsageError(
                f"{table.file_name} and {other.file_name} answer the same calls on {table.device.arch}: "
                "expected one table for each, export the other elsewhere"
            )
    return sorted(seen.values(), key=lambda t: (t.device.arch, OPS.index(t.problem.op)))


def _context(
    exported: list[tuple[Table, list[StandaloneKernel]]], kernels: list[StandaloneKernel]
) -> dict[str, Any]:
    ops = [op for op in OPS if any(k.op == op for k in kernels)]
    layouts = {(k.config.problem.cache_format, k.config.problem.head_dim): k.config.problem.layout for k in kernels}
    first = {k.file: i for i, k in enumerate(kernels)}
    by_op: dict[str, list[str]] = {op: [] for op in ops}
    readable = []
    for table, found in exported:
        by_op[table.problem.op] += points(table, found)
        if table.problem.op == "decode":
            readable += orders(found, table.kv_heads, first[found[0].file])
    archs = [
        {"name": arch, "number": arch.removeprefix("sm_"), "files": [k.file for k in found]}
        for arch, group in groupby(kernels, key=lambda k: k.kernel.arch)
        for found in (list(group),)
    ]
    about = {
        "decode": "decode attention over TurboQuant-compressed, paged KV caches",
        "dequant": "gather-free dequantisation of TurboQuant-compressed, paged KV caches",
        "store": "storing new keys and values in TurboQuant-compressed, paged KV caches",
    }
    return {
        "about": "Tuned CUDA kernels for " + " and ".join(about[op] for op in ops) + ".",
        "formats": list(FORMATS),
        "one_slot": any(not layout.format.separate_planes for layout in layouts.values()),
        "planes": sorted({f"`{la.format.name}`" for la in layouts.values() if la.format.separate_planes}),
        "ops": [
            {
                "name": op,
                "title": op.capitalize(),
                "about": _ABOUT[op][0],
                "launch": _ABOUT[op][1],
                "struct": parameters(op),
                "points": by_op[op],
            }
            for op in ops
        ],
        "op_names": ops,
        "orders": readable,
        "kernels": kernels,
        "cut_off": CUT_OFF,
        "tables": [
            _table(i, table, found, first[found[0].file], {k.kernel.id: first[k.file] for k in found})
            for i, (table, found) in enumerate(exported)
        ],
        "layouts": [_layout(layout) for layout in layouts.values()],
        "archs": archs,
        "library": ["src/dispatch.cu", *(f"src/{op}.cu" for op in ops)],
        "tests": ["test_dispatch", *(f"test_{op}" for op in ops)],
        "flags": " ".join(flag for flag in NVCC_FLAGS if flag.startswith("-O")),
        "tolerance_bf16": TOLERANCE[torch.bfloat16],
        "tolerance_fp16": TOLERANCE[torch.float16],
    }


def _table(
    index: int, table: Table, kernels: list[StandaloneKernel], first: int, numbers: dict[str, int]
) -> dict[str, Any]:
    p, made = table.problem, table.provenance
    group = f", {p.gqa} query heads per KV head" if p.op == "decode" else ""

    def choice(entry: BatchEntry | BucketEntry) -> tuple[int, ...]:
        context, ragged = (entry.longest, entry.timing.ragged) if isinstance(entry, BucketEntry) else (0, False)
        return entry.batch, context, int(ragged), numbers[entry.kernel], entry.splits

    how = "Timed on" if table.evidence == "measured" else "Predicted by a static model and never timed, for"
    commit = f", templates of commit {made.git_commit[:12]}" if made.git_commit else ""
    return {
        "index": index,
        "title": f"{p.op}, head dim {p.head_dim}{group}, {p.cache_format}, {table.device.arch}",
        "origin": f"{how} {table.device.name}, {made.date[:10]}, nvcc {made.nvcc}{commit}.",
        "op": p.op,
        "sm": table.device.arch.removeprefix("sm_"),
        "format": f"WPH_{p.cache_format.upper()}",
        "head_dim": p.head_dim,
        "group": p.gqa,
        "kv_heads": table.kv_heads,
        "by_batch": [choice(e) for e in table.by_batch],
        "buckets": [choice(e) for e in table.by_batch_and_context],
        "first_kernel": first,
        "kernel_count": len(kernels),
        "kernels": [
            {
                "name": k.name,
                "registers": k.kernel.registers,
                "shared": k.facts["shared_bytes"],
                "configuration": k.config.describe(),
            }
            for k in kernels
        ],
    }


def _layout(layout: SlotLayout) -> dict[str, Any]:
    """Initialisers of ``wph_test::Layout`` (codec.h)."""
    fmt = layout.format
    levels = Codec.for_layout(layout).centroids.tolist() if fmt.key_codebook else []

    def row(coded: RowLayout, codebook: bool) -> list[Any]:
        coding = "CODEBOOK" if codebook else "AFFINE" if coded.scale_offset is not None else "FP8"
        offsets = (coded.norm_offset, coded.scale_offset, coded.zero_offset)
        fields = (coded.bits, coded.coefficients, coded.indices_offset, coded.outliers)
        return [coding, *fields, *(-1 if offset is None else offset for offset in offsets)]

    planes, corrected = int(fmt.separate_planes), int(fmt.norm_correction)
    sizes = (layout.head_dim, layout.block_d, layout.normal, layout.slot_bytes, layout.value_offset)
    return {
        "comment": f"{fmt.name}, head dim {layout.head_dim}",
        "fields": [f"WPH_{fmt.name.upper()}", *sizes, planes, corrected],
        "key": row(layout.key, fmt.key_codebook),
        "value": row(layout.value, fmt.value_codebook),
        "centroids": [float_literal(level) for level in levels] or ["0.0f"],
    }


def _tolerance() -> str:
    bf16, fp16 = TOLERANCE[torch.bfloat16], TOLERANCE[torch.float16]
    return (
        "// SPDX-License-Identifier: Apache-2.0\n"
        "// Largest relative error of a head's output, by output type: what every kernel had to meet to be timed.\n"
        f"#pragma once\n\nconstexpr double TOLERANCE_BF16 = {bf16}, TOLERANCE_FP16 = {fp16};\n"
    )
