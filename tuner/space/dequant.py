"""The space of ``wph_dequant``: compressed pages to bf16 rows."""

from __future__ import annotations

from dataclasses import dataclass

from tuner.space.core import Axis, Config, Constraint, Problem, Space, Value
from tuner.targets import RESERVED_SHARED_BYTES, Target

AXES = (
    Axis("warps", (4, 1, 2, 8, 16, 32), "warps per CTA"),
    Axis("rows", (1, 2, 4, 8), "passes whose loads a warp issues before it uses the first"),
    Axis("steps", (1, 2, 4, 8), "times that a CTA repeats this, within one block of the cache"),
    Axis(
        "divide",
        ("heads", "tokens", "planes"),
        "what runs fastest over rows: heads or tokens; planes: heads, keys and values apart",
    ),
    Axis("dim_warps", (1, 2), "warps that share a row and exchange the last butterfly stage through shared memory"),
    Axis(
        "transform",
        ("shuffle", "half", "mma"),
        "Walsh-Hadamard by shuffles of fp32, of half pairs, or as matrix products",
    ),
    Axis("lookup", ("table", "replicated", "prmt", "shuffle"), "how a codebook index becomes a level"),
    Axis(
        "load",
        ("direct", "staged", "bulk"),
        "plain loads; asynchronous copies into shared memory a step ahead; one bulk copy of all that a CTA decodes",
    ),
    Axis("load_bytes", (4, 16), "width of one load or asynchronous copy"),
    Axis("store_bytes", (16, 8, 4), "bytes that a lane writes at once: the channels that it holds side by side"),
    Axis("min_ctas", (1, 2, 3, 4, 6, 8), "CTAs per SM that the register allocation must allow"),
)

NAMED_BARRIERS = 15
_MAX_SLOTS = 512


@dataclass(frozen=True)
class Shape:
    """How the threads of a configuration cover rows, and where in shared memory they keep what.

    A warp holds ``rows_per_pass`` rows (or halves of rows), each on ``lanes`` lanes; a lane holds ``repeats`` chunks
    of ``chunk`` adjacent channels. ``row_warps`` warps (or groups of dim_warps warps) work on different rows of a side.
    ``slots`` is what a CTA covers of a block's tokens x heads. ``*_at`` and ``*_bytes`` are bytes of shared memory:
    ``plane_bytes`` of all slots of a plane, where they come by bulk copy, counted at the mbarrier at ``barrier_at``.
    """

    chunk: int
    width: int
    lanes: int
    repeats: int
    rows_per_pass: int
    row_warps: int
    step_slots: int
    slots: int
    lookup_bytes: int
    stage_at: int
    stage_row_bytes: int
    stage_warp_bytes: int
    plane_bytes: int
    barrier_at: int
    scatter_at: int
    scatter_row_bytes: int
    exchange_at: int
    exchange_group_bytes: int
    shared_bytes: int


def _lookup_bytes(config: Config) -> int:
    layout = config.problem.layout
    if not layout.format.key_codebook or config["lookup"] in ("prmt", "shuffle"):
        return 0
    if config["transform"] == "shuffle":
        return 4 << layout.key.bits  # one fp32 level per index
    copies = 32 if config["lookup"] == "replicated" else 1
    return copies * 4 << 2 * layout.key.bits  # two halves per pair of indices


def shape(config: Config) -> Shape:
    """The shape of ``config``; all sizes are whole where no constraint refuses it."""
    layout, warps = config.problem.layout, config["warps"]
    chunk = config["store_bytes"] // 2
    width = layout.block_d // config["dim_warps"]
    lanes = min(32, width // chunk)
    repeats, rows_per_pass = width // (chunk * lanes), 32 // lanes
    row_warps = warps // config["dim_warps"] // (2 if config["divide"] == "planes" else 1)
    step_slots = row_warps * config["rows"] * rows_per_pass

    stage_at = -(-_lookup_bytes(config) // 128) * 128
    stage_row = stage_warp = 0
    if config["load"] == "staged":
        # A row keeps its alignment, so its first and last copies may hold bytes of its neighbours.
        stage_row = -(-(max(layout.key.size, layout.value.size) + 15) // 16) * 16
        stage_warp = stage_row * rows_per_pass * config["rows"] * (2 if config["steps"] > 1 else 1)
    plane = barrier_at = 0
    scatter_at = stage_at + warps * stage_warp
    if config["load"] == "bulk":
        plane = -(-step_slots * config["steps"] * layout.slot_bytes // 16) * 16
        barrier_at = stage_at + plane * (2 if layout.format.separate_planes else 1)
        scatter_at = barrier_at + 16
    # 64 channels fill the banks once; a word of padding after them separates lanes that would meet in a bank.
    scatter_row = 2 * layout.head_dim + 4 * (layout.head_dim // 64) if layout.outliers else 0
    exchange_at = -(-(scatter_at + warps * rows_per_pass * scatter_row) // 128) * 128
    exchanges = config["dim_warps"] > 1 and layout.format.key_codebook
    exchange_group = 2 * 2 * 32 * 4 * (repeats * chunk + 1) if exchanges else 0
    return Shape(
        chunk=chunk,
        width=width,
        lanes=lanes,
        repeats=repeats,
        rows_per_pass=rows_per_pass,
        row_warps=row_warps,
        step_slots=step_slots,
        slots=step_slots * config["steps"],
        lookup_bytes=_lookup_bytes(config),
        stage_at=stage_at,
        stage_row_bytes=stage_row,
        stage_warp_bytes=stage_warp,
        plane_bytes=plane,
        barrier_at=barrier_at,
        scatter_at=scatter_at,
        scatter_row_bytes=scatter_row,
        exchange_at=exchange_at,
        exchange_group_bytes=exchange_group,
        shared_bytes=exchange_at + warps // config["dim_warps"] * exchange_group,
    )


def _has_codebook(config: Config) -> bool:
    return config.problem.layout.format.key_codebook


def _row_warps_missing(config: Config, target: Target) -> bool:
    return config["warps"] < config["dim_warps"] * (2 if config["divide"] == "planes" else 1)


def _register_estimate(config: Config) -> int:
    """Registers that the rows in flight and one decoded row need at least."""
    layout = config.problem.layout
    chunk = config["store_bytes"] // 2
    held = max(chunk, layout.block_d // config["dim_warps"] // 32)
    waiting = 8 + 2 * held // chunk if config["load"] == "direct" else 6
    return 24 + config["rows"] * waiting + held * (2 if layout.format.has_signs else 1)


def _registers_short(config: Config, target: Target) -> bool:
    return _register_estimate(config) * config["warps"] * 32 * config["min_ctas"] > target.registers


def _shared_bytes(config: Config) -> int:
    return shape(config).shared_bytes


def _shared_short(config: Config, target: Target) -> bool:
    if _row_warps_missing(config, target):
        return False
    needed = config.of(_shared_bytes)
    per_sm = target.shared_bytes_per_sm // config["min_ctas"] - RESERVED_SHARED_BYTES
    return needed > min(target.shared_bytes_per_cta, per_sm)


CONSTRAINTS = (
    Constraint("row_warps", "dim_warps and divide=planes need warps of their own", _row_warps_missing),
    Constraint(
        "dim_split_short",
        "two warps share a row only from head dim 256 on: shorter rows do not fill one warp",
        lambda c, t: c["dim_warps"] > 1 and c.problem.head_dim < 256,
    ),
    Constraint(
        "dim_split_plain",
        "keys without a transform gain nothing from two warps per row: they are divided by rows",
        lambda c, t: c["dim_warps"] > 1 and not _has_codebook(c),
    ),
    Constraint(
        "dim_split_outliers",
        "normal channels of one half scatter over the whole row, so two warps cannot store a half each",
        lambda c, t: c["dim_warps"] > 1 and c.problem.layout.outliers > 0,
    ),
    Constraint(
        "barriers",
        f"a CTA has {NAMED_BARRIERS} named barriers, one per pair of warps that share a row",
        lambda c, t: c["dim_warps"] > 1 and c["warps"] // c["dim_warps"] > NAMED_BARRIERS,
    ),
    Constraint(
        "no_codebook",
        "keys without a codebook have no transform and no lookup: only the plainest value stands for them",
        lambda c, t: not _has_codebook(c) and (c["transform"], c["lookup"]) != ("shuffle", "table"),
    ),
    Constraint(
        "replicated_levels",
        "the fp32 table of single levels has no bank conflicts that copies could avoid",
        lambda c, t: c["transform"] == "shuffle" and c["lookup"] == "replicated",
    ),
    Constraint(
        "mma_fragment",
        "the matrix product leaves a lane with 8 adjacent channels: store_bytes is 16",
        lambda c, t: c["transform"] == "mma" and c["store_bytes"] != 16,
    ),
    Constraint(
        "narrow_store",
        "on a warp-wide row a lane holds more adjacent channels: narrower stores only add instructions",
        lambda c, t: c["store_bytes"] // 2 < min(8, c.problem.head_dim // c["dim_warps"] // 32),
    ),
    Constraint(
        "direct_width",
        "slots have no alignment, so a direct load is 4 bytes wide, as are those of what a bulk copy brought",
        lambda c, t: c["load"] != "staged" and c["load_bytes"] != 4,
    ),
    Constraint(
        "bulk_order",
        "a bulk copy brings slots as they lie in the cache: a token's heads one after the other",
        lambda c, t: c["load"] == "bulk" and c["divide"] == "tokens",
    ),
    Constraint(
        "bulk_slots",
        "bulk copies move multiples of 16 bytes, which a multiple of eight slots is in every format",
        lambda c, t: c["load"] == "bulk" and not _row_warps_missing(c, t) and shape(c).slots % 8 != 0,
    ),
    Constraint(
        "too_many_slots",
        f"a CTA would cover more than {_MAX_SLOTS} rows per side: most blocks of a cache have fewer",
        lambda c, t: not _row_warps_missing(c, t) and shape(c).slots > _MAX_SLOTS,
    ),
    Constraint(
        "occupancy",
        "min_ctas CTAs of that many warps do not fit one SM",
        lambda c, t: c["warps"] * c["min_ctas"] > t.max_warps or c["min_ctas"] > t.max_ctas,
    ),
    Constraint("registers", "the rows in flight do not fit the registers of warps x min_ctas", _registers_short),
    Constraint("shared_memory", "tables, staging and exchange buffers exceed the shared memory", _shared_short),
)


def _config(problem: Problem, **changes: Value) -> Config:
    values: dict[str, Value] = {axis.name: axis.values[0] for axis in AXES}
    return DEQUANT.config(problem, values | changes)


def _default(problem: Problem) -> Config:
    """Direct loads, four passes in flight, Hadamard on tensor cores where there is one: any cache, any GPU."""
    if problem.layout.format.key_codebook:
        return _config(problem, rows=4, steps=2, transform="mma", lookup="prmt")
    return _config(problem, rows=4, steps=2)


def _seed(problem: Problem) -> Config:
    """Four warps, one row per warp and a shuffle butterfly: stores as narrow as a warp-wide row makes them."""
    return _config(problem, store_bytes=2 * min(8, problem.head_dim // 32))


def _leads(problem: Problem, kv_heads: int) -> tuple[Config, ...]:
    """One bulk copy of all that a CTA decodes, for one to sixteen warps: 32 passes, or as many as a block of 16 tokens
    fills; without a bound on registers and, where they fit, with one."""
    kinds: tuple[dict[str, Value], ...] = ({},)
    if problem.layout.format.key_codebook:
        kinds = ({"transform": "mma", "lookup": "table"}, {"transform": "mma", "lookup": "prmt"})
    found = []
    for warps, rows, steps in ((4, 2, 4), (8, 1, 4), (2, 4, 4), (1, 4, 8), (16, 1, 2)):
        for kind in kinds:
            config = _config(problem, load="bulk", warps=warps, rows=rows, steps=steps, **kind)
            for axis in ("steps", "rows"):
                while shape(config).slots > max(8, 16 * kv_heads) and config[axis] > 1:
                    config = config.with_(**{axis: config[axis] // 2})
            found += [config.with_(min_ctas=min(8, 32 // warps)), config]
    return tuple(dict.fromkeys(found))


DEQUANT = Space("dequant", AXES, CONSTRAINTS, _default, _seed, _leads)
