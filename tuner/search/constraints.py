"""What a search refuses beyond the space's own constraints: configurations that the shape's KV heads cannot put to use,
and those that the static model cannot predict.
"""

from __future__ import annotations

from dataclasses import replace

from tuner.predict import CLUSTERS_SEEN
from tuner.space import get_space
from tuner.space.core import Config, Constraint, Space
from tuner.space.plan import DecodePlan
from tuner.suits import CacheOrder, refusal
from tuner.targets import Target


def space_for(op: str, kv_heads: int, evidence: str = "measured") -> Space:
    """The space of ``op`` with the constraints of a shape with so many KV heads added; what ``evidence`` is
    "predicted" for, with those of the static model.
    """
    space = get_space(op)
    if op != "decode":
        return space

    def idle_warps(config: Config, target: Target) -> bool:
        return bool(kv_heads % config["head_warps"])

    def unreadable(config: Config, target: Target) -> bool:
        order = CacheOrder.standard(config, kv_heads=kv_heads)
        return DecodePlan(config).bulk and refusal(config, order) is not None

    def too_many_copies(config: Config, target: Target) -> bool:
        return config["load"] == "bulk_rows" and config["head_warps"] == kv_heads

    def unseen_clusters(config: Config, target: Target) -> bool:
        return DecodePlan(config).cluster > 1 and target.arch not in CLUSTERS_SEEN

    added = [
        Constraint("idle_head_warps", f"the {kv_heads} KV heads leave some of a CTA's head warps idle", idle_warps),
        Constraint("unreadable_cache", f"a cache of {kv_heads} KV heads does not suit bulk copies", unreadable),
        Constraint("too_many_copies", "all heads of a token: one bulk copy of 16 tokens does it", too_many_copies),
    ]
    if evidence == "predicted":
        why = "how many clusters of CTAs the GPU holds was not seen yet"
        added.append(Constraint("unseen_clusters", why, unseen_clusters))
    return replace(space, constraints=(*space.constraints, *added))
