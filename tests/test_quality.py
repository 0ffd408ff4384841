"""The quality table: what the page says is what the command computes, and the measures mean what they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.quality import Quality, datasets, error, markdown, quality, replace_table
from tuner.errors import TunerError
from tuner.formats import FORMATS, HEAD_DIMS, slot_layout

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "quality.md"


def page_rows() -> dict[tuple[str, int, str], list[float]]:
    """(data, D, format) -> the figures of the page's table."""
    rows = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and len(cells) == 9 and cells[1].isdigit():
            rows[cells[0], int(cells[1]), cells[2].strip("`")] = [float(cell) for cell in cells[3:]]
    return rows


def test_the_page_has_every_format_head_dim_and_data() -> None:
    asked = {(data, d, f) for f in FORMATS for d in HEAD_DIMS for data in datasets(slot_layout(f, d))}
    assert set(page_rows()) == asked
    assert {data for data, _, _ in asked} == {"Gaussian", "outliers", "calibrated"}


@pytest.mark.parametrize("cache_format", FORMATS)
def test_the_page_says_what_is_computed(cache_format: str) -> None:
    page = page_rows()
    for data in datasets(slot_layout(cache_format, 64)):
        q = quality(cache_format, 64, data)
        got = [q.compression, q.key_error, q.key_cosine, q.value_error, q.value_cosine, q.output_error]
        assert page[data, 64, cache_format] == pytest.approx(got, rel=0.01, abs=5e-5)


def test_what_the_page_concludes() -> None:
    page = page_rows()
    for d in HEAD_DIMS:
        seed, outlier, dense = (page["Gaussian", d, f"turboquant_{name}"] for name in ("seed", "outlier", "seed_dense"))
        assert seed[1] > 0.33 and seed[5] > 0.59
        assert outlier[1] < 0.084 and outlier[5] < 0.19
        assert outlier[1] < dense[1]
        calibrated = page["calibrated", d, "turboquant_outlier"]
        assert calibrated[5] < min(row[5] for (data, e, _), row in page.items() if (data, e) == ("outliers", d))
        assert max(row[3] for (_, e, f), row in page.items() if e == d and f[11:] in ("outlier", "seed_dense")) < 0.1


def test_error_is_relative_to_the_original() -> None:
    x = torch.tensor([[3.0, 4.0]])
    assert error(x, x) == 0
    assert error(1.1 * x, x) == pytest.approx(0.1)
    assert error(torch.zeros(1, 2), x) == 1


def test_a_table_is_replaced_in_its_place() -> None:
    row = Quality("turboquant_seed", 64, "Gaussian", 2.0, 0.1, 0.9, 0.2, 0.8, 0.3)
    text = replace_table(PAGE.read_text(), markdown([row]))
    assert text.startswith(PAGE.read_text()[:200])
    assert text.count("| Gaussian |") == 1 and "0.90000" in text
    assert replace_table(text, markdown([row])) == text
    with pytest.raises(TunerError, match="no place for the table"):
        replace_table("nothing", "")


def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "quality.py"), "--json", str(tmp_path / "q.json")]
    run = subprocess.run(
        [*command, "--formats", "turboquant_outlier", "--head-dims", "64"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("`turboquant_outlier`") == 3
    assert (tmp_path / "q.json").read_text().count("output_error") == 3
    for arguments, message in (
        (["--formats", "turboquant_9bit"], "unknown cache format 'turboquant_9bit'"),
        (["--head-dims", "96"], "unsupported head dim 96"),
        (["--head-dims", "x"], "invalid literal"),
    ):
        run = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert run.returncode == 2 and run.stderr.startswith("error: ") and message in run.stderr
        assert len(run.stderr.splitlines()) == 1
