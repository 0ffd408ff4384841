"""The grid's points, kernels and results; the races themselves need a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from grid_results import by_name, grid, result

from benchmarks.decode_grid import line, parser, read_points, write
from benchmarks.grid.kernels import GRAPH, Kernels, problem_of
from benchmarks.grid.points import BATCHES, BF16_LIMIT, CONTEXTS, FORMAT, OTHER_FORMATS, SHAPES, Point, points
from benchmarks.grid.race import Budget, Racer, Store
from benchmarks.grid.verdict import verdicts
from tuner.baselines import BASELINES, Availability, split_name
from tuner.bench import OURS
from tuner.errors import UsageError
from tuner.measure import Failure, Measurer, Race, Sample, Timing
from tuner.measure.measurer import Checked
from tuner.table import TableError, lookup
from tuner.targets import get_target
from tuner.workload import Bucket, Shape

ROOT = Path(__file__).resolve().parents[1]
H200 = get_target("sm_90")
SHIPPED_TABLES = ROOT / "tuner" / "tables"


def test_the_grid_has_every_point_that_fits() -> None:
    found = points(SHAPES, BATCHES, CONTEXTS)
    assert len({p.key for p in found}) == len(found)
    grid = {(p.shape, p.bucket) for p in found if p.section == "grid"}
    fits = {
        (s, Bucket(b, c)) for s in SHAPES for b in BATCHES for c in CONTEXTS
        if b * c * s.kv_heads * s.head_dim * 2 * 2 <= BF16_LIMIT
    }  # fmt: skip
    assert grid == fits
    assert (Shape(128, 32, 8), Bucket(128, 131072)) in grid and (Shape(512, 32, 4), Bucket(128, 131072)) not in grid
    ragged = {(p.shape, p.bucket.batch): p.bucket for p in found if p.section == "ragged"}
    twins = {(p.shape, p.bucket.batch): p.bucket for p in found if p.section == "twin"}
    assert ragged.keys() == twins.keys() and len(ragged) == 6 * len(SHAPES)
    for place, bucket in ragged.items():
        assert not twins[place].ragged and twins[place].tokens == pytest.approx(bucket.tokens, rel=1e-3)
    assert sum(p.section == "latency" for p in found) == 2


def test_formats_are_compared_where_the_cache_is_large() -> None:
    found = [p for p in points(SHAPES[:1], (1,), (1024,), OTHER_FORMATS) if p.section == "format"]
    buckets = {f: [p.bucket for p in found if p.cache_format == f] for f in (FORMAT, *OTHER_FORMATS)}
    assert len(set(map(tuple, buckets.values()))) == 1 and len(buckets[FORMAT]) >= 5
    assert min(p.compressed_bytes for p in found if p.cache_format == FORMAT) >= 128e6
    rows = [p for p in points(SHAPES, (1,), (1024,), dequant=True) if p.section == "dequant"]
    assert {(p.shape.head_dim, p.shape.kv_heads) for p in rows} == {(s.head_dim, s.kv_heads) for s in SHAPES}
    assert all(p.bucket.tokens * p.shape.kv_heads >= 65536 for p in rows)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--shapes 128:32", "128:32:8"),
        ("--shapes 100:32:8", "head dim 100"),
        ("--batches 1,x", "--batches"),
        ("--contexts 0", "at least 1"),
        ("--formats fp8", "fp8"),
    ],
)
def test_bad_usage_is_one_line(args: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read_points(parser().parse_args(args.split()))


def test_quick_is_small_and_may_be_narrowed() -> None:
    quick = read_points(parser().parse_args(["--quick"]))
    assert 20 <= sum(p.section == "grid" for p in quick) <= 24 and len({p.shape for p in quick}) == 2
    one = read_points(parser().parse_args(["--quick", "--shapes", "512:32:4", "--batches", "1", "--contexts", "1024"]))
    assert [p.key for p in one] == [f"grid 512:32:4 {FORMAT} b1_c1024"]


# --- whose kernels ----------------------------------------------------------------------------------------------------


def test_kernels_are_the_tables_as_the_api_chooses_them(tmp_path: Path) -> None:
    kernels = Kernels(SHIPPED_TABLES, H200, tmp_path)
    points_ = [Point("grid", Shape(128, 32, 8), FORMAT, Bucket(b, c)) for b in (1, 16, 128) for c in (1024, 131072)]
    graphs = 0
    for point in points_:
        found = kernels.table(problem_of(point))
        assert found is not None
        ours = kernels.of(point)
        choice = lookup(found[1], point.bucket.batch, point.bucket.context, kv_heads=8)
        assert choice and ours.source == "table" and ours.contestants[0].name == OURS
        assert ours.contestants[0].splits == choice.splits and ours.contestants[0].cubin is not None
        assert ours.contestants[0].cubin.stem == choice.kernel
        for graph in ours.contestants[1:]:
            graphs += 1
            batch_wide = lookup(found[1], point.bucket.batch, kv_heads=8)
            assert graph.name == GRAPH and batch_wide and graph.cubin and graph.cubin.stem == batch_wide.kernel
            assert f"{graph.cubin.stem}/{graph.splits}" in ours.digest  # another one there is raced again
    assert graphs
    names = kernels.tuned_triton(problem_of(points_[0]))
    assert names and all(split_name(n)[1] is not None for n in names)


def test_without_a_table_the_default_is_compiled(tmp_path: Path) -> None:
    point = Point("grid", Shape(64, 8, 2), FORMAT, Bucket(2, 4096))
    (tmp_path / "tables").mkdir()
    ours = Kernels(tmp_path / "tables", H200, tmp_path / "build").of(point)
    assert ours.source == "default" and len(ours.contestants) == 1
    assert ours.contestants[0].cubin and ours.contestants[0].cubin.read_bytes().startswith(b"\x7fELF")
    assert ours.contestants[0].splits > 1


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    (source,) = SHIPPED_TABLES.glob("*head_dim=128,gqa=4,device_name=NVIDIA_H200,cache_dtype=turboquant_4bit_nc.json")
    (tmp_path / source.name).write_text(source.read_text()[:100])
    with pytest.raises(TableError):
        Kernels(tmp_path, H200, tmp_path).of(Point("grid", Shape(128, 32, 8), FORMAT, Bucket(1, 1024)))


# --- results ----------------------------------------------------------------------------------------------------------


def test_lines_show_ratios_and_failures() -> None:
    shown = line(result(grid(8, 16384), 100.0, vllm_triton=1210.0) | {"failures": {"fa3_bf16": "error: no library"}})
    assert "128 32/8" in shown and "16k" in shown and "12.1 x" in shown
    assert shown.endswith("failed: fa3_bf16: error: no library")
    failed = line(result(grid(1, 1024), 1.0) | {"times_us": {}})
    assert failed.count(" - ") >= 4


def test_a_record_is_printed_without_a_gpu(tmp_path: Path) -> None:
    results = [result(grid(8, c), us, vllm_triton=12 * us, fa3_bf16=3 * us) for c, us in ((1024, 10.0), (16384, 100.0))]
    path = tmp_path / "record.json"
    write(path, "NVIDIA H100", None, results, verdicts(results))
    command = [sys.executable, str(ROOT / "benchmarks/decode_grid.py"), "--recorded", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "measured on NVIDIA H100" in done.stdout, done.stderr
    (row,) = (text for text in done.stdout.splitlines() if text.lstrip().startswith("D=128 32/8"))
    assert row.split()[2] == "2" and row.count("12, 12") == 1 and row.count("3, 3") == 1
    assert "met     against vLLM's Triton as shipped: mean 12" in done.stdout
    path.write_text("{}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


def test_results_outlive_an_interrupt(tmp_path: Path) -> None:
    store = Store(tmp_path / "work" / "results.jsonl")
    known = result(grid(1, 1024), 10.0)
    store.put(known)
    with (tmp_path / "work" / "results.jsonl").open("a") as file:
        file.write('{"key": "grid half a li')
    again = Store(tmp_path / "work" / "results.jsonl")
    assert again.get(known["key"], ["x"]) == known
    assert again.get(known["key"], ["another kernel"]) is None and again.get("other", ["x"]) is None
    write(tmp_path / "a" / "b.json", "NVIDIA H200", None, [known], verdicts([known]))
    data = json.loads((tmp_path / "a" / "b.json").read_text())
    assert data["evidence"] == "measured" and data["results"] == [known] and len(data["verdicts"]) > 10


# --- races, with times from a formula in place of a GPU ---------------------------------------------------------------


class Formula:
    """Answers as ``Measurer`` does: ours takes twice the limit, everyone else longer; what it is told to, crashes."""

    def __init__(self, crashing: str = "") -> None:
        self.asked: list[list[str]] = []
        self.swept: list[str] = []
        self.crashing = crashing
        self.times_s: list[float] = []
        self.checked: list[Path] = []
        self.gate: Any = Checked(1e-3, "fine")

    def race(self, contestants: Any, shape: Shape, cache_format: str, bucket: Bucket, **options: Any) -> Any:
        names = [c.name for c in contestants]
        self.asked.append(names)
        self.times_s.append(options["total_s"])
        assert options["budget_s"] <= options["total_s"] and bucket in (options["reserve"] or [bucket])
        if self.crashing in names:
            return Failure("crash", "the measuring process ended")
        factors = {n: 2.0 if n == OURS else 2.2 if n == GRAPH else 40.0 if "triton" in n else 5.0 for n in names}
        times = {n: f * bucket.tokens / 1000 for n, f in factors.items() if n != "fa3_fp8"}
        samples = {n: Sample.of([t, t, t]) for n, t in times.items()}
        rounds = {n: (t, t, t) for n, t in times.items()}
        return Race(rounds, samples, {"fa3_fp8": Failure("resource", "no memory")} if "fa3_fp8" in names else {})

    def check(self, config: Any, cubin: Path, *, kv_heads: int) -> Any:
        self.checked.append(cubin)
        return self.gate

    def baseline(self, names: list[str], shape: Shape, cache_format: str, buckets: Any) -> Any:
        self.swept += names
        return {n: [Timing(b.key, 0, Sample.of([float(len(n))])) for b in buckets] for n in names}


@pytest.fixture
def all_available(monkeypatch: pytest.MonkeyPatch) -> None:
    def survey(device: Any, problem: Any) -> tuple[Availability, ...]:
        return tuple(Availability(b.name, None) for b in BASELINES.values() if b.op == problem.op)

    monkeypatch.setattr("benchmarks.grid.race.survey", survey)


def racer(folder: Path, measurer: Formula) -> Racer:
    kernels = Kernels(SHIPPED_TABLES, H200, folder)
    store = Store(folder / "results.jsonl")
    return Racer(measurer, kernels, H200, store, Budget(), lambda text: None, 0)  # type: ignore[arg-type]


@pytest.mark.usefixtures("all_available")
def test_a_race_becomes_a_result_and_is_not_run_twice(tmp_path: Path) -> None:
    asked = [grid(1, 1024), grid(128, 16384), grid(16, 3000, section="twin")]
    measurer = Formula()
    results = racer(tmp_path, measurer).run(asked, lambda r: None)
    first = measurer.asked[0]
    assert measurer.times_s == [40, 8, 8]  # what must be compiled is so in the first
    assert first[0] == OURS and [n for n in first if n.startswith("fa3")] == ["fa3_bf16", "fa3_fp8"]
    assert "vllm_triton" in first and "triton" not in first and any(n.startswith("triton[") for n in first)
    assert set(measurer.asked[2]) <= {OURS, GRAPH} and not measurer.swept  # the table names Triton's constants
    found = by_name(results)
    assert found["against vLLM's Triton as shipped", "mean"].reached == pytest.approx(20)
    assert found["against FA3 bf16", "worst"].reached == pytest.approx(2.5)
    assert found["against FA3 fp8, cache >= 256 MB in bf16", "mean"].met is None
    assert results[0]["failures"] == {"fa3_fp8": "resource: no memory"} and results[0]["source"] == "table"
    again = Formula()
    assert racer(tmp_path, again).run(asked, lambda r: None) == results and again.asked == []


@pytest.mark.usefixtures("all_available")
def test_a_peer_that_crashes_costs_only_the_peers(tmp_path: Path) -> None:
    measurer = Formula(crashing="fa3_bf16")
    (found,) = racer(tmp_path, measurer).run([grid(1, 1024)], lambda r: None)
    assert len(measurer.asked) == 2 and set(measurer.asked[1]) <= {OURS, GRAPH}
    assert OURS in found["times_us"] and found["failures"] == {"peers": "crash: the measuring process ended"}


@pytest.mark.usefixtures("all_available")
@pytest.mark.parametrize("gate", [Failure("wrong result", "relative error 0.5"), Failure("crash", "illegal address")])
def test_a_kernel_is_timed_only_where_it_is_right(gate: Failure, tmp_path: Path) -> None:
    right = Formula()
    racer(tmp_path / "a", right).run([grid(1, 1024), grid(1, 4096)], lambda r: None)
    assert right.checked and len(right.checked) == len(set(right.checked)), "once per kernel"
    wrong = Formula()
    wrong.gate = gate
    (found,) = racer(tmp_path / "b", wrong).run([grid(1, 1024)], lambda r: None)
    assert wrong.asked == [] and found["failures"] == {OURS: f"{gate.kind}: {gate.message}"}
    assert not (tmp_path / "b" / "results.jsonl").exists()


@pytest.mark.usefixtures("all_available")
def test_without_a_table_tritons_constants_are_searched_once(tmp_path: Path) -> None:
    point = Point("grid", Shape(64, 8, 2), FORMAT, Bucket(2, 4096))
    (tmp_path / "tables").mkdir()
    measurer = Formula()
    for _ in range(2):
        kernels, store = Kernels(tmp_path / "tables", H200, tmp_path / "build"), Store(tmp_path / "results.jsonl")
        runner = Racer(measurer, kernels, H200, store, Budget(), lambda text: None, 0)  # type: ignore[arg-type]
        (found,) = runner.run([point], lambda r: None)
    assert len(measurer.asked) == 1 and 2 <= len(measurer.swept) == len(set(measurer.swept)) <= 6
    assert any(n in measurer.asked[0] for n in measurer.swept) and found["source"] == "default"


# --- where there is no GPU --------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: this is what happens without one")
def test_without_a_gpu_every_point_says_why_and_nothing_is_kept(tmp_path: Path) -> None:
    """The real measuring process, which finds no GPU."""
    told: list[str] = []
    store = Store(tmp_path / "results.jsonl")
    with Measurer(log=tmp_path / "log") as measurer:
        racer = Racer(measurer, Kernels(SHIPPED_TABLES, H200, tmp_path), H200, store, Budget(), told.append, 0)
        results = racer.run([grid(1, 1024), grid(8, 16384, section="twin")], lambda r: told.append(line(r)))
    assert len(results) == 2
    for found in results:
        assert "no NVIDIA GPU" in found["failures"][OURS] and not found["times_us"]
    assert any(t.startswith("without fa3_bf16") for t in told)
    assert not (tmp_path / "results.jsonl").exists()


def test_predictions_are_judged_from_the_tables(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "decode_grid.py"), "--arch", "sm_121"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("NVIDIA GB10 (sm_121), predicted") and not any(tmp_path.iterdir()), done.stderr
    judged = [line for line in lines if line.startswith(("met", "MISSED"))]
    verdict = {line.split(maxsplit=1)[1].partition(":")[0]: line for line in judged}
    assert len(verdict) == 4 and done.returncode == int(any(v.startswith("MISSED") for v in verdict.values()))
    for name in ("kernels without spills (1", "fits 99 KB of shared memory (times over)"):
        assert verdict[name].startswith("met"), done.stdout
    measured = subprocess.run([*command[:-1], "sm_90"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert measured.returncode == 2 and "measured: expected a GPU whose tables are predictions" in measured.stderr
    assert not measured.stdout
    empty = subprocess.run([*command, "--tables", "."], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert empty.returncode == 1 and empty.stdout.count("no table: python tune.py --arch sm_121") == len(SHAPES)
    assert empty.stdout.count("7 without a time of ours") == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: this is what happens without one")
def test_the_command_says_that_it_needs_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "decode_grid.py"), "--quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("error: no GPU 0") and not any(tmp_path.iterdir())
