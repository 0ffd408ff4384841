"""Standalone exports are projects that build and test themselves far from this package."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from standalone_projects import (
    NAMES,
    all_tables,
    bare_environment,
    build_project,
    decode_configs,
    make_table,
    shell,
)

from tuner.build import Built, build
from tuner.render import render
from tuner.sass import disassemble
from tuner.space import Problem, default_config
from tuner.standalone import export_standalone
from tuner.standalone.kernels import OPS


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Decode kernels of every kind, a dequantiser and a store for sm_90, built with ninja."""
    folder = tmp_path_factory.mktemp("standalone") / "wph"
    export_standalone(all_tables(), folder)
    build_project(folder, "Ninja")
    return folder


def test_dispatch_agrees_with_the_tables(project: Path) -> None:
    done = shell("build/test_dispatch", cwd=project)
    assert done.returncode == 0 and re.match(r"\d\d+ calls agree", done.stdout), done.stderr


def test_another_dispatch_does_not(project: Path, tmp_path: Path) -> None:
    copy = tmp_path / "wph"
    shutil.copytree(project, copy, ignore=shutil.ignore_patterns("build"))
    tables = copy / "src/tables.h"
    text = tables.read_text()
    assert "CUT_OFF = 2.0" in text and ", BULK, 2," in text
    tables.write_text(text.replace("CUT_OFF = 2.0", "CUT_OFF = 1.0").replace(", BULK, 2,", ", CP_ASYNC, 2,"))
    objects = [str(p) for p in (project / "build").rglob("src/sm_90/*.o")]
    nvcc = bare_environment()["CUDACXX"]
    sources = ["src/dispatch.cu", *(f"src/{op}.cu" for op in OPS), "test/test_dispatch.cu"]
    done = shell(nvcc, "-std=c++17", "-arch=sm_90", "-Iinclude", "-Isrc", *sources, *objects, "-o", "t", cwd=copy)
    assert done.returncode == 0, done.stderr
    done = shell("./t", cwd=copy)
    assert done.returncode == 1 and done.stderr.startswith("FAIL decode call ")
    assert "FAIL cache order call " in done.stderr


@pytest.mark.parametrize("op", OPS)
def test_without_a_gpu_the_tests_fail_with_one_line(project: Path, op: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: what is tested is a machine without one")
    done = shell(f"build/test_{op}", cwd=project)
    assert done.returncode == 1 and done.stderr.startswith("FAIL no GPU to run on: ")
    assert len(done.stderr.splitlines()) == 1


def test_make_builds_sm_121_and_the_header_is_c(tmp_path: Path) -> None:
    outliers = default_config(Problem("decode", 128, 4, "turboquant_outlier"))
    export_standalone([make_table([outliers], "sm_121")], tmp_path)
    (tmp_path / "caller.c").write_text(
        '#include "wph.h"\nint main(void) { wph_decode_call c = {0}; wph_plan p; '
        "return wph_decode_select(&c, &p) == WPH_OK; }\n"
    )
    build_project(tmp_path, "Unix Makefiles")
    nvcc = bare_environment()["CUDACXX"]
    strict = "-Xcompiler=-Wall,-Wextra,-pedantic,-Werror"
    done = shell(nvcc, strict, "-Iinclude", "-c", "caller.c", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    flags = ("-std=c++17", "-arch=sm_121", "-Xcompiler=-Wall,-Wextra,-Werror", "-Iinclude", "-Isrc")
    done = shell(nvcc, *flags, "-c", "test/test_dispatch.cu", "-o", "test.o", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "planes of their own" in (tmp_path / "README.md").read_text()
    assert shell("build/test_dispatch", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("op", OPS)
def test_an_export_of_one_op_builds_and_dispatches(op: str, tmp_path: Path) -> None:
    """For keys in FP8, whose kernels state sizes that they do not use: the log is to be quiet all the same."""
    config = default_config(Problem(op, 128, 4 if op == "decode" else 1, "turboquant_k8v4"))
    export_standalone([make_table([config])], tmp_path)
    interface = (tmp_path / "include/wph.h").read_text() + (tmp_path / "src/dispatch.h").read_text()
    assert {other for other in OPS if f"wph_{other}_" in interface or f" {other}_plan(" in interface} == {op}
    build_project(tmp_path, "Ninja")
    assert {path.name for path in (tmp_path / "build").glob("test_*")} == {"test_dispatch", f"test_{op}"}
    done = shell("build/test_dispatch", cwd=tmp_path)
    assert done.returncode == 0 and re.match(r"\d+ calls agree", done.stdout), done.stderr


def test_machine_code_is_that_of_the_timed_kernel(project: Path, tmp_path: Path) -> None:
    config = decode_configs()[1]
    source = render(config)
    timed = build([source], ["sm_90"], root=tmp_path / "build")[source.digest, "sm_90"]
    assert isinstance(timed, Built)
    flags = ("-std=c++17", "-O3", "-cubin", "-arch=sm_90", "-Iinclude", "-Isrc")
    cubin = tmp_path / "exported.cubin"
    name = "src/sm_90/decode_d128_g4_4bit_nc_b.cu"
    done = shell(bare_environment()["CUDACXX"], *flags, name, "-o", str(cubin), cwd=project)
    assert done.returncode == 0, done.stderr
    ours, theirs = disassemble([(cubin, None), (timed.cubin, None)])
    assert ours.opcodes == theirs.opcodes and ours.registers == theirs.registers == timed.registers


_ORDERS = """
#include "cache.h"
using namespace wph_test;
// Prints a kernel per line, and for each cache of the tests 1 where the kernel can read it.
int main() {
    const wph::Tables tables = wph::all_tables();
    const std::vector<Spec> specs = all_specs();
    for (const wph::Table *table = tables.tables; table < tables.tables + tables.count; ++table) {
        if (table->op != wph::DECODE) continue;
        for (int i = table->first_kernel; i < table->first_kernel + table->kernel_count; ++i) {
            std::printf("%s", tables.kernels[i].name);
            for (const Spec &spec : specs) {
                const Cache cache(*find_layout(table->format, table->head_dim), spec, table->kv_heads, 0);
                wph_decode_params p = {};
                cache.describe_order(p);
                std::printf(" %d", wph::reads(tables.kernels[i], p));
            }
            std::puts("");
        }
    }
}
"""


def test_every_kernel_is_run_on_a_cache_that_it_reads(project: Path, tmp_path: Path) -> None:
    """Bulk copies of half of a token's heads read heads before tokens only, whole words only tokens before heads."""
    (tmp_path / "orders.cu").write_text(_ORDERS)
    objects = [str(p) for p in (project / "build").rglob("src/sm_90/*.o")]
    sources = [str(tmp_path / "orders.cu"), "src/dispatch.cu", *(f"src/{op}.cu" for op in OPS)]
    flags = ("-std=c++17", "-O1", "-arch=sm_90", "-Xcompiler=-Wall,-Wextra,-Werror", "-Iinclude", "-Isrc", "-Itest")
    done = shell(bare_environment()["CUDACXX"], *flags, *sources, *objects, "-o", str(tmp_path / "orders"), cwd=project)
    assert done.returncode == 0, done.stderr
    done = shell(str(tmp_path / "orders"), cwd=project)
    found = {name: reads for name, *reads in map(str.split, done.stdout.splitlines())}
    token_major, head_major, both = list("1100"), list("0011"), list("1111")
    reads = (both, head_major, both, both, token_major, both, both, token_major)
    assert found == {f"decode_d128_g4_4bit_nc_{n}": r for n, r in zip("abcdefgh", reads, strict=True)}


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_kernels_pass_on_this_gpu_and_a_broken_one_does_not(tmp_path: Path) -> None:
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    if arch not in NAMES:
        pytest.skip(f"no example table for {arch}")
    export_standalone(all_tables(arch), tmp_path)
    build_project(tmp_path, "Ninja")
    done = shell("ctest", "--test-dir", "build", "--output-on-failure", cwd=tmp_path)
    assert done.returncode == 0 and "100% tests passed" in done.stdout, done.stdout
    broken = tmp_path / f"src/{arch}/decode_d128_g4_4bit_nc_b.cu"
    text = broken.read_text()
    assert "1.f / total" in text
    broken.write_text(text.replace("1.f / total", "1.1f / total"))
    assert shell("cmake", "--build", "build", cwd=tmp_path).returncode == 0
    done = shell("build/test_decode", cwd=tmp_path)
    assert done.returncode == 1 and "decode_d128_g4_4bit_nc_b" in done.stderr and "relative error" in done.stderr
