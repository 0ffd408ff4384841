"""Time of a kernel from its machine code, without running it: what a launch does, for the model of a GPU."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

from tuner.build import Built
from tuner.errors import TunerError, UsageError
from tuner.formats import SlotLayout
from tuner.geometry import decode_geometry
from tuner.model import LATENCY_US, Launch, Prediction, model
from tuner.pipes import Cycles, cost
from tuner.sass import Loop, SassFacts, count
from tuner.space import Config
from tuner.space.banks import token_pitch, word_reads
from tuner.space.plan import DecodePlan
from tuner.space.traits import GROUP_TOKENS
from tuner.targets import Target
from tuner.workload import Bucket, Shape
from tuner.workload.core import cache_bytes

__all__ = ["Prediction", "hot_loop", "predict", "predict_triton"]

_L2_FACTOR = 2.0
"""Bandwidth of the L2 cache, where partial results stay, over DRAM's."""
_CTA_BYTES_PER_CYCLE = 32.0
"""What one CTA alone reads per clock: the last one to arrive merges a head's splits by itself."""
_TRIP_CYCLES = 1000
"""From asking the L2 cache for several contributions to having added them up, under load (docs/kernel-notes.md)."""
_CLUSTER_CYCLES = 2000
"""What a cluster takes to begin together, to meet twice, and to begin reading each other's shared memory: the median of
ten pairs of equal splits, with clusters and without, on an H200, in which it was 300 to 4700 (docs/kernel-notes.md)."""
_PUSH_CYCLES = 1000
"""The same of clusters that store, which meet once and read nothing."""
_PROMPT_SHARE = 0.65
"""What counts of the code around the loop with ``beginning=prompt``: more of it than of others is for other cases, and
some runs while tokens travel. Both are fitted to the times of 307 winners on an H200 alone on its host, most of which
asked as early but began less promptly (docs/kernel-notes.md)."""
CLUSTERS_SEEN = ("sm_90",)
"""Architectures of which it was seen how many clusters they hold at once (``Target.held_ctas``)."""
_CONFLICTS = {4: 3.4, 3: 1.9}
"""Turns that 32 lanes take to look up pairs of indices in a table of 256 or 64 words, on average over random pairs."""
_SECTOR = 32
_MOST = 0.45
"""What the loop over tokens has at least of a kernel's arithmetic: a last step apart from it has as much again."""


def hot_loop(sass: SassFacts) -> Loop:
    """The loop over tokens: the smallest one with most of the arithmetic. Raises TunerError where there is no loop."""
    names = ("HMMA",) if count(sass.opcodes, "HMMA") else ("FFMA", "FMUL", "FADD", "HFMA2")
    most = max((count(loop.opcodes, *names) for loop in sass.loops), default=0)
    if not most:
        raise TunerError(f"kernel {sass.kernel} has no loop with arithmetic: the static model cannot tell its time")
    return min((x for x in sass.loops if count(x.opcodes, *names) >= _MOST * most), key=lambda x: x.instructions)


def _matrix_instructions(config: Config) -> int:
    """Of one step: the query's halves (together where they are paired) and the values, outliers included, one for every
    one or two k-steps' squared lengths, one for the sum of weights."""
    plan = DecodePlan(config)
    per_group = (2 if plan.paired else 3) * plan.head_tiles * (plan.key_steps + plan.outlier_steps)
    if plan.sums_squares:
        per_group += plan.key_steps // (plan.square_steps if plan.precise else 2)
    if plan.centered:
        per_group += plan.head_tiles
    return plan.tiles * per_group


def _outside(sass: SassFacts, loop: Loop, target: Target) -> Cycles:
    """Everything around the hot loop, each instruction once: tables, query, epilogue."""
    rest = {o: n - loop.opcodes.get(o, 0) for o, n in sass.opcodes.items()}
    return cost(rest, sass.stall_cycles - loop.stall_cycles, target)


def _quotas(config: Config, bucket: Bucket, splits: int) -> tuple[list[tuple[int, int]], list[int]]:
    """(CTAs, groups of each) per request for one set of heads, and how many CTAs share each request; without the limits
    from which on kernels cut even what could lie in pieces into quotas."""
    plan = DecodePlan(config)
    least = plan.token_warps * plan.tiles
    groups = [-(-n // GROUP_TOKENS) for n in bucket.lengths()]
    if config["schedule"] == "grid":
        return _cut(groups, [_piece(g, splits, least) for g in groups])
    beginning = plan.beginning_steps * least
    lead = beginning if plan.prompt and plan.shares else 0  # what beginnings take lies in the row, too
    quota = max(-(-(sum(groups) + lead * len(groups)) // splits), least)
    pieces = splits // bucket.batch
    if plan.shares:
        shortest = max(-(-sum(groups) // (splits * least)), 1)
        lengths = ((shortest + k) * least for k in range(plan.beginning_steps + 1))
        fits = (n for n in lengths if sum(-(-g // n) for g in groups) <= splits)
        length = next(fits, None)
        if length is not None and (not lead or length <= max(quota, shortest * least)):
            own = [_piece(g, -(-g // length), least) if plan.evens and g else length for g in groups]
            return _cut(groups, own)
    elif pieces and _piece(max(groups), pieces, least) <= quota + beginning:
        return _cut(groups, [_piece(g, pieces, least) for g in groups])
    if lead:
        return _row_with_beginnings(groups, lead, quota)
    ends = list(itertools.accumulate(groups, initial=0))
    again = Counter(b // quota for b in set(ends[1:-1]) if b % quota)  # how often a CTA begins anew
    often = Counter(again.values()) + Counter({0: -(-ends[-1] // quota) - len(again)})
    shares = [(number, quota + times * beginning) for times, number in often.items()]
    return shares, [-(-b // quota) - a // quota for a, b in itertools.pairwise(ends)]


def _row_with_beginnings(groups: Sequence[int], lead: int, quota: int) -> tuple[list[tuple[int, int]], list[int]]:
    """As ``_quotas``, where each request has ``lead`` before its groups in the row that is cut into quotas.

    A CTA's first beginning is none of its groups, a later one takes as long as ``lead`` of them.
    """
    work, sharers, at = Counter[int](), [], 0
    for number in groups:
        begin, end = at + lead, at + lead + number
        first, last = begin // quota, (end - 1) // quota
        for cta in range(first, last + 1):
            if cta in work:
                work[cta] += lead
            work[cta] += min(end, (cta + 1) * quota) - max(begin, cta * quota)
        sharers.append(last - first + 1)
        at = end
    return [(ctas, most) for most, ctas in Counter(work.values()).items()], sharers


def _cut(groups: Sequence[int], lengths: Sequence[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """As ``_quotas``, where each request is cut into pieces of its length."""
    shared = [(-(-g // n), min(n, g)) for g, n in zip(groups, lengths, strict=True) if g]
    return shared, [n for n, _ in shared]


def _piece(groups: int, pieces: int, least: int) -> int:
    """Groups of each piece of a request that is cut into ``pieces``, in whole steps of a CTA."""
    return -(-max(-(-groups // pieces), 1) // least) * least


def _reduction_us(config: Config, sharers: list[int], shape: Shape, target: Target) -> float:
    """Writing and merging partial results of requests that several CTAs share."""
    plan, clustered_us = DecodePlan(config), 0.0
    rows = config["head_warps"] * shape.gqa  # that the CTA which adds up has
    row_bytes = 4 * (2 + plan.partial_row_floats)
    if plan.cluster > 1:
        rows = -(-rows // plan.cluster)
        read = min(max(sharers, default=0), plan.cluster) * rows * row_bytes / _CTA_BYTES_PER_CYCLE
        clustered_us = ((_PUSH_CYCLES if plan.pushes else _CLUSTER_CYCLES) + read) / target.clock_mhz
        sharers = [-(-n // plan.cluster) for n in sharers]
    slots = sum(n for n in sharers if n > 1)
    if not slots:
        return clustered_us
    bytes_us = 2 * slots * shape.q_heads * row_bytes / (_L2_FACTOR * target.bandwidth_gbps * 1e3)
    latency_us = LATENCY_US[target.arch]
    if config["reduction"] == "kernel":
        return bytes_us + latency_us  # the second launch is counted as a kernel
    most, branch = max(sharers), plan.branch
    levels = 2 if config["reduction"] == "tree" and most > branch else 1
    in_turn = most if levels == 1 else branch + -(-most // branch)  # contributions that one CTA after another reads
    if plan.waits:  # rows, or segments of them
        rows = -(-rows * plan.row_segments // min(most, plan.most_shares))
    last = in_turn * rows * row_bytes / plan.row_segments / _CTA_BYTES_PER_CYCLE
    if plan.cluster == 1:
        # A warp has a head, or a part of one, and some of its contributions on their way at a time.
        parts = plan.share_parts(rows, most)
        trips = -(-in_turn // (parts * plan.sums_ahead)) * -(-rows * parts // (config["warps"] // plan.row_warps))
        last = max(last, trips * _TRIP_CYCLES)
    last /= target.clock_mhz
    return clustered_us + max(bytes_us, last) + 2 * levels * latency_us


def _overfetch(config: Config, layout: SlotLayout, shape: Shape) -> float:
    """Bytes that travel over bytes that are needed, where slots are read one by one and not page by page.

    Half of the excess comes from the L2 cache: it belongs to the neighbouring heads, which other CTAs read.
    """
    heads = min(config["head_warps"], shape.kv_heads)
    if DecodePlan(config).bulk or heads == shape.kv_heads:
        return 1.0
    run = heads * layout.slot_bytes
    return 1.0 + (_SECTOR - 2) / run / 2


def predict(
    config: Config, built: Built, sass: SassFacts, target: Target, shape: Shape, bucket: Bucket, splits: int
) -> Prediction:
    """Predicted time of one decode call, its reduction included.

    Raises UsageError where cubin and target are of different architectures, a CTA does not fit on the target, or it is
    of a cluster and nobody saw how those lie there.
    """
    if built.arch != target.arch:
        raise UsageError(f"the cubin is for {built.arch}, the target is {target.arch}: build it for {target.arch}")
    plan, problem = DecodePlan(config), config.problem
    if plan.cluster > 1 and target.arch not in CLUSTERS_SEEN:
        raise UsageError(f"{target.device_name}: how many clusters of CTAs it holds is not known, so its time is not")
    loop = hot_loop(sass)
    work = _matrix_instructions(config) if config["math"] == "mma" else 0
    trips = max(1, round(work / max(1, count(loop.opcodes, "HMMA")))) if work else 1
    step = cost(loop.opcodes, loop.stall_cycles, target).times(trips)
    if problem.layout.format.key_codebook and config["lookup"] == "table":
        pairs = plan.tiles * GROUP_TOKENS * plan.slice_dims / 2 / 32
        extra = pairs * (_CONFLICTS[problem.layout.key.bits] - 1)
        step = step.plus(Cycles(0.0, 0.0, extra, 0.0))
    if config["load"] != "direct":
        reads, turns = word_reads(config, token_pitch(config, shape.kv_heads))
        step = step.plus(Cycles(0.0, 0.0, plan.tiles * float(turns - reads), 0.0))

    geometry = decode_geometry(config, batch=bucket.batch, kv_heads=shape.kv_heads, splits=splits)
    head_groups = geometry.grid[1]
    quotas, sharers = _quotas(config, bucket, splits)
    step_groups = plan.token_warps * plan.tiles
    step_bytes = plan.tiles * plan.token_warps * GROUP_TOKENS * problem.layout.token_bytes * config["head_warps"]
    stages = 1 if config["load"] == "direct" else config["stages"]
    merges = config["reduction"] == "kernel"
    launch = Launch(
        warps=config["warps"],
        registers=built.registers,
        shared_bytes=built.shared_bytes + geometry.shared_bytes,
        ctas=tuple((n * head_groups, -(-groups // step_groups)) for n, groups in quotas),
        step=step,
        once=_outside(sass, loop, target).times(_PROMPT_SHARE if plan.prompt else 1.0),
        tiles_in_flight=stages,
        bytes_in_flight=stages * step_bytes,
        memory_bytes=cache_bytes(shape, problem.layout, bucket) * _overfetch(config, problem.layout, shape),
        reduction_us=_reduction_us(config, sharers, shape, target),
        kernels=2 if merges else 1,
        cluster=plan.cluster,
    )
    return model(launch, target)


def predict_triton(
    sass: SassFacts,
    target: Target,
    shape: Shape,
    layout: SlotLayout,
    bucket: Bucket,
    *,
    block_kv: int,
    splits: int,
    warps: int,
    heads_per_cta: int = 1,
    shared_bytes: int = 0,
) -> Prediction:
    """Predicted time of a Triton split-KV decode call: rotation of the query, the kernel that ``sass`` is of, merge.

    One CTA of ``warps`` warps serves ``heads_per_cta`` query heads of one split of one request, ``block_kv`` tokens
    per iteration of its loop. ``shared_bytes`` is Triton's dynamic shared memory. Raises UsageError where cubin and
    target are of different architectures.
    """
    if sass.arch != target.arch:
        raise UsageError(f"the cubin is for {sass.arch}, the target is {target.arch}: compile it for {target.arch}")
    loop = hot_loop(sass)
    heads = -(-shape.q_heads // heads_per_cta)
    ctas = []
    for tokens in bucket.lengths():
        share = max(1, -(-tokens // splits))
        ctas.append((-(-tokens // share) * heads, -(-share // block_kv)))
    partials = 2 * sum(n for n, _ in ctas) * heads_per_cta * (layout.head_dim + 1) * 4
    launch = Launch(
        warps=warps,
        registers=sass.registers,
        shared_bytes=sass.shared_bytes + shared_bytes,
        ctas=tuple(ctas),
        step=cost(loop.opcodes, loop.stall_cycles, target),
        once=_outside(sass, loop, target),
        tiles_in_flight=1,
        bytes_in_flight=block_kv * layout.token_bytes,
        memory_bytes=cache_bytes(shape, layout, bucket),
        reduction_us=partials / (_L2_FACTOR * target.bandwidth_gbps * 1e3) + LATENCY_US[target.arch],
        kernels=4 if layout.format.rotates_query else 2,
    )
    return model(launch, target)
