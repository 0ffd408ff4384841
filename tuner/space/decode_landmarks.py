"""Configurations of ``wph_decode`` that are known beforehand: what runs without a table, what a search tries first."""

from __future__ import annotations

from tuner.space.banks import token_pitch, word_reads
from tuner.space.core import Config, Problem, Value
from tuner.space.decode_axes import AXES, cannot_chain, cannot_divide, has_rows_alike, has_unaligned_fields
from tuner.space.plan import DecodePlan
from tuner.space.registers import register_estimate
from tuner.targets import TARGETS

_VALUES = {axis.name: axis.values for axis in AXES}


def _config(problem: Problem, **chosen: Value) -> Config:
    """The plainest values, but precise sums, with those ``chosen``."""
    plain = Config(problem, tuple((name, values[0]) for name, values in _VALUES.items()))
    return plain.with_(accumulate="precise", **chosen)


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
    counts = [int(heads) for heads in _VALUES["head_warps"] if int(heads) <= most]
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
    if problem.layout.format.norm_correction:
        lean["squares"] = 2
    if not problem.layout.outliers:
        lean["rescale"] = "lazy"
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
        whole | sixteen | {"reduction": "all_segments"},
        split_whole | sixteen | {"reduction": "all_segments"},
        split_whole | sixteen | {"reduction": "cluster2"},
        whole | eight | {"reduction": "all_segments"},
        split_whole | eight | {"reduction": "all_segments"},
        split_whole | eight | {"reduction": "cluster2"},
        *(tight | {"tail": "masked"} for tight in tightest),
        dealt | {"warps": 8, "lookup": spread},
        dealt | {"warps": 8, "lookup": spread, "reduction": "all_segments"},
        dealt | halves,
        dealt | halves | {"reduction": "all_segments"},
        split | halves | {"reduction": "cluster8"},
        split | halves | {"reduction": "cluster2"},
        split | halves | {"reduction": "all_segments"},
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
        sliced | lean | {"lookup": spread, "reduction": "all_segments"},
        alone | lean | {"warps": 8, "lookup": spread, "reduction": "all_segments"},
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
    tried = [_config(problem, **w) for w in wanted if all(v in _VALUES[n] for n, v in w.items())]
    known = [c.with_(reduction="all") if c["reduction"] == "all_segments" and cannot_divide(c) else c for c in tried]
    by_banks = [c["tail"] == "apart" or c["beginning"] == "prompt" for c in known]
    return tuple(dict.fromkeys(_best_words(c, kv_heads) if b else c for c, b in zip(known, by_banks, strict=True)))


def renewed(config: Config) -> tuple[Config, ...]:
    """Reads its rows in whole words and allots where it dealt, as far as it may. What changes the loop's registers is
    tried both ways: where CTAs waited for each other they share out segments too, sums that always shrank
    do so lazily too, and squares of keys are added up over two k-steps and over one."""
    whole = {"strided": "whole", "adjacent": "whole_adjacent"}.get(str(config["words"]))
    if whole and has_rows_alike(config):
        config = config.with_(words=whole)
    if config["schedule"] == "deal" and DecodePlan(config).prompt:
        config = config.with_(schedule="allot")
    ways = [config]
    segments = config.with_(reduction="all_segments")
    if DecodePlan(config).waits and config != segments and not cannot_divide(segments):
        ways.insert(0, segments)
    if config["rescale"] == "always" and DecodePlan(config).scaled_weights:
        ways = [*(way.with_(rescale="lazy") for way in ways), *ways]
    if config["squares"] == 1 and not cannot_chain(config):
        ways = [*(way.with_(squares=2) for way in ways), *ways]
    return tuple(ways)
