"""A model with two head dims: a table for each in one folder, found by name, layer by layer, and verified together.

The tables are those of the package; nothing is launched.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from tuner.cli.options import problems_of
from tuner.cli.verify import command as verify_command
from tuner.space import Config, Problem
from tuner.suits import CacheOrder
from tuner.table import Table, TableError, find, lookup, mixes_lengths, read, verify
from tuner.table.store import PACKAGE_TABLES
from tuner.targets import get_target
from tuner.vllm import log
from tuner.vllm.dispatch import Chosen, Dispatch, load_table
from tuner.vllm.eligible import LayerFacts, layer_facts, objection
from tuner.vllm.forecast import forecast
from tuner.workload import Shape, Workload, load_model

FORMAT = "turboquant_4bit_nc"
H200 = replace(get_target("sm_90"), device_name="NVIDIA H200")
DEVICES = {"NVIDIA H200": "sm_90", "NVIDIA H100 80GB HBM3": "sm_90", "NVIDIA GB10": "sm_121"}
MIXED = Workload("mixed", ((Shape(256, 16, 2), 5), (Shape(512, 32, 4), 1)), ())
PROBLEMS = tuple(problems_of(MIXED, "decode", FORMAT))
CALLS = [(batch, context) for batch in (1, 4, 32, 128) for context in (None, 1024, 65536)]


@dataclass(frozen=True)
class Loaded:
    """What a loader makes of a cubin, without a GPU: the image and the configuration that it is said to have."""

    image: bytes
    config: Config


def layer(shape: Shape) -> LayerFacts:
    """The facts of a layer from the arguments that vLLM constructs it with."""
    facts = layer_facts(
        {
            "num_heads": shape.q_heads,
            "head_size": shape.head_dim,
            "scale": shape.head_dim**-0.5,
            "num_kv_heads": shape.kv_heads,
            "kv_cache_dtype": FORMAT,
        }
    )
    assert objection(facts) is None
    return facts


def dispatch(shape: Shape) -> Dispatch:
    """As the plugin makes one for a layer: the table is found by the layer's problem and the device's name."""
    return Dispatch(layer(shape).problem, shape.kv_heads, H200, Loaded)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The two H200 tables of the package with their kernels, where ``install`` would put them, and no others there."""
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path / "none"))
    monkeypatch.setenv("VLLM_CONFIG_ROOT", str(tmp_path / "nowhere"))
    monkeypatch.setattr(log, "_said", set())
    installed = tmp_path / "installed"
    (installed / "kernels").mkdir(parents=True)
    for problem in PROBLEMS:
        path = package_table(problem)
        shutil.copy(path, installed)
        for kernel in read(path).kernels:
            shutil.copy(path.parent / "kernels" / f"{kernel.id}.cubin", installed / "kernels")
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(installed))
    return installed


def package_table(problem: Problem, device_name: str = "NVIDIA H200") -> Path:
    path = find(problem, device_name)
    assert path is not None, problem
    return path


def table_of(folder: Path, problem: Problem) -> tuple[Path, Table]:
    path = find(problem, H200.device_name)
    assert path is not None and path.parent == folder
    return path, read(path, arch=H200.arch)


def test_a_model_of_two_head_dims_has_two_problems() -> None:
    assert [(p.head_dim, p.gqa) for p in PROBLEMS] == [(256, 8), (512, 8)]
    # Its layers of head dim 256 have a sliding window, so only the global ones are tuned.
    (gemma,) = problems_of(load_model("gemma-4-31b"), "decode", FORMAT)
    assert gemma == PROBLEMS[1]


@pytest.mark.parametrize("device_name", DEVICES)
def test_the_package_has_a_table_of_each_in_one_folder(device_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_TUNED_CONFIG_FOLDER", raising=False)
    monkeypatch.setenv("VLLM_CONFIG_ROOT", "/nowhere")
    paths = [package_table(problem, device_name) for problem in PROBLEMS]
    assert len(set(paths)) == 2 and {path.parent for path in paths} == {PACKAGE_TABLES}
    ids = []
    for path, problem in zip(paths, PROBLEMS, strict=True):
        table = read(path, arch=DEVICES[device_name])
        assert table.problem == problem and table.device.name == device_name
        assert f"head_dim={problem.head_dim}," in path.name and not verify(path)
        ids.append({kernel.id for kernel in table.kernels})
    assert ids[0] and ids[1] and not ids[0] & ids[1]  # they share the folder "kernels", not a kernel


def test_every_layer_gets_a_kernel_of_its_head_dim(folder: Path) -> None:
    for shape, _ in MIXED.shapes:
        chooser = dispatch(shape)
        path, table = table_of(folder, layer(shape).problem)
        assert chooser.table == table and table.kv_heads == shape.kv_heads
        cubins = {(path.parent / "kernels" / f"{k.id}.cubin").read_bytes() for k in table.kernels}
        for batch, context in CALLS:
            ragged = mixes_lengths(batch, context, None)
            choice = lookup(table, batch, context, kv_heads=shape.kv_heads, ragged=ragged)
            assert choice is not None
            config = table.kernel(choice.kernel).config(table.problem)
            chosen = chooser.choose(batch, context, 131072, CacheOrder.standard(config, kv_heads=shape.kv_heads))
            assert isinstance(chosen, Chosen) and isinstance(chosen.kernel, Loaded)
            assert chosen.kernel.config == config and chosen.splits == choice.splits
            assert config.problem.head_dim == shape.head_dim and chosen.kernel.image in cubins


def test_a_table_never_serves_the_other_head_dim(folder: Path) -> None:
    small, large = PROBLEMS
    path, table = table_of(folder, large)
    with pytest.raises(TableError, match="expected one of"):
        load_table(path, small, H200.arch, Loaded)  # type: ignore[arg-type]
    # Under the other's name it is not taken for the other's table either.
    shutil.copy(path, folder / table_of(folder, small)[0].name)
    chooser = dispatch(Shape(256, 16, 2))
    assert not chooser.usable and "head_dim=512" in str(chooser.problem_found)
    assert dispatch(Shape(512, 32, 4)).table == table


def test_a_broken_table_costs_only_its_own_layers(folder: Path) -> None:
    path, _ = table_of(folder, PROBLEMS[1])
    path.write_text(path.read_text()[:-20])
    broken, whole = dispatch(Shape(512, 32, 4)), dispatch(Shape(256, 16, 2))
    assert not broken.usable and path.name in str(broken.problem_found)
    assert whole.table is not None and whole.table.problem == PROBLEMS[0]


def test_the_forecast_names_a_table_for_each_kind_of_layer(folder: Path) -> None:
    small, large, _ = forecast(MIXED, FORMAT, H200)
    for line, layers, problem in ((small, "5 layers", PROBLEMS[0]), (large, "1 layer ", PROBLEMS[1])):
        assert line.startswith(layers) and table_of(folder, problem)[0].name in line
    # gemma-4-31b: the table of head dim 512 for its global layers, vLLM's kernel for those with a window.
    lines = forecast(load_model("gemma-4-31b"), FORMAT, H200)
    assert lines[0].startswith("10 layers (head dim 512") and table_of(folder, PROBLEMS[1])[0].name in lines[0]
    assert lines[1].startswith("50 layers (head dim 256") and lines[1].endswith("it has a sliding window")


def test_both_are_verified_by_one_command(folder: Path) -> None:
    done = CliRunner().invoke(verify_command, [str(folder)])
    assert done.exit_code == 0, done.output
    names = [table_of(folder, problem)[0].name for problem in PROBLEMS]
    assert sorted(line.split(maxsplit=1)[1] for line in done.output.splitlines()) == [str(folder / n) for n in names]
    _, table = table_of(folder, PROBLEMS[1])
    cubin = folder / "kernels" / f"{table.kernels[0].id}.cubin"
    cubin.write_bytes(cubin.read_bytes()[:-1])
    done = CliRunner().invoke(verify_command, [str(folder)])
    marked = [line.split(maxsplit=1) for line in done.output.splitlines() if ".json" in line]
    marks = {Path(path).name: mark for mark, path in marked}
    assert done.exit_code != 0 and marks == {names[0]: "ok", names[1]: "BROKEN"}
