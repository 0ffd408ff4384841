"""The axes of ``wph_decode``'s space, and where some of their values have a place."""

from __future__ import annotations

from tuner.space.core import Axis, Config
from tuner.space.plan import DecodePlan

AXES = (
    Axis("warps", (4, 1, 2, 8, 16), "warps per CTA"),
    Axis("head_warps", (1, 2, 4, 8, 16), "KV heads that a CTA handles side by side"),
    Axis("dim_warps", (1, 2, 4), "warps that share a token, each with a slice of the head dim"),
    Axis("math", ("mma", "fma"), "dot products on tensor cores (mma.sync) or on CUDA cores"),
    Axis("lookup", ("table", "replicated", "spread", "prmt", "shuffle", "woven"), "how an index becomes a level"),
    Axis("load", ("cp_async", "direct", "bulk", "bulk_rows"), "how slots travel: cp.async, plain loads, bulk copies"),
    Axis("load_bytes", (16, 8, 4), "width of one asynchronous copy"),
    Axis("stages", (2, 1, 3, 4), "steps in flight per warp"),
    Axis("tokens", (16, 32, 64), "tokens that a warp takes per softmax step"),
    Axis(
        "query",
        ("shared", "registers", "paired", "joined", "borrowed"),
        "where the query waits and where its halves meet; borrowed: in registers, filed where a stage will be",
    ),
    Axis("accumulate", ("f32", "f16x2", "precise"), "innermost sums: fp32 or halves (fma), precise (mma)"),
    Axis("min_ctas", (1, 2, 3, 4, 6, 8), "CTAs per SM that the register allocation must allow"),
    Axis(
        "reduction",
        (
            *("last", "kernel", "tree", "cluster2", "cluster4", "cluster8"),
            *("all", "all_warps", "all_threads", "all_segments"),
        ),
        "who adds up splits: the last CTA, a second kernel, branches, first clusters of CTAs, or all, a share each: "
        "heads, whose contributions its warps divide or whose coefficients its threads do, or segments of heads",
    ),
    Axis(
        "schedule",
        ("grid", "stream", "share", "deal", "allot"),
        "splits per request, or a persistent grid: equal quotas, or pieces, which one warp deals out; allot: with "
        "lengths read ahead",
    ),
    Axis(
        "words",
        ("strided", "adjacent", "whole", "whole_adjacent"),
        "which of a row's words a lane unpacks, every fourth or a run; whole: of a row that begins within a word, its "
        "first bytes come last",
        "strided",
    ),
    Axis("tail", ("masked", "apart"), "tokens past the end: masked in every step, or in a last one apart", "masked"),
    Axis(
        "beginning",
        ("ordered", "prompt"),
        "everything in order; or prompt: only what depends on lengths waits for them, warps ask for tokens in turn, "
        "clusters store their sums, mbarriers are opened meanwhile",
        absent="ordered",
    ),
    Axis("lead", (4, 8, 12), "steps that a request's beginning counts as, where CTAs share requests out", absent=4),
    Axis("squares", (1, 2), "k-steps whose squares of keys are added up in halves before they reach fp32", absent=1),
    Axis(
        "rescale",
        ("always", "lazy"),
        "sums shrink to a new maximum of the scores whenever one appears; or lazy: where weights would exceed 2^8",
        absent="always",
    ),
)


def _has_unaligned_values(config: Config) -> bool:
    """Whether values are fields of four bits in staged rows that are aligned to two bytes."""
    layout = config.problem.layout
    fields = layout.value.bits == 4 and not layout.format.value_codebook
    return fields and config["load"] != "direct" and DecodePlan(config).alignment == 2


def has_unaligned_fields(config: Config) -> bool:
    """Whether keys and values are fields of four bits in staged rows that are aligned to two bytes."""
    return config.problem.layout.key.bits == 4 and _has_unaligned_values(config)


def has_rows_alike(config: Config) -> bool:
    """Whether bulk copies leave rows of 4-bit values aligned to two bytes, and tokens whole words apart: then a warp's
    rows all begin at the same distance from a word."""
    apart = config["head_warps"] * config.problem.layout.slot_bytes
    return _has_unaligned_values(config) and DecodePlan(config).bulk and apart % 4 == 0


def cannot_divide(config: Config) -> bool:
    """Whether contributions to a row could not be divided among the CTA's warps."""
    plan = DecodePlan(config)
    parts = config["warps"] // plan.row_warps
    return not plan.prompt or not 0 < parts <= plan.query_rows * plan.merge_stripes


def cannot_chain(config: Config) -> bool:
    """Whether squares of several k-steps could not be added up in halves that begin where it costs least."""
    plan = DecodePlan(config)
    return not (plan.sums_squares and plan.precise)
