"""The space of ``wph_decode``: fused split-KV decode attention."""

from __future__ import annotations

from tuner.space.core import Config, Constraint, Space
from tuner.space.decode_axes import AXES, cannot_chain, cannot_divide, has_rows_alike, has_unaligned_fields
from tuner.space.decode_landmarks import default_config, lead_configs, renewed, seed_config
from tuner.space.plan import DecodePlan, shared_bytes
from tuner.space.registers import too_many_registers
from tuner.targets import RESERVED_SHARED_BYTES


def _overfills_gaps(plan: DecodePlan) -> bool:
    return plan.woven and 2 * plan.query_bytes > plan.lookup_bytes


def _lends(config: Config) -> bool:
    plan = DecodePlan(config)
    return plan.bulk and plan.teams == 1 and config["stages"] > 1 and plan.query_bytes <= plan.stage_bytes


CONSTRAINTS = (
    Constraint(
        "whole_warps",
        "warps must divide into head warps x dim warps x token warps",
        lambda c, _: c["warps"] % (c["head_warps"] * c["dim_warps"]) != 0,
    ),
    Constraint(
        "slice",
        "a warp's slice needs 64 coefficients: each lane unpacks whole words",
        lambda c, _: c.problem.layout.block_d // c["dim_warps"] < 64,
    ),
    Constraint(
        "lookup_needs_codebook",
        "without a codebook every lookup is the same kernel: only the first is kept",
        lambda c, _: not c.problem.layout.format.key_codebook and c["lookup"] != "table",
    ),
    Constraint(
        "woven_query",
        "tensor-core fragments of the query must fill no more than the woven table's gaps",
        lambda c, _: c["lookup"] == "woven" and (c["math"] != "mma" or _overfills_gaps(DecodePlan(c))),
    ),
    Constraint(
        "borrowed_query",
        "a stage of bulk copies lends its place where all warps share it, others come before it, and the query fits it",
        lambda c, _: c["query"] == "borrowed" and not _lends(c),
    ),
    Constraint(
        "adjacent_words",
        "runs of words spare reads where staged rows of 4-bit fields are aligned to two bytes only",
        lambda c, _: DecodePlan(c).adjacent and not has_unaligned_fields(c),
    ),
    Constraint(
        "whole_words",
        "rows may be read from their first whole word on where bulk copies leave 4-bit values aligned to two bytes "
        "only, and tokens whole words apart",
        lambda c, _: DecodePlan(c).whole_words and not has_rows_alike(c),
    ),
    Constraint(
        "copy_width",
        "the copy width exists for asynchronous copies only: elsewhere 16 stands for none",
        lambda c, _: c["load"] != "cp_async" and c["load_bytes"] != 16,
    ),
    Constraint(
        "row_width",
        "bulk copies of rows take multiples of 16 bytes: so many must the CTA's heads of a token have",
        lambda c, _: c["load"] == "bulk_rows" and c["head_warps"] * c.problem.layout.slot_bytes % 16 != 0,
    ),
    Constraint(
        "direct_stages",
        "direct loads have no stages",
        lambda c, _: c["load"] == "direct" and c["stages"] != 1,
    ),
    Constraint(
        "half_sums",
        "half-precision sums are a variant of the CUDA-core path",
        lambda c, _: c["accumulate"] == "f16x2" and c["math"] != "fma",
    ),
    Constraint(
        "precise_sums",
        "tensor cores multiply halves: without precise sums peaked scores and small values lose too much",
        lambda c, _: (c["accumulate"] == "precise") != (c["math"] == "mma"),
    ),
    Constraint(
        "chained_squares",
        "squares of several k-steps are added up in halves where tensor cores normalise keys, precisely",
        lambda c, _: DecodePlan(c).chains_squares and cannot_chain(c),
    ),
    Constraint(
        "lazy_rescaling",
        "halves hold weights above one where the maximum is that of weights times the scales of their values",
        lambda c, _: c["rescale"] == "lazy" and not DecodePlan(c).scaled_weights,
    ),
    Constraint(
        "clustered_splits",
        "the CTAs of a cluster have consecutive splits of one request, as the grid schedule has them",
        lambda c, _: DecodePlan(c).cluster > 1 and c["schedule"] != "grid",
    ),
    Constraint(
        "idle_lead",
        "beginnings count where a persistent grid deals requests out by equal quotas, promptly",
        lambda c, _: c["lead"] != 4 and not (DecodePlan(c).shares and DecodePlan(c).prompt),
    ),
    Constraint(
        "waiting_ctas",
        "a CTA waits for the others' splits where it knows that nothing else is left for it",
        lambda c, _: DecodePlan(c).waits and c["schedule"] != "grid" and not DecodePlan(c).dealt,
    ),
    Constraint(
        "prompt_allotment",
        "lengths are read ahead where beginnings are prompt",
        lambda c, _: DecodePlan(c).allots and not DecodePlan(c).prompt,
    ),
    Constraint(
        "divided_shares",
        "contributions are divided with prompt beginnings, by warps enough for a row's vectors, and where the merge "
        "buffer has a row for each part",
        lambda c, _: DecodePlan(c).divides_shares and cannot_divide(c),
    ),
    Constraint(
        "held_query",
        "tensor-core fragments alone fit in registers, or have halves whose products could meet in one sum",
        lambda c, _: c["query"] in ("registers", "joined", "borrowed") and c["math"] != "mma",
    ),
    Constraint(
        "paired_query",
        "a tensor-core tile has room for both halves of up to four query heads",
        lambda c, _: c["query"] == "paired" and (c["math"] != "mma" or c.problem.gqa > 4),
    ),
    Constraint(
        "prompt_query",
        "rows of the query are read ahead as they lie: without signs, and channels in their order",
        lambda c, _: c["beginning"] != "ordered" and c.problem.layout.format.has_signs,
    ),
    Constraint(
        "resident_warps",
        "min_ctas asks for more warps than an SM holds",
        lambda c, t: c["warps"] * c["min_ctas"] > t.max_warps,
    ),
    Constraint(
        "shared_memory",
        "the CTA's shared memory exceeds what a block may have",
        lambda c, t: c.of(shared_bytes) > t.shared_bytes_per_cta,
    ),
    Constraint(
        "shared_occupancy",
        "min_ctas CTAs exceed the SM's shared memory (1 KB per CTA is the system's)",
        lambda c, t: (c.of(shared_bytes) + RESERVED_SHARED_BYTES) * c["min_ctas"] > t.shared_bytes_per_sm,
    ),
    Constraint(
        "registers",
        "accumulators, scores and held query need more registers than min_ctas leaves per thread",
        too_many_registers,
    ),
)

DECODE = Space("decode", AXES, CONSTRAINTS, default_config, seed_config, lead_configs, renewed)
