"""Targets, and whether results meet them: by how much, and at which point the worst is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.grid.kernels import GRAPH
from benchmarks.grid.points import FORMAT, LARGE_CACHE
from tuner.bench import OURS
from tuner.report.rows import geometric_mean

Result = Mapping[str, Any]
LARGE_BF16 = 256_000_000
"""Bytes of uncompressed cache from which the means against FlashAttention-3 count."""
_ONE = ", one kernel per batch"
_LATENCY_US = {128: 14.0, 256: 12.0}
_SHARES = {"turboquant_k8v4": 1.0, "turboquant_k3v4_nc": 0.85, "turboquant_3bit_nc": 0.85}
"""Of the share of its own limit that FORMAT reaches."""


@dataclass(frozen=True)
class Verdict:
    """``reached`` in the unit of ``least``, as geometric mean or at the worst point; ``met`` None: nothing known.

    Of ``asked`` points ``points`` are known, of which ``below`` miss ``least``; at ``failed`` ones our kernel has no
    time, which is a miss too. ``worst_at`` names the point that is furthest from the target.
    """

    name: str
    statistic: str
    least: float
    reached: float | None
    met: bool | None
    asked: int
    points: int
    below: int
    failed: int
    worst: float | None
    worst_at: str


def shipped_us(result: Result) -> float | None:
    """vLLM's own Triton kernel, else ours of the same structure and constants."""
    return _first(result, "vllm_triton", "triton")


def tuned_us(result: Result) -> float | None:
    """The fastest of the tuned constants."""
    return min((us for name, us in result["times_us"].items() if "[" in name), default=None)


def speedup(result: Result, other_us: float | None) -> float | None:
    """How many times faster ours is."""
    ours = result["times_us"].get(OURS)
    return None if ours is None or other_us is None else other_us / ours


def share(result: Result) -> float | None:
    """Of the memory limit."""
    return speedup(result, result["limit_us"])


def where(result: Result) -> str:
    context = f"{result['context']}{' ragged' if result['ragged'] else ''}"
    shape = f"D={result['head_dim']} {result['q_heads']}/{result['kv_heads']}"
    return f"{shape}, {result['batch']} x {context}"


def verdicts(results: Sequence[Result]) -> list[Verdict]:
    """Every target, in the order of importance; those without a single point are there too, as not measured.

    Where a batch's one kernel for all contexts is what counts, as in a CUDA graph, a target has a second line.
    """
    decode = [r for r in results if r["section"] in ("grid", "ragged")]
    graphs = [_as_graph(r) for r in decode]
    large = [r for r in decode if r["bf16_bytes"] >= LARGE_BF16]
    full = [r for r in decode if r["compressed_bytes"] >= LARGE_CACHE]
    hard = [r for r in full if r["head_dim"] == 512 or r["q_heads"] == r["kv_heads"]]
    easy = [r for r in full if r not in hard]
    shipped, tuned = _against(shipped_us), _against(tuned_us)
    bf16, fp8 = _against(lambda r: _first(r, "fa3_bf16")), _against(lambda r: _first(r, "fa3_fp8"))
    found = [
        _mean("against vLLM's Triton as shipped", 12.0, decode, shipped),
        _worst("against vLLM's Triton as shipped", 4.0, decode, shipped),
        _mean("against the same Triton tuned", 5.0, decode, tuned),
        _mean("against FA3 bf16, cache >= 256 MB in bf16", 2.0, large, bf16),
        _worst("against FA3 bf16", 1.0, decode, bf16),
        _mean("against FA3 fp8, cache >= 256 MB in bf16", 1.4, large, fp8),
        _worst("share of the limit, cache >= 128 MB", 0.65, easy, share),
        _worst("share of the limit, cache >= 128 MB, D=512 or group 1", 0.55, hard, share),
    ]
    found += [
        _worst(f"against vLLM's Triton as shipped{_ONE}", 4.0, graphs, shipped),
        _worst(f"against FA3 bf16{_ONE}", 1.0, graphs, bf16),
        _worst(f"share of the limit, cache >= 128 MB{_ONE}", 0.65, list(map(_as_graph, easy)), share),
        _worst(f"share of the limit, cache >= 128 MB, D=512 or group 1{_ONE}", 0.55, list(map(_as_graph, hard)), share),
    ]
    for head_dim, us in _LATENCY_US.items():
        one = [r for r in results if r["section"] == "latency" and r["head_dim"] == head_dim]
        found.append(_worst(f"batch 1 x 8k within {us:g} us, D={head_dim}", 1.0, one, _within(us)))
    ragged = [r for r in results if r["section"] == "ragged"]
    twins = {(_shape(r), r["batch"]): r for r in results if r["section"] == "twin"}
    throughput = _throughput(twins)
    found.append(_worst("ragged against uniform throughput", 0.85, ragged, throughput))
    reference = {_place(r): share(r) for r in results if r["section"] == "format" and r["cache_format"] == FORMAT}
    for name, least in _SHARES.items():
        of_format = [r for r in results if r["section"] == "format" and r["cache_format"] == name]
        found.append(_mean(f"{name}: share of its limit against {FORMAT}'s", least, of_format, _relative(reference)))
    rows = [r for r in results if r["section"] == "dequant"]
    found.append(_worst("dequantisation: share of the limit, >= 64k rows", 0.70, rows, share))
    return found


def graph_cost(results: Iterable[Result]) -> float | None:
    """Geometric mean of the time of a batch's one kernel for all contexts over that of the bucket's own choice."""
    timed = [r["times_us"] for r in results if r["section"] in ("grid", "ragged") and OURS in r["times_us"]]
    return geometric_mean(t.get(GRAPH, t[OURS]) / t[OURS] for t in timed)


Value = Callable[[Result], "float | None"]


def _mean(name: str, least: float, results: Sequence[Result], value: Value) -> Verdict:
    return _verdict(name, "mean", least, results, value)


def _worst(name: str, least: float, results: Sequence[Result], value: Value) -> Verdict:
    return _verdict(name, "worst", least, results, value)


def at_least(name: str, least: float, known: Sequence[tuple[float, str]], failed: Sequence[str] = ()) -> Verdict:
    """Of values with their places; ``failed``: places without one, through our fault."""
    return _judge(name, "worst", least, len(known) + len(failed), known, failed)


def _verdict(name: str, statistic: str, least: float, results: Sequence[Result], value: Value) -> Verdict:
    known = [(v, where(r)) for r in results if (v := value(r)) is not None]
    failed = [where(r) for r in results if OURS not in r["times_us"]]
    return _judge(name, statistic, least, len(results), known, failed)


def _judge(
    name: str, statistic: str, least: float, asked: int, known: Sequence[tuple[float, str]], failed: Sequence[str]
) -> Verdict:
    if not known:
        met = False if failed else None
        return Verdict(name, statistic, least, None, met, asked, 0, 0, len(failed), None, next(iter(failed), ""))
    worst, worst_at = min(known)
    reached = geometric_mean(v for v, _ in known) if statistic == "mean" else worst
    assert reached is not None
    below = sum(v < least for v, _ in known)
    met = reached >= least and not failed
    return Verdict(name, statistic, least, reached, met, asked, len(known), below, len(failed), worst, worst_at)


def _as_graph(result: Result) -> Result:
    """``result`` with the time of the batch's one kernel as ours."""
    times = dict(result["times_us"])
    if GRAPH in times:
        times[OURS] = times[GRAPH]
    return {**result, "times_us": times}


def _against(other: Value) -> Value:
    return lambda r: speedup(r, other(r))


def _within(us: float) -> Value:
    return lambda r: speedup(r, us)


def _relative(reference: Mapping[Any, float | None]) -> Value:
    def value(result: Result) -> float | None:
        own, other = share(result), reference.get(_place(result))
        return own / other if own and other else None

    return value


def _throughput(twins: Mapping[Any, Result]) -> Value:
    """Tokens per time over those of the uniform batch of as many requests."""

    def value(result: Result) -> float | None:
        twin = twins.get((_shape(result), result["batch"]))
        ours, uniform = (r["times_us"].get(OURS) if r else None for r in (result, twin))
        if ours is None or uniform is None or twin is None:
            return None
        return float(result["tokens"] / ours / (twin["tokens"] / uniform))

    return value


def _first(result: Result, *names: str) -> float | None:
    return next((result["times_us"][n] for n in names if n in result["times_us"]), None)


def _shape(result: Result) -> tuple[int, int, int]:
    return result["head_dim"], result["q_heads"], result["kv_heads"]


def _place(result: Result) -> tuple[Any, ...]:
    return (*_shape(result), result["batch"], result["context"], result["ragged"])
