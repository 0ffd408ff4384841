"""What the tuner chooses at sample calls: the exported dispatch is tested against it."""

from __future__ import annotations

from dataclasses import replace

from tuner.geometry import (
    DIRTY_RUN_TOKENS,
    Geometry,
    Scratch,
    decode_geometry,
    decode_scratch,
    dequant_geometry,
    reduce_geometry,
    store_geometry,
)
from tuner.standalone.kernels import StandaloneKernel
from tuner.suits import CacheOrder, refusal
from tuner.table import CUT_OFF, Table, lookup

_BLOCK_SIZE, _MAX_BLOCKS = 48, 100


def points(table: Table, kernels: list[StandaloneKernel]) -> list[str]:
    """C++ initialisers {call, expected} for calls on, between and beyond the buckets of ``table``."""
    batches = sorted({e.batch for e in table.by_batch})
    contexts = sorted({e.longest for e in table.by_batch_and_context} or {4096})
    asked_batches = dict.fromkeys((batches[0], 3 * batches[0], batches[-1], int(CUT_OFF * batches[-1]) + 1))
    asked_contexts = dict.fromkeys((0, contexts[0], 3 * contexts[0], 3 * contexts[-1] // 4, 3 * contexts[-1]))
    by_id = {k.kernel.id: k for k in kernels}
    p, sm = table.problem, table.device.arch.removeprefix("sm_")
    found = []
    for batch in asked_batches:
        for context in asked_contexts if p.op != "store" else (0,):
            for kv_heads in (table.kv_heads, 2 * table.kv_heads):
                ragged = p.op == "decode" and batch in (batches[0], batches[-1])
                dirty = p.op == "dequant" and context == 0
                call = [sm, f"WPH_{p.cache_format.upper()}", p.head_dim]
                call += {
                    "decode": [p.gqa, kv_heads, batch, context, int(ragged)],
                    "dequant": [kv_heads, batch, context, _BLOCK_SIZE, _MAX_BLOCKS, int(dirty)],
                    "store": [kv_heads, batch],
                }[p.op]
                choice = lookup(table, batch, context or None, kv_heads=kv_heads, ragged=ragged)
                expected = ""  # out of range
                if choice is not None:
                    expected = _expected(by_id[choice.kernel], batch, kv_heads, choice.splits, dirty)
                found.append(f"{{{{{', '.join(map(str, call))}}}, {{{expected}}}}}")
    return found


def orders(kernels: list[StandaloneKernel], kv_heads: int, first: int) -> list[str]:
    """C++ initialisers {kernel, cache, readable} for caches in and out of the order that decode kernels want.

    ``first`` is the number of ``kernels[0]`` in the export. One kernel of each way to read stands for all.
    """
    ways = ("load", "head_warps", "alignment")
    alike = {tuple(k.facts[fact] for fact in ways): (i, k) for i, k in enumerate(kernels, first)}
    found = []
    for number, kernel in alike.values():
        usual = CacheOrder.standard(kernel.config, kv_heads=kv_heads)
        slot = kernel.facts["slot_bytes"]
        head_major = replace(usual, token=slot, head=usual.block_size * slot)
        for order in (
            usual,
            head_major,
            replace(head_major, address=8),
            *(replace(usual, address=address) for address in (1, 2, 4, 16)),
            replace(usual, block=usual.block + 8),
            replace(usual, block=usual.block + 64),
            replace(usual, token=usual.token + 16),
            replace(usual, head=usual.head + 1),
            replace(usual, block_size=24),
            replace(usual, kv_heads=kv_heads + 1),
        ):
            readable = str(refusal(kernel.config, order) is None).lower()
            fields = (*order.strides, order.block_size, order.kv_heads)
            found.append(f"{{{number}, {', '.join(map(str, fields))}, {readable}}}")
    return found


def _expected(kernel: StandaloneKernel, batch: int, kv_heads: int, splits: int, dirty: bool) -> str:
    """``batch`` of op store: tokens; where ``dirty``: slots of the list."""
    config = kernel.config
    scratch = Scratch(0, 0)
    if kernel.op == "decode":
        main = decode_geometry(config, batch=batch, kv_heads=kv_heads, splits=splits)
        scratch = decode_scratch(config, batch=batch, kv_heads=kv_heads, splits=splits)
    elif kernel.op == "store":
        main, splits = store_geometry(config, tokens=batch, kv_heads=kv_heads), 1
    else:
        entries, tokens = (batch, DIRTY_RUN_TOKENS) if dirty else (batch * _MAX_BLOCKS, _BLOCK_SIZE)
        main, splits = dequant_geometry(config, entries=entries, block_size=tokens, kv_heads=kv_heads), 1
    second = Geometry((0, 0, 0), 0, 0)
    if len(kernel.entries) > 1:
        second = reduce_geometry(config, batch=batch, kv_heads=kv_heads)
    return (
        f'"{kernel.name}", {_braced(main.grid)}, {main.block}, {main.shared_bytes}, {_braced(second.grid)}, '
        f"{second.block}, {splits}, {4 * scratch.partial_floats}, {4 * scratch.counters}"
    )


def _braced(values: tuple[int, ...]) -> str:
    return f"{{{', '.join(map(str, values))}}}"
