"""The benchmark of the store: what it asks for, its lines and its verdicts; without a GPU it says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.store import CHUNK, KV_HEADS, LAYERS, Point, candidates, line, problems, together, verdicts
from tuner.errors import UsageError
from tuner.formats import HEAD_DIMS, VLLM_PRESETS
from tuner.space import default_config, get_space
from tuner.targets import get_target

ROOT = Path(__file__).parents[1]


def point(
    case: str, us: float, vllm_us: float | None = 40.0, head_dim: int = 128, name: str = VLLM_PRESETS[1]
) -> Point:
    return Point(name, head_dim, case, 128, 1, us, 3.0, vllm_us, "warps=4", "leads")


def test_all_of_vllms_formats_and_head_dims_by_default() -> None:
    asked = problems("", "")
    assert {(p.cache_format, p.head_dim) for p in asked} == {(f, d) for f in VLLM_PRESETS for d in HEAD_DIMS}
    assert [p.head_dim for p in problems("turboquant_seed", "64,256")] == [64, 256]


@pytest.mark.parametrize(
    ("formats", "dims", "word"), [("fp8", "", "fp8"), ("", "128,x", "128,x"), ("", "96", "head dim 96")]
)
def test_what_there_is_not_is_refused(formats: str, dims: str, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        problems(formats, dims)


def test_candidates_are_allowed_and_begin_with_the_default() -> None:
    target, space = get_target("sm_90"), get_space("store")
    for problem in problems("", ""):
        found = candidates(problem, target)
        assert found[0] == default_config(problem) and len(found) == len(set(found)) > 4
        assert not any(space.refusals(c, target) for c in found)


def test_verdicts_take_the_worst_at_head_dim_128() -> None:
    points = [
        point("layers", 3.0), point("layers", 3.9, 12.0, name=VLLM_PRESETS[0]), point("layers", 9.0, head_dim=256),
        point("chunk", 4.0), point("step", 7.0),
    ]  # fmt: skip
    step, ratio, share = verdicts(points)
    assert (step.worst, step.met) == (3.9, True)
    assert ratio.worst == pytest.approx(12 / 3.9) and ratio.met is False
    assert share.worst == 0.75 and share.met
    assert all(v.met is None and v.worst is None for v in verdicts([]))
    assert verdicts([point("layers", 4.1, None)])[0].met is False


def test_a_line_shows_times_share_and_ratio() -> None:
    text = line(point("step", 4.0))
    assert text.split() == [VLLM_PRESETS[1], "128", "step", "4.00", "75%", "40.0", "10.0", "x", "leads:", "warps=4"]
    assert " - " in line(point("step", 4.0, None))


def test_calls_of_all_layers_are_one_call() -> None:
    made: list[int] = []
    together([lambda i=i: made.append(i) for i in range(3)])()  # type: ignore[misc]
    assert made == [0, 1, 2]
    assert KV_HEADS == 8 and LAYERS > 1 and CHUNK.tokens == 8192


def test_without_a_gpu_one_line_and_exit_code_1(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    command = [sys.executable, str(ROOT / "benchmarks/store.py"), "--json", str(tmp_path / "store.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: no GPU 0") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_a_short_run_measures_every_case(tmp_path: Path) -> None:
    result = tmp_path / "store.json"
    command = [sys.executable, str(ROOT / "benchmarks/store.py"), "--formats", "turboquant_4bit_nc"]
    options = ["--head-dims", "64", "--rounds-s", "0.1", "--json", str(result), "--root", str(tmp_path)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr  # no target is about head dim 64
    data = json.loads(result.read_text())
    assert [p["case"] for p in data["points"]] == ["step", "layers", "chunk"]
    assert all(0 < p["share"] < 1.2 for p in data["points"])
    assert data["moved"]["turboquant_4bit_nc 64"]["indices"] > 100_000
    assert data["moved"]["turboquant_4bit_nc 64"]["farthest"] <= 1
