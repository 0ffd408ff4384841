"""The space of ``wph_decode``: fused split-KV decode attention."""

from __future__ import annotations

from tuner.space.banks import token_pitch, word_reads
from tuner.space.core import Axis, Config, Constraint, Problem, Space, Value
from tuner.space.plan import DecodePlan, shared_bytes
from tuner.space.registers import register_estimate, too_many_registers
from tuner.targets import RESERVED_SHARED_BYTES, TARGETS

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
        ("last", "kernel", "tree", "cluster2", "cluster4", "cluster8", "all", "all_warps", "all_threads"),
        "who adds up splits: the last CTA, a second kernel, branches, first clusters of CTAs, or all, a share each, "
        "whose contributions its warps divide or whose coefficients its threads do",
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
    Axis("squares", (1, 2, 4), "k-steps whose squares of a key are added up in halves before they reach fp32", absent=1),
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


def _overfills_gaps(plan: DecodePlan) -> bool:
    return plan.woven and 2 * plan.query_bytes > plan.lookup_bytes


def _cannot_divide(config: Config) -> bool:
    plan = DecodePlan(config)
    parts = config["warps"] // plan.row_warps
    return not plan.prompt or not 0 < parts <= plan.query_rows * plan.merge_stripes


def _cannot_chain(config: Config) -> bool:
    plan = DecodePlan(config)
    return not (plan.sums_squares and plan.precise) or plan.key_steps % plan.square_steps != 0


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
        "squares of keys are added up where tensor cores sum them, those of as many k-steps as divide a warp's",
        lambda c, _: DecodePlan(c).chains_squares and _cannot_chain(c),
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
        lambda c, _: DecodePlan(c).divides_shares and _cannot_divide(c),
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


def _config(problem: Problem, **chosen: Value) -> Config:
    plain = {a.name: a.values[0] for a in AXES} | {"accumulate": "precise"}
    return DECODE.config(problem, plain | chosen)


def _fewest_slices(problem: Problem, **chosen: Value) -> Config:
    """The configuration with the fewest dim warps whose accumulators fit."""
    for dim_warps in (1, 2, 4):
        config = _config(problem, dim_warps=dim_warps, **chosen)
        if problem.layout.block_d // dim_warps < 64:
            break
        best = config
        if register_estimate(config) <= 200:
            break
    return best


def default_config(problem: Problem) -> Config:
    """Four warps on different tokens of one KV head, tensor cores, two stages of asynchronous copies where all GPUs
    have the shared memory for them, else one."""
    config = _fewest_slices(problem, tokens=16)
    least = min(target.shared_bytes_per_cta for target in TARGETS.values())
    return config if DecodePlan(config).shared_bytes <= least else config.with_(stages=1)


def direct_variant(config: Config) -> Config:
    """``config`` with plain loads, for caches whose pages are not aligned for asynchronous copies."""
    return config.with_(load="direct", stages=1, load_bytes=16, words="strided")


def seed_config(problem: Problem) -> Config:
    """The seed's layout carried over: four warps, one KV head each, plain loads, levels from shuffles."""
    codebook = problem.layout.format.key_codebook
    dims = default_config(problem)["dim_warps"]
    lookup = "shuffle" if codebook else "table"
    return _config(problem, head_warps=4 // dims, dim_warps=dims, load="direct", stages=1, lookup=lookup)


def _best_words(config: Config, kv_heads: int) -> Config:
    """``config`` with words dealt to lanes so that reading them takes fewer turns, where there is a choice."""
    ways = ("whole", "whole_adjacent") if has_rows_alike(config) else ("strided", "adjacent")
    choice = [config.with_(words=way) for way in ways[: 1 + has_unaligned_fields(config)]]
    return min(choice, key=lambda c: word_reads(c, token_pitch(c, kv_heads))[1])


def _bulk(problem: Problem, kv_heads: int, most: int) -> dict[str, Value]:
    """Bulk copies of all heads, or where a CTA takes fewer, of as many as divide all and lie in whole 16 bytes."""
    counts = [int(heads) for heads in DECODE.axis("head_warps").values if int(heads) <= most]
    if kv_heads in counts:
        return {"load": "bulk", "head_warps": kv_heads}
    parts = [h for h in counts if kv_heads % h == 0 and h * problem.layout.slot_bytes % 16 == 0]
    return {"load": "bulk_rows", "head_warps": max(parts, default=kv_heads)}


def _lead(coefficients: int) -> int:
    """Steps that beginning and ending a span took the time of, for so many coefficients of a CTA's query heads."""
    return 4 if coefficients < 6144 else 8 if coefficients < 16384 else 12


def lead_configs(problem: Problem, kv_heads: int) -> tuple[Config, ...]:
    """What won before, scaled to the problem, with what came later beside it.

    Large batches: bulk copies of all KV heads, the pair table shared by many warps, tokens divided evenly: by requests
    where these are as long, else in pieces of them or in quotas that count beginnings.
    Small batches: every SM gets a piece of one head; channels divided among warps shorten a step, branches and clusters
    the merging.
    """
    dims = default_config(problem)["dim_warps"]
    codebook = problem.layout.format.key_codebook
    replicated, spread, woven = ("replicated", "spread", "woven") if codebook else ("table", "table", "table")
    bulk: dict[str, Value] = {"schedule": "share", "dim_warps": dims} | _bulk(problem, kv_heads, 8)
    allowed = {axis.name: axis.values for axis in AXES}
    alone: dict[str, Value] = {"load": "cp_async", "tokens": 16, "dim_warps": dims}
    sliced = alone | {"warps": 8, "dim_warps": 2 * dims}
    thin = alone | {"warps": 8, "dim_warps": min(4, problem.layout.block_d // 64)}
    # What 99 KB of shared memory hold.
    lookups = ((3, "table"), (2, "prmt"), (2, "shuffle"), (1, "shuffle")) if codebook else ((4, "table"), (2, "table"))
    small = [alone | {"warps": 8, "stages": stages, "lookup": lookup} for stages, lookup in lookups]
    # Two tiles of query heads leave registers for whole rows where the query's halves meet in one sum.
    query = "paired" if problem.gqa <= 4 else "joined" if problem.gqa > 8 else "shared"
    # One tile leaves them for the query too, at eight warps; two stages of rows of 512 leave it no other place.
    eight: dict[str, Value] = {"warps": 8, "lookup": woven}
    sixteen: dict[str, Value] = {"warps": 16, "lookup": woven}
    if query == "shared":
        eight |= (
            {"query": "borrowed", "dim_warps": 2 * dims} if problem.layout.block_d > 256 else {"query": "registers"}
        )
        sixteen |= {"query": "joined"}
    beginning = "ordered" if problem.layout.format.has_signs else "prompt"
    lean: dict[str, Value] = {"tail": "apart", "query": query, "beginning": beginning}
    if problem.layout.format.norm_correction:  # longer sums where they leave the loop's registers in peace
        lean["squares"] = 2 if problem.layout.block_d <= 128 or problem.gqa > 8 else 4
    dealt = bulk | lean | {"schedule": "allot" if beginning == "prompt" else "deal"}
    if beginning == "prompt":
        dealt["lead"] = _lead(int(dealt["head_warps"]) * problem.gqa * problem.layout.block_d)
    whole = dealt | {"tokens": 32, "dim_warps": 1 if problem.layout.block_d <= 256 else dims}
    halves: dict[str, Value] = {"warps": 8, "dim_warps": 2 * dims, "lookup": spread}
    even: dict[str, Value] = {"schedule": "grid", "lead": 4}
    split, split_whole = dealt | even, whole | even
    # With two tiles of query heads registers are so few that the code for a last step apart costs the loop some.
    tightest = (split_whole | eight | {"reduction": "cluster2"}, whole | eight) if query == "joined" else ()
    wanted = (
        whole | sixteen,
        whole | sixteen | {"reduction": "all_threads"},
        split_whole | sixteen | {"reduction": "all_threads"},
        split_whole | sixteen | {"reduction": "cluster2"},
        whole | eight | {"reduction": "all_threads"},
        split_whole | eight | {"reduction": "all_threads"},
        split_whole | eight | {"reduction": "cluster2"},
        *(tight | {"tail": "masked"} for tight in tightest),
        dealt | {"warps": 8, "lookup": spread},
        dealt | {"warps": 8, "lookup": spread, "reduction": "all_threads"},
        dealt | halves,
        dealt | halves | {"reduction": "all_threads"},
        split | halves | {"reduction": "cluster8"},
        split | halves | {"reduction": "cluster2"},
        split | halves | {"reduction": "all_threads"},
        alone | lean | {"warps": 8, "lookup": spread, "reduction": "cluster8"},
        alone | lean | {"warps": 16, "lookup": spread, "reduction": "cluster2"},
        sliced | lean | {"lookup": spread, "reduction": "cluster8"},
        thin | lean | {"lookup": spread, "reduction": "cluster8"},
        alone | lean | {"warps": 8, "lookup": spread, "reduction": "cluster2"},
        sliced | lean | {"warps": 16, "lookup": spread, "reduction": "cluster2"},
        alone | lean | {"warps": 8, "lookup": spread, "reduction": "cluster4"},
        alone | lean | {"warps": 8, "lookup": spread},
        alone | lean | {"warps": 8, "stages": 4, "lookup": spread, "reduction": "cluster2"},
        sliced | lean | {"stages": 4, "lookup": spread, "reduction": "cluster2"},
        whole | sixteen | {"schedule": "stream", "lead": 4},
        whole | eight,
        split_whole | eight | {"lookup": spread, "reduction": "cluster2"},
        whole | sixteen | {"reduction": "kernel"},
        whole | eight | {"reduction": "tree"},
        whole | eight | {"lookup": spread, "reduction": "tree"},
        whole | sixteen | _bulk(problem, kv_heads, 16),
        dealt | {"warps": 8, "tokens": 32, "lookup": spread},
        alone | lean | {"warps": 16, "lookup": spread},
        sliced | lean | {"stages": 4, "lookup": spread, "reduction": "cluster4"},
        sliced | lean | {"lookup": spread, "reduction": "tree"},
        sliced | lean | {"lookup": spread, "reduction": "all_threads"},
        alone | lean | {"warps": 8, "lookup": spread, "reduction": "all_threads"},
        sliced | {"lookup": spread},
        sliced | {"lookup": spread, "reduction": "tree"},
        alone | {"warps": 8, "lookup": spread},
        alone | {"warps": 8, "stages": 4, "lookup": spread, "reduction": "cluster2"},
        dealt | {"warps": 16, "lookup": woven},
        whole | eight | {"schedule": "stream", "lead": 4},
        alone | lean | {"warps": 8, "stages": 4, "lookup": spread, "reduction": "tree"},
        alone | lean | {"warps": 4, "lookup": replicated, "stages": 4, "min_ctas": 2, "schedule": dealt["schedule"]},
        alone | lean | {"warps": 16, "dim_warps": 4 * dims, "reduction": "tree"},
        bulk | {"warps": 16, "tokens": 32, "lookup": replicated},
        bulk | {"warps": 8, "tokens": 32, "lookup": spread, "reduction": "tree"},
        bulk | {"warps": 16, "lookup": spread},
        sliced | {"lookup": "prmt"},
        sliced | {"tokens": 32, "lookup": spread, "reduction": "tree"},
        alone | {"warps": 16, "lookup": spread},
        bulk | {"warps": 8, "dim_warps": 2 * dims, "lookup": spread},
        bulk | {"warps": 8, "stages": 3, "lookup": replicated},
        bulk | {"warps": 8, "lookup": replicated, "min_ctas": 2},
        alone | {"warps": 4, "stages": 4},
        *(few | lean | {"head_warps": heads} for few in small for heads in (4, 2, 1) if kv_heads % heads == 0),
    )
    tried = [_config(problem, **w) for w in wanted if all(v in allowed[n] for n, v in w.items())]
    known = [c.with_(reduction="all") if c["reduction"] == "all_threads" and _cannot_divide(c) else c for c in tried]
    by_banks = [c["tail"] == "apart" or c["beginning"] == "prompt" for c in known]
    return tuple(dict.fromkeys(_best_words(c, kv_heads) if b else c for c, b in zip(known, by_banks, strict=True)))


def _renewed(config: Config) -> tuple[Config, ...]:
    """Reads its rows in whole words and allots where it dealt, as far as it may. With what decides which registers the
    loop has it comes in several ways: where CTAs waited for each other it adds up by threads too, and squares of keys
    are summed in halves of two k-steps, of four, and of one."""
    whole = {"strided": "whole", "adjacent": "whole_adjacent"}.get(str(config["words"]))
    if whole and has_rows_alike(config):
        config = config.with_(words=whole)
    if config["schedule"] == "deal" and DecodePlan(config).prompt:
        config = config.with_(schedule="allot")
    ways = [config]
    if config["reduction"] in ("all", "all_warps") and not _cannot_divide(config.with_(reduction="all_threads")):
        ways.insert(0, config.with_(reduction="all_threads"))
    if DecodePlan(config).chains_squares:
        return tuple(ways)
    sums = [n for n in (2, 4, 1) if n == 1 or not _cannot_chain(config.with_(squares=n))]
    return tuple(way.with_(squares=n) for n in sums for way in ways)


DECODE = Space("decode", AXES, CONSTRAINTS, default_config, seed_config, lead_configs, _renewed)
