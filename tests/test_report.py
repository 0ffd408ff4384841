"""Reports: what a person reads must be what the table says, on a terminal and on the page."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from rich.console import Console

from tuner.geometry import dynamic_shared_bytes
from tuner.report import terminal
from tuner.report.html import page
from tuner.report.layouts import resident_warps
from tuner.report.rows import fastest, geometric_mean, rows, summary
from tuner.report.svg import Series, line_plot
from tuner.space import Problem, default_config, get_space
from tuner.space.census import Census
from tuner.table import BatchEntry, BucketEntry, Device, Kernel, Provenance, Table, Timing, kernel_id
from tuner.targets import get_target

PROBLEM = Problem("decode", 256, 8, "turboquant_4bit_nc")


def timing(context: int, time_us: float, *, ragged: bool = False, **baselines: float | None) -> Timing:
    known = {"triton": 100.0, "triton[block_kv=16]": 50.0, "sdpa_bf16": None} | baselines
    return Timing(context, ragged, time_us, time_us, time_us, 8.0, known, "memory")


def example(evidence: str = "predicted") -> Table:
    config = default_config(PROBLEM)
    kernels = tuple(
        Kernel(kernel_id("sm_121", sha), config.params, "0" * 64, sha, "sm_121", 128, dynamic_shared_bytes(config), 0)
        for sha in ("a" * 64, "b" * 64)
    )
    first, second = (k.id for k in kernels)
    return Table(
        problem=PROBLEM,
        kv_heads=2,
        device=Device("NVIDIA GB10", "sm_121", 48),
        provenance=Provenance("2026-01-02T03:04:05Z", 7, nvcc="13.0"),
        evidence=evidence,
        kernels=kernels,
        by_batch=(BatchEntry(1, first, 4, 1.02, 1.01, (timing(1024, 10.5), timing(4096, 21.0))),),
        by_batch_and_context=(
            BucketEntry(8, second, 2, timing(65536, 25.0, ragged=True)),
            BucketEntry(8, second, 2, timing(4096, 16.0, fa3_bf16=32.0, sdpa_bf16=64.0)),
            BucketEntry(1, first, 4, timing(1024, 10.0)),
            BucketEntry(1, first, 8, timing(4096, 20.0)),
        ),
    )


def printed(renderable: object, width: int = 132) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(renderable)
    return out.getvalue()


def test_rows_are_ordered_and_take_the_fastest_baseline() -> None:
    found = rows(example())
    assert [(r.batch, r.context, r.ragged) for r in found] == [
        (1, 1024, False),
        (1, 4096, False),
        (8, 4096, False),
        (8, 65536, True),
    ]
    assert found[2].bf16_us == 32.0
    assert found[0].bf16_us is None and found[0].speedup(found[0].bf16_us) is None
    assert found[0].speedup(found[0].shipped_us) == pytest.approx(10.0)
    assert found[0].limit_share == pytest.approx(0.8)


def test_fastest_ignores_baselines_without_a_time() -> None:
    assert fastest({"a": None, "b": 3.0, "c": 2.0}, ("a", "b")) == 3.0
    assert fastest({"a": None}, ("a", "z")) is None
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert geometric_mean([]) is None


def test_summary_says_mean_worst_evidence_and_what_is_missing() -> None:
    table = example()
    shipped, tuned, _bf16, limit = summary(table)
    # 10, 5, 6.25 and 4 times: their geometric mean is 5.95
    assert "5.95 x faster" in shipped and "worst 4.00 x" in shipped and "predicted" in shipped
    assert "worst 2.00 x" in tuned
    assert "of it reached" in limit
    bare = Table(
        table.problem, 2, table.device, table.provenance, "measured", table.kernels, (),
        (BucketEntry(1, table.kernels[0].id, 1, Timing(1024, False, 10, 9, 11, 8, {}, None)),),
    )  # fmt: skip
    assert summary(bare)[2] == "against bf16 attention: no measured times"


@pytest.mark.parametrize("evidence", ["measured", "predicted"])
def test_every_row_of_the_winners_says_its_evidence(evidence: str) -> None:
    lines = printed(terminal.winners(example(evidence))).splitlines()
    data = [line for line in lines if re.search(r"\d x", line)]
    assert len(data) == 4
    assert all(evidence in line for line in data)
    assert "10.0 x" in data[0] and "80%" in data[0] and "5.00 x" in data[0]
    assert "64k ragged" in data[3]


def test_winners_fit_a_log_without_wrapping() -> None:
    assert max(map(len, printed(terminal.winners(example())).splitlines())) <= 132


def test_kernels_are_named_as_in_the_rows() -> None:
    assert list(terminal.kernel_names(example()).values()) == ["A", "B"]
    assert terminal._letters(25) == "Z" and terminal._letters(26) == "AA" and terminal._letters(701) == "ZZ"
    assert "warps=4" in printed(terminal.kernels(example()))


@pytest.mark.parametrize(("value", "text"), [(None, "-"), (9.806, "9.81"), (14.44, "14.4"), (1517.6, "1518")])
def test_times_have_three_digits(value: float | None, text: str) -> None:
    assert terminal.us(value) == text


def test_occupancy_follows_the_tightest_limit() -> None:
    target = get_target("sm_121")
    # 40 KB + 1 KB of shared memory: two CTAs in 100 KB, before registers (4 CTAs of 4 warps at 128) would limit.
    assert resident_warps(128, 40960, 4, target) == 8
    assert resident_warps(128, 0, 4, target) == 16


def test_page_is_whole_escaped_and_fetches_nothing() -> None:
    hostile = example()
    hostile = Table(
        hostile.problem, 2, Device("<script>alert(1)</script>", "sm_121", 48), hostile.provenance, "measured",
        hostile.kernels, hostile.by_batch, hostile.by_batch_and_context,
    )  # fmt: skip
    text = page([example(), hostile])
    assert "<script" not in text
    assert not re.search(r"(src|href)=\"(?!#)", text) and "url(" not in text and "@import" not in text
    assert text.count("<svg") == 2 * 3  # the share of the limit, and a time plot for each of two batches
    for svg in re.findall(r"<svg.*?</svg>", text, re.S):
        ElementTree.fromstring(svg)
    balance = _Balance()
    balance.feed(text)
    assert balance.open == []
    assert "predicted" in text and "measured" in text


class _Balance(HTMLParser):
    """Tags that were opened and not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_plot_puts_larger_values_higher() -> None:
    svg = line_plot(
        [Series("s", ((1024.0, 10.0), (4096.0, 1000.0)))],
        title="t", x_label="x", y_label="y", x_ticks=[(1024, "1k"), (4096, "4k")], log_y=True,
    )  # fmt: skip
    points = re.search(r'polyline points="([^"]+)"', svg)
    assert points is not None
    (x0, y0), (x1, y1) = (map(float, p.split(",")) for p in points[1].split())
    assert x0 < x1 and y0 > y1


@pytest.mark.parametrize("flat", [True, False])
def test_plot_of_one_value_does_not_divide_by_zero(flat: bool) -> None:
    series = [Series("s", ((1024.0, 5.0),))]
    ElementTree.fromstring(
        line_plot(series, title="t", x_label="x", y_label="y", x_ticks=[(1024, "1k")], log_y=not flat)
    )


def test_constraints_say_what_is_left() -> None:
    space = get_space("dequant")
    found = Census(1000, 250, {c.name: 7 for c in space.constraints}, {c.name: 3 for c in space.constraints})
    text = printed(terminal.constraints(space, found))
    assert "250 of 1,000" in text and all(c.name in text for c in space.constraints)
