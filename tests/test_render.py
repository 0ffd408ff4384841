"""Rendering: deterministic, formatted, and strict about every typo."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tuner import toolchain
from tuner.build import Built, build
from tuner.errors import TunerError, UsageError
from tuner.geometry import entry_points
from tuner.render import (
    ceil_div,
    code_digest,
    float_literal,
    format_source,
    hex_literal,
    log2,
    render,
    round_up,
    template_folder,
    templates_digest,
)
from tuner.space import Problem, default_config, get_space, seed_config
from tuner.table import read
from tuner.table.install import TABLE_PATTERN
from tuner.table.store import PACKAGE_TABLES

TABLES = sorted(PACKAGE_TABLES.glob(TABLE_PATTERN))
REPO = Path(__file__).resolve().parent.parent
DEVICES = [(op, "NVIDIA_H200") for op in ("decode", "store", "dequant")]
DEVICES += [("decode", "NVIDIA_H100"), ("decode", "NVIDIA_GB10")]
DECODE = default_config(Problem("decode", 128, 4, "turboquant_4bit_nc"))


def write(folder: Path, text: str, name: str = "wph_decode.cu.j2") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return folder


def test_context_and_header(tmp_path: Path) -> None:
    text = (
        "{{ params_struct }}\n{% if c.load == 'cp_async' %}\n"
        "int warps = {{ c.warps }}, d = {{ p.head_dim }};\n{% endif %}\n"
    )
    source = render(DECODE, write(tmp_path, text))
    assert "struct DecodeParams {" in source.text
    assert "int warps = 4, d = 128;" in source.text
    first, second = source.text.splitlines()[:2]
    assert first == "// wph_decode: head_dim 128, 4 query heads per KV head, turboquant_4bit_nc"
    assert second.startswith("// warps=4 head_warps=1")
    absent = {axis.name: axis.absent for axis in get_space("decode").axes}
    assert all((f"{n}={v}" in source.text) == (v != absent[n]) for n, v in DECODE.params)
    assert " tail=apart" in render(DECODE.with_(tail="apart"), write(tmp_path, text)).text
    assert source.digest == code_digest(source.text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n{{ c.toknes }}", "wph_decode.cu.j2:2: .*toknes"),
        ("{{ nowhere }}", "wph_decode.cu.j2:1: 'nowhere' is undefined"),
        ("{% if p.head_dmi == 1 %}{% endif %}", "head_dmi"),
        ("\n\n{% if c.load == 'blk' %}{% endif %}", "wph_decode.cu.j2:3: axis load never is 'blk': expected .* bulk"),
        ("{% if c.math != 'mmma' %}{% endif %}", "axis math never"),
        ("{{ c.math in ('mma', 'fma') }}{{ c.math in ('nma',) }}", "axis math never is 'nma'"),
        ("\n{% if %}", "wph_decode.cu.j2:2: "),
        ("{{ 5 | log2 }}", "power of two"),
        ("{% include 'parts/absent.j2' %}", "no template parts/absent.j2"),
        ("{{ fail('cannot do that') }}", "cannot do that"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_typo_names_template_and_line(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(TunerError, match=expected) as raised:
        render(DECODE, write(tmp_path, text))
    assert "\n" not in str(raised.value)


def test_error_in_included_part_names_the_part(tmp_path: Path) -> None:
    write(tmp_path, "int a;\n\n{{ c.nothing }}\n", "parts/piece.cuh.j2")
    with pytest.raises(TunerError, match=r"parts/piece\.cuh\.j2:3: "):
        render(DECODE, write(tmp_path, "{% include 'parts/piece.cuh.j2' %}"))


def test_bad_axis_value_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="axis warps cannot be 3"):
        render(DECODE.with_(warps=3), write(tmp_path, "x"))


def test_format_source() -> None:
    assert format_source("\n\na  \n\n\n\nb\t\n\n") == "a\n\nb\n"


def test_helpers() -> None:
    assert [log2(n) for n in (1, 2, 1024)] == [0, 1, 10]
    assert (ceil_div(7, 4), round_up(7, 4), round_up(8, 4)) == (2, 8, 8)
    assert hex_literal(15, 4) == "0x000fu"
    assert float_literal(0.125) == "0.125f"
    for bad in (0, 3, -4):
        with pytest.raises(TunerError, match="power of two"):
            log2(bad)
    for bad_float in (float("nan"), float("inf")):
        with pytest.raises(TunerError, match="no literal"):
            float_literal(bad_float)


def test_entry_points() -> None:
    assert entry_points(DECODE.with_(reduction="last")) == ("wph_decode",)
    assert entry_points(DECODE.with_(reduction="kernel")) == ("wph_decode", "wph_decode_reduce")
    assert entry_points(default_config(Problem("dequant", 128, 1, "turboquant_seed"))) == ("wph_dequant",)


@pytest.mark.parametrize("op", ["decode", "dequant", "store"])
def test_shipped_templates_render_formatted(op: str) -> None:
    for cache_format in ("turboquant_4bit_nc", "turboquant_outlier"):
        problem = Problem(op, 256, 4 if op == "decode" else 1, cache_format)
        for config in (default_config(problem), seed_config(problem)):
            source = render(config)
            assert source.text == format_source(source.text)
            assert "{{" not in source.text
            for entry in entry_points(config):
                assert f" {entry}(" in source.text


def test_same_text_in_every_process() -> None:
    code = (
        "from tuner.render import render, templates_digest; from tuner.space import *\n"
        "print(render(default_config(Problem('decode', 256, 8, 'turboquant_3bit_nc'))).digest, templates_digest())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(REPO)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "4242")
    }
    here = render(default_config(Problem("decode", 256, 8, "turboquant_3bit_nc"))).digest
    assert outputs == {f"{here} {templates_digest()}\n"}


def test_templates_digest_sees_names_and_contents(tmp_path: Path) -> None:
    write(tmp_path, "a")
    first = templates_digest(tmp_path)
    write(tmp_path, "b")
    second = templates_digest(tmp_path)
    (tmp_path / "wph_decode.cu.j2").rename(tmp_path / "other.cu.j2")
    assert len({first, second, templates_digest(tmp_path)}) == 3


def test_templates_of_an_installed_package(tmp_path: Path) -> None:
    """Without a checkout around it the package reads its own copy, even beside a folder called templates."""
    assert template_folder() == REPO / "templates"
    site = tmp_path / "site-packages"
    shutil.copytree(REPO / "tuner", site / "tuner", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPO / "templates", site / "tuner" / "templates")
    (site / "templates").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", "from tuner.render import *; print(template_folder(), templates_digest())"],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(site / "tuner" / "templates"), templates_digest()]


def test_a_kernel_is_known_by_its_code() -> None:
    code = '// kernel\n\nint a = 1;\nasm("// not a comment" : "=r"(a));  // one\n'
    better = '// kernel\n\n// Other words.\n\n  int a = 1;  \n\tasm("// not a comment" : "=r"(a));\n'
    assert code_digest(code) == code_digest(better)
    for text in ("/* a */", 'R"(//)"', "char c = '\"';", "#define A \\\n1", "#include <a//b>"):
        with pytest.raises(TunerError, match="expected comments that begin with // and plain strings"):
            code_digest(text)
    for old, new in (("1", "2"), ("not a", "no"), ("int a", "inta"), ("asm", "// asm"), ("kernel", "another")):
        assert code_digest(code.replace(old, new)) != code_digest(code)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_kernels_that_come_with_the_package_render_as_they_were_recorded(path: Path) -> None:
    """What was timed can still be read and exported; where templates have changed since, `export` says so."""
    table = read(path, cubins=False)
    same = {render(kernel.config(table.problem)).digest == kernel.source_digest for kernel in table.kernels}
    assert same == {True}


@pytest.mark.parametrize(("op", "device"), DEVICES)
def test_a_recorded_kernel_compiles_to_its_cubin(op: str, device: str, tmp_path: Path) -> None:
    """Byte for byte, from today's templates: better words in them have changed no machine code."""
    table = read(next(p for p in TABLES if p.name.startswith(f"turboquant_{op},head_dim=128,") and device in p.name))
    kernel = table.kernels[0]
    source = render(kernel.config(table.problem))
    if (found := toolchain.find((kernel.arch,)).version) != table.provenance.nvcc:
        pytest.skip(f"nvcc here is {found}, the table's was {table.provenance.nvcc}")
    built = build([source], [kernel.arch], root=tmp_path)[source.digest, kernel.arch]
    assert isinstance(built, Built) and built.cubin_sha256 == kernel.cubin_sha256
