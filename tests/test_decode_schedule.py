"""Who works on what where CTAs divide requests by the lengths they find: the kernels' own reckoning, run by itself,
against the same in Python's whole numbers."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from decode_emulated import check, small_case
from emulated import emulate_decode, needs_gxx

from tuner.abi import DecodeParams
from tuner.emulate import Launch, emulate
from tuner.render import Source, render
from tuner.space import Config, Problem
from tuner.space.decode_landmarks import default_config
from tuner.space.plan import DecodePlan

Part = tuple[int, ...]
"""CTA, request, its first group and the one behind its last, CTAs that share the request, this one's number of them,
and how many of them share out what all have."""

EXACT, MOST_SPLITS = 1 << 20, 1 << 14
"""What ``allot`` cuts into pieces has fewer units, and fewer CTAs."""
MOST_STEPS = 1 << 16
"""Steps of a request and of a piece together up to which ``deal`` takes pieces."""

PROBE = """
extern "C" __global__ void probe(const __grid_constant__ DecodeParams p) {
    const int lane = threadIdx.x % 32;
    LENGTHS
    const Queue queue = make_queue(p, ARGUMENT lane);
    int *out = p.counters, parts = 0;
    for (int cta = 0; cta * queue.quota < queue.total; ++cta) {
        int start, request = find_request(p, queue, ARGUMENT cta * queue.quota, start, lane);
        for (; start < min((cta + 1) * queue.quota, queue.total); start += queue.units(groups_of(p, request++))) {
            const Span span = span_of(p, queue, request, start, cta);
            if (span.first >= span.last) continue;
            const Contributors from = contributors(queue, start, groups_of(p, request));
            const int slot = 2 * cta + (start + queue.lead < cta * queue.quota ? 0 : 1);
            const int part[] = {cta, request, span.first, span.last, from.count, from.index(slot), WAITING};
            ++parts;
            for (int i = lane; i < 7; i += 32) out[7 * parts + i] = part[i];
        }
    }
    if (lane == 0) out[0] = parts;
}
"""

pytestmark = needs_gxx


def dealing(schedule: str, **values: object) -> Config:
    config = default_config(Problem("decode", 64, 1, "turboquant_4bit_nc"))
    return config.with_(**{"schedule": schedule, "beginning": "prompt", "reduction": "all"} | values)


def probe(config: Config) -> Source:
    plan = DecodePlan(config)
    allots = plan.allots
    kernel = PROBE.replace("LENGTHS", "Lengths lengths; lengths.load(p, lane);" if allots else "")
    kernel = kernel.replace("WAITING", "from.waiting" if plan.by_segment else "from.count")
    source = render(config)
    return replace(source, text=source.text + kernel.replace("ARGUMENT", "lengths," if allots else ""))


def found(source: Source, lengths: list[int], splits: int) -> list[Part]:
    """What the kernel makes of it."""
    out = np.zeros(7 * (1 + splits + len(lengths)), np.int32)
    params = DecodeParams(batch=len(lengths), splits=splits)
    buffers = {"seq_lens": np.array(lengths, np.int32), "counters": out}
    emulate(source, Launch("probe", (1, 1, 1), 32, 0), params, buffers)
    return [tuple(int(x) for x in part) for part in out.reshape(-1, 7)[1 : 1 + out[0]]]


def wanted(config: Config, lengths: list[int], splits: int) -> list[Part]:
    """The same: the shortest equal pieces that no more CTAs than there are take, unless those are longer than equal
    quotas of a row in which every request has its beginning before its groups, or numbers are too large for pieces.
    With segments each request's pieces are as long as each other, and who goes on to another's tokens has no share."""
    plan = DecodePlan(config)
    least, lead = plan.token_warps * plan.tiles, plan.beginning_steps * plan.token_warps * plan.tiles
    groups = [-(-max(n, 0) // 16) for n in lengths]
    total = sum(groups) + lead * sum(g > 0 for g in groups)
    quota = max(-(-total // splits), least)
    shortest = max(-(-sum(groups) // (splits * least)), 1) * least
    small = not plan.allots or (total < EXACT and splits < MOST_SPLITS)
    for length in range(shortest, shortest + lead + 1, least) if small and len(lengths) <= splits else ():
        if not plan.allots and -(-max(groups) // least) + length // least > MOST_STEPS:
            continue
        if sum(-(-g // length) for g in groups) <= splits and (length == shortest or length <= quota):
            pieces = [(r, i, g) for r, g in enumerate(groups) for i in range(-(-g // length))]
            ends = []
            for _, i, g in pieces:
                n = -(-g // length)
                steps = -(-g // least)
                own = -(-steps // n) * least if plan.evens else length
                assert (n - 1) * own < g <= n * own  # as many as before, none of them empty
                ends.append((i * own, min((i + 1) * own, g), n, i, n))
            return [(cta, r, *end) for cta, ((r, _, _), end) in enumerate(zip(pieces, ends, strict=True))]
    parts, start = [], 0
    for request, number in enumerate(groups):
        if not number:
            continue
        begin, end = start + lead, start + lead + number
        ctas = range(begin // quota, (end - 1) // quota + 1)
        for i, cta in enumerate(ctas):
            first, last = max(cta * quota - begin, 0), min((cta + 1) * quota - begin, number)
            parts.append((cta, request, first, last, len(ctas), i, len(ctas)))
        start = end
    if plan.by_segment:  # who has tokens of the next request, too, waits for nobody
        busy = {before[1] for before, after in itertools.pairwise(parts) if before[0] == after[0]}
        parts = [(*part[:-1], part[-1] - (part[1] in busy)) for part in parts]
    return parts


def batches() -> list[tuple[list[int], int]]:
    """Lengths and CTAs: few and many requests, none, equal and unequal ones, and sums beyond 2^20 groups."""
    rng = random.Random(1)
    some: list[tuple[list[int], int]] = [([0] * 5, 3), ([1], 1), ([-1, 7], 132), ([131072], 132), ([1024] * 128, 132)]
    some += [([2**24] * 3, 132), ([2**24 - 16], 7), ([2**24 - 4096, 100, 0], 131), ([2**23] * 2, 1), ([40] * 30, 16384)]
    for _ in range(60):
        batch, most = rng.choice((1, 3, 8, 31, 33, 64, 129, 200)), rng.choice((200, 4000, 70000, 10**6))
        lengths = [rng.choice((0, rng.randrange(most), int(most ** rng.random()))) for _ in range(batch)]
        some.append((lengths, rng.choice((1, 7, 66, 131, 132, 264, 500))))
    return some


@pytest.mark.parametrize(
    "config",
    [
        *(dealing("allot"), dealing("allot", warps=2, tokens=32, lead=12), dealing("deal")),
        dealing("allot", reduction="all_segments"),
        dealing("allot", reduction="all_segments", warps=2, tokens=32, lead=12),
        dealing("deal", reduction="all_segments"),
    ],
)
def test_every_cta_has_its_part(config: Config) -> None:
    source = probe(config)
    for lengths, splits in batches():
        assert found(source, lengths, splits) == wanted(config, lengths, splits), (lengths, splits)


@pytest.mark.parametrize("schedule", ["deal", "allot"])
def test_pieces_of_many_requests_are_counted_exactly(schedule: str) -> None:
    """149 requests of 3 groups and one of 25: 156 CTAs have a piece each, of four groups at most. With one piece more
    quotas would have cut the last request elsewhere, which its sums would show."""
    config = dealing(schedule, warps=1).with_(reduction="last")
    case = small_case(config, (40,) * 149 + (400,))
    seven = emulate_decode(config.with_(schedule="grid"), case, 7)[-1]
    assert torch.equal(emulate_decode(config, case, 156)[-1], seven)
    assert not torch.equal(emulate_decode(config, case, 155)[-1], seven)
    for splits in (150, 155, 156, 450):
        check(config, case, splits, concurrent_ctas=3)
