"""The space of ``wph_store``: new bf16 or fp16 rows to compressed slots."""

from __future__ import annotations

from dataclasses import dataclass

from tuner.space.core import Axis, Config, Constraint, Problem, Space, Value
from tuner.targets import RESERVED_SHARED_BYTES, Target

AXES = (
    Axis("warps", (4, 1, 2, 8, 16), "warps per CTA"),
    Axis("rows", (1, 2, 4, 8), "passes whose loads a warp issues before it uses the first"),
    Axis("chunks", (1, 2, 4), "groups of 8 channels that a lane holds of a row; more of them put more rows on a warp"),
    Axis(
        "sides",
        ("together", "turns", "apart", "copied"),
        "a warp loads a token's key and value together, or one after the other, or different warps take them, or a warp"
        " copies both to shared memory ahead, which takes no registers",
    ),
    Axis("order", ("heads", "tokens"), "what runs fastest over a warp's rows"),
    Axis(
        "transform",
        ("shuffle", "tensor", "quads"),
        "stages of a key's rotation: additions and shuffles, or some on the tensor cores, rows being right operands"
        " (four stages and the length) or left ones, which stay on their lanes (four, and those over a lane's chunks)",
    ),
    Axis(
        "search",
        ("select", "chain", "cells", "packed"),
        "midpoints below a coefficient: binary search by selects, one comparison each, or one within a computed cell,"
        " fetched apart from the code that it decides on or in one word with it",
    ),
    Axis(
        "store",
        ("direct", "staged", "run", "ahead"),
        "lanes write their own bytes, or rows are put together in shared memory first and leave one by one, or adjacent"
        " slots as one, which each pass looks up or, before the first, one lane each",
    ),
    Axis("store_bytes", (4, 8, 16), "widest single store"),
    Axis(
        "passes",
        (1, 2, 3, 4, 6, 8),
        "times that a warp loads: before all that it holds is coded, the next rows are on their way",
    ),
    Axis("min_ctas", (1, 2, 3, 4, 5, 6, 8), "CTAs per SM that the register allocation must allow"),
    Axis(
        "loop",
        ("one", "two"),
        "all passes are one loop, or those that need nothing special have a short one, before which a search's"
        " midpoints are asked for ahead of the rows, and slots looked up while the first keys come",
        absent="one",
    ),
)

CHUNK = 8
"""Channels of a group: one load of 16 bytes, and whole bytes at every width that indices have."""
RUNS = ("run", "ahead")
"""Ways to write that put a pass's slots together as one."""
TOGETHER = ("together", "copied")
"""Ways in which a warp holds a token's key and value at the same time."""
_MIN_LANES = 4  # lanes that share out the words of 3-bit indices


@dataclass(frozen=True)
class Shape:
    """How the threads of a configuration cover rows, and where in shared memory they keep what.

    A warp holds ``rows_per_pass`` rows at a time, each on ``lanes`` lanes. ``row_warps`` warps work on different
    (token, head) pairs, of which a CTA covers ``pairs`` in all its passes. A warp has ``warp_bytes`` of shared memory;
    of these every row takes ``row_bytes``: ``gather_bytes`` of input, where outliers are picked out of it, then the row
    to be written as it arrives in memory but for ``lead_bytes`` before it that bring the indices to a word's boundary.
    ``joint``: a pair's key and value are put together there and written as one, the whole slot. Where slots leave as a
    run, ``row_bytes`` is the slot alone, and what a warp has beyond its rows lies around the run. The last
    ``copied_bytes`` of a warp are where inputs arrive that are copied ahead.
    """

    lanes: int
    rows_per_pass: int
    row_warps: int
    pairs: int
    gather_bytes: int
    lead_bytes: int
    row_bytes: int
    copied_bytes: int
    warp_bytes: int
    shared_bytes: int
    joint: bool


def shape(config: Config) -> Shape:
    """The shape of ``config``; all sizes are whole where no constraint refuses it."""
    layout, warps = config.problem.layout, config["warps"]
    lanes = layout.block_d // (CHUNK * config["chunks"])
    rows_per_pass = 32 // lanes if lanes <= 32 else 0
    row_warps = warps // (2 if config["sides"] == "apart" else 1)
    gather = 2 * layout.head_dim if layout.outliers else 0
    lead = -layout.key.indices_offset % 4
    joint = config["store"] != "direct" and config["sides"] in TOGETHER and not layout.format.separate_planes
    # A unit at a row's end is put together from words that begin up to one unit beyond it.
    slack = config["store_bytes"] + 4
    if config["store"] in RUNS:
        # As in memory, without gaps; the whole begins up to 15 bytes later.
        lead, row = 0, layout.content_bytes
        whole = -(-(row * rows_per_pass + max(slack, 16)) // 16) * 16
    else:
        size = lead + (layout.content_bytes if joint else max(layout.key.size, layout.value.size)) + slack
        row = gather + (-(-size // 16) * 16 if config["store"] == "staged" else 0)
        whole = row * rows_per_pass
    copied = 2 * 512 * config["chunks"] * config["rows"] if config["sides"] == "copied" else 0
    whole += copied
    return Shape(
        lanes=lanes,
        rows_per_pass=rows_per_pass,
        row_warps=row_warps,
        pairs=row_warps * config["rows"] * rows_per_pass * config["passes"],
        gather_bytes=gather,
        lead_bytes=lead,
        row_bytes=row,
        copied_bytes=copied,
        warp_bytes=whole,
        shared_bytes=whole * warps,
        joint=joint,
    )


def _register_estimate(config: Config) -> int:
    """Registers that the rows in flight and one row at work need at least."""
    fmt, held = config.problem.layout.format, CHUNK * config["chunks"]
    copied = config["sides"] == "copied"  # then registers hold the one row at work
    flying = (1 if copied else config["rows"] * (2 if config["sides"] == "together" else 1)) * held // 2
    outliers = held if config.problem.layout.outliers else 0
    constants = (held if fmt.has_signs else 0) + outliers
    thresholds = (1 << fmt.key_bits) - 1 if fmt.key_codebook and config["search"] not in ("cells", "packed") else 0
    pairs = 3 if copied else config["rows"] * (3 if config["passes"] == 1 else 6)
    # Without a rotation channels are unpacked as they are coded, out of the registers that they were loaded to.
    work = held if fmt.key_codebook else held // 2
    return 20 + flying + pairs + work + constants + thresholds


def _registers_short(config: Config, target: Target) -> bool:
    available = min(target.registers // (32 * config["warps"] * config["min_ctas"]), 255)
    return _register_estimate(config) > available


def _shared_bytes(config: Config) -> int:
    return shape(config).shared_bytes


def _shared_short(config: Config, target: Target) -> bool:
    per_sm = target.shared_bytes_per_sm // config["min_ctas"] - RESERVED_SHARED_BYTES
    return config.of(_shared_bytes) > min(target.shared_bytes_per_cta, per_sm)


def _no_rotation(config: Config) -> bool:
    fmt = config.problem.layout.format
    return config["transform"] != "shuffle" and (not fmt.key_codebook or fmt.has_signs)


def _product_shape(config: Config) -> bool:
    return config["transform"] == "tensor" and (config["chunks"] < 2 or shape(config).lanes < 8)


CONSTRAINTS = (
    Constraint(
        "row_too_wide",
        "a row must fit the lanes of one warp",
        lambda c, _: shape(c).lanes > 32,
    ),
    Constraint(
        "row_too_narrow",
        f"a row needs {_MIN_LANES} lanes: so many share out the words of 3-bit indices",
        lambda c, _: shape(c).lanes < _MIN_LANES,
    ),
    Constraint(
        "side_warps",
        "sides=apart needs a warp for keys and one for values",
        lambda c, _: c["sides"] == "apart" and c["warps"] < 2,
    ),
    Constraint(
        "no_codebook",
        "keys without a codebook have no midpoints to search: only the first way stands for all",
        lambda c, _: not c.problem.layout.format.key_codebook and c["search"] != "select",
    ),
    Constraint(
        "no_rotation",
        "only keys that are rotated without signs and whole are operands as they were loaded",
        lambda c, _: _no_rotation(c),
    ),
    Constraint(
        "product_shape",
        "a matrix product takes pairs of a lane's chunks, and pairs of its columns are one row's: chunks >= 2, 8 lanes",
        lambda c, _: _product_shape(c),
    ),
    Constraint(
        "direct_width",
        "a lane that writes its own bytes has no more than a word of them in one place",
        lambda c, _: c["store"] == "direct" and c["store_bytes"] != 4,
    ),
    Constraint(
        "no_run",
        "slots make a run where a warp puts both rows together, and a whole number of 16-bit units each",
        lambda c, _: c["store"] in RUNS and not (shape(c).joint and c.problem.layout.content_bytes % 2 == 0),
    ),
    Constraint(
        "slots_ahead",
        "a lane looks up one slot: those of rows x passes are 32 at most",
        lambda c, _: c["store"] == "ahead" and c["rows"] * shape(c).rows_per_pass * c["passes"] > 32,
    ),
    Constraint(
        "copies_ahead",
        "rows that are copied ahead find their slots looked up ahead",
        lambda c, _: c["sides"] == "copied" and c["store"] != "ahead",
    ),
    Constraint(
        "two_loops",
        "only where rows are copied ahead are there two loops",
        lambda c, _: c["loop"] == "two" and c["sides"] != "copied",
    ),
    Constraint(
        "passes_together",
        "only a warp that holds a token's key and value together loads again: others need the registers in turn",
        lambda c, _: c["passes"] > 1 and c["sides"] not in TOGETHER,
    ),
    Constraint(
        "occupancy",
        "min_ctas CTAs of that many warps do not fit one SM",
        lambda c, t: c["warps"] * c["min_ctas"] > t.max_warps or c["min_ctas"] > t.max_ctas,
    ),
    Constraint("registers", "the rows in flight do not fit the registers of warps x min_ctas", _registers_short),
    Constraint("shared_memory", "the rows being put together exceed the shared memory", _shared_short),
)


def _config(problem: Problem, **changes: Value) -> Config:
    values: dict[str, Value] = {axis.name: axis.values[0] for axis in AXES}
    chunks = 2 if problem.layout.block_d > 32 * CHUNK else 1
    return STORE.config(problem, values | {"chunks": chunks} | changes)


def _default(problem: Problem) -> Config:
    """Key and value in flight together, few rows per warp: a decode step's rows spread over the GPU."""
    return _config(problem)


def _seed(problem: Problem) -> Config:
    """Four warps, keys and values in turns, every level compared with, bytes written as they come."""
    return _config(problem, sides="turns", search="chain" if problem.layout.format.key_codebook else "select")


def _leads(problem: Problem, kv_heads: int) -> tuple[Config, ...]:
    """For chunks of a prompt: wide rows per lane, slots written in whole units, keys rotated on the tensor cores where
    the format lets them be, as many warps as an SM holds, which load while they code. For few tokens: more, shorter
    warps."""
    layout = problem.layout
    search = "cells" if layout.format.key_codebook else "select"
    wide = min(4, 2 * _config(problem)["chunks"])
    widest = min(4, layout.block_d // (CHUNK * _MIN_LANES))
    staged: dict[str, Value] = {"search": search, "store": "staged", "store_bytes": 16}
    # Of a prompt's chunk, 8 CTAs per SM hold more in flight, and 8192 tokens x 8 heads are then just below whole waves.
    eight = [
        _config(problem, chunks=wide, sides=s, min_ctas=8, **staged | {"store_bytes": 8}) for s in ("turns", "together")
    ]
    crowded = [c for c in eight if _register_estimate(c) <= 64]  # of 64 K registers, by 8 CTAs of 4 warps
    tensor: dict[str, Value] = staged | {"transform": "tensor", "store_bytes": 8}
    products = [
        _config(problem, chunks=wide, **tensor | {"min_ctas": 3}),
        *(c.with_(transform="tensor") for c in crowded),
        _config(problem, chunks=wide, **tensor | {"store_bytes": 4}),
        _config(problem, chunks=wide, rows=2, **tensor),
        _config(problem, chunks=wide, warps=1, **tensor),
    ]
    # As many passes as 8192 tokens x 8 heads are waves, but for what is left of the last.
    run: dict[str, Value] = {"search": search, "store": "run", "store_bytes": 16}
    if layout.format.key_codebook:
        run |= {"search": "packed", "transform": "quads"}
    # Rows that are copied ahead leave registers for more warps, and fewer tokens want fewer passes of each.
    ahead = run | {"store": "ahead", "sides": "copied"}
    copied = [
        _config(problem, chunks=widest, passes=n, min_ctas=4, loop="two", **ahead | {"store_bytes": b})
        for n, b in ((4, 8), (4, 16), (3, 16), (2, 8), (2, 16), (1, 16))
    ] + [
        _config(problem, chunks=widest, rows=r, passes=n, min_ctas=m, **ahead)
        for r, n, m in ((2, 2, 4), (1, 4, 4), (1, 3, 6), (1, 2, 6), (1, 2, 4), (1, 1, 4))
    ]
    if wide == 2:
        copied.append(_config(problem, chunks=wide, passes=4, min_ctas=8, **ahead | {"transform": "tensor"}))
    runs = [
        *(c for c in copied if not _no_rotation(c) and not _product_shape(c)),
        _config(problem, chunks=widest, passes=4, min_ctas=4, **run | {"store": "ahead"}),
        _config(problem, chunks=widest, passes=4, min_ctas=4, **run),
        _config(problem, chunks=widest, passes=2, min_ctas=4, **run),
        _config(problem, chunks=widest, min_ctas=5, **run),
        *(_config(problem, chunks=2, passes=n, min_ctas=m, **run) for n, m in ((6, 6), (1, 8)) if wide == 2),
    ]
    joint = not layout.format.separate_planes  # others' slots make no runs, and their signs need the registers
    return (
        *dict.fromkeys(runs if joint else ()),
        *(c for c in products if not _no_rotation(c) and not _product_shape(c)),
        _config(problem, chunks=wide, rows=2, **staged),
        *crowded,
        _config(problem, chunks=widest, rows=1, **staged),
        _config(problem, chunks=widest, rows=2, warps=8, **staged | {"sides": "turns"}),
        _config(problem, rows=2, **staged),
        _config(problem, sides="apart", search=search),
        _config(problem, sides="apart", warps=8, **staged),
        _config(problem, search=search),
    )


STORE = Space("store", AXES, CONSTRAINTS, _default, _seed, _leads)
