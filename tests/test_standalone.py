"""Standalone exports: what was timed, as a project that builds and tests itself far from this package."""

from __future__ import annotations

import atexit
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from tuner import toolchain
from tuner.build import Built, build
from tuner.errors import TunerError, UsageError
from tuner.formats import slot_layout
from tuner.geometry import dynamic_shared_bytes
from tuner.reference import Codec, dequantize_key, dequantize_value, quantize_key, quantize_value
from tuner.render import header, primitives, render
from tuner.sass import disassemble
from tuner.space import Config, Problem, default_config
from tuner.standalone import export_standalone
from tuner.standalone.kernels import OPS
from tuner.table import BatchEntry, BucketEntry, Device, Kernel, Provenance, Table, Timing, kernel_id, write

DECODE = Problem("decode", 128, 4, "turboquant_4bit_nc")
DEQUANT = Problem("dequant", 128, 1, "turboquant_4bit_nc")
STORE = Problem("store", 128, 1, "turboquant_4bit_nc")
NAMES = {"sm_90": "NVIDIA H200", "sm_121": "NVIDIA GB10"}


def timing(context: int, ragged: bool = False) -> Timing:
    return Timing(context, ragged, 20.0, 19.0, 21.0, 12.0, {"triton": 200.0}, "memory")


def make_table(configs: list[Config], arch: str = "sm_90", **changes: object) -> Table:
    """A measured table whose batches and contexts are spread over ``configs``."""
    made = []
    for config in configs:
        sha = hashlib.sha256(config.describe().encode()).hexdigest()
        digest = render(config).digest
        shared = dynamic_shared_bytes(config)
        made.append(Kernel(kernel_id(arch, sha), config.params, digest, sha, arch, 128, shared, 0))
    ids = [k.id for k in made]
    batches, contexts = (1, 4, 16), (1024, 16384)
    table = Table(
        problem=configs[0].problem,
        kv_heads=8,
        device=Device(NAMES[arch], arch, 132),
        provenance=Provenance("2026-01-01T00:00:00Z", 0, nvcc="13.0.88", git_commit="ab" * 20),
        evidence="measured",
        kernels=tuple(made),
        by_batch=tuple(
            BatchEntry(b, ids[-1 - i % len(ids)], 3 + i, 1.1, 1.0, (timing(1024),)) for i, b in enumerate(batches)
        ),
        by_batch_and_context=(
            *(BucketEntry(b, ids[(i + j) % len(ids)], 5 * i + j + 1, timing(c))
              for i, b in enumerate(batches) for j, c in enumerate(contexts)),
            BucketEntry(16, ids[0], 7, timing(16384, ragged=True)),
        ),
    )  # fmt: skip
    return replace(table, **changes)  # type: ignore[arg-type]


def decode_configs() -> list[Config]:
    """One of each kind that the launch must tell apart."""
    plain = default_config(DECODE)
    bulk = plain.with_(load="bulk", load_bytes=16, head_warps=4, schedule="stream")
    direct = plain.with_(load="direct", stages=1, reduction="kernel")
    rows = bulk.with_(load="bulk_rows", head_warps=8, warps=8)
    waiting = plain.with_(reduction="all_threads", schedule="allot", beginning="prompt")
    whole = bulk.with_(head_warps=8, warps=8, words="whole")
    return [plain, bulk, plain.with_(reduction="tree"), direct, rows, plain.with_(reduction="cluster8"), waiting, whole]


def all_tables(arch: str = "sm_90") -> list[Table]:
    others = [[default_config(problem)] for problem in (DEQUANT, STORE)]
    return [make_table(configs, arch) for configs in (decode_configs(), *others)]


# --- what is written --------------------------------------------------------------------------------------------------


def test_kernels_are_the_timed_sources_in_parts(tmp_path: Path) -> None:
    table = make_table(decode_configs())
    for kernel, exported in zip(table.kernels, export_standalone([table], tmp_path / "wph"), strict=True):
        text = (tmp_path / "wph" / exported.file).read_text()
        source = render(exported.config)
        assert source.digest == kernel.source_digest
        _, _, body = text.partition("using DecodeParams = wph_decode_params;\n\n")
        body, _, _ = body.rpartition("\n\n}  // namespace")
        body = body.replace("\n__global__ void", '\nextern "C" __global__ void')
        struct = source.text.partition(primitives(exported.config))[2].partition("};")[0] + "};"
        joined = f"{header(exported.config)}{primitives(exported.config)}{struct}\n\n{body}\n"
        # Primitives of one kernel are there for GPUs alone.
        assert joined == re.sub(r"#if !defined\(WPH_EMULATE\)\n(.*?)#endif\n", r"\1", source.text, flags=re.DOTALL)


def test_project_is_plain_text_for_people(tmp_path: Path) -> None:
    export_standalone(all_tables(), tmp_path)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".h", ".cu", ".cuh", ".txt", ".md"}
    for path in files:
        text = path.read_text()
        assert "{% " not in text and "jinja" not in text.lower() and "WPH_EMULATE" not in text, path
        assert text.endswith("\n") and "\n\n\n" not in text, path
        assert path.suffix == ".md" or "SPDX-License-Identifier: Apache-2.0" in text.splitlines()[0], path
    readme = (tmp_path / "README.md").read_text()
    assert "Timed on NVIDIA H200" in readme and "decode_d128_g4_4bit_nc_a" in readme and "0.005 (bf16)" in readme


def test_a_prediction_is_called_one(tmp_path: Path) -> None:
    export_standalone([make_table([default_config(DECODE)], "sm_121", evidence="predicted")], tmp_path)
    assert "never timed, for NVIDIA GB10" in (tmp_path / "README.md").read_text()
    assert "predicted for NVIDIA GB10" in next(tmp_path.glob("src/sm_121/*.cu")).read_text()


def test_what_was_not_timed_is_refused(tmp_path: Path) -> None:
    table = make_table(decode_configs())
    stale = replace(table, kernels=(replace(table.kernels[0], source_digest="0" * 64), *table.kernels[1:]))
    with pytest.raises(TunerError, match=r"1 of 8 kernels were made from other templates .*tune again.*commit abab"):
        export_standalone([stale], tmp_path / "wph")
    assert not (tmp_path / "wph").exists()


def test_tables_that_answer_the_same_call_and_full_folders_are_refused(tmp_path: Path) -> None:
    table = make_table([default_config(DECODE)])
    with pytest.raises(UsageError, match="answer the same calls on sm_90"):
        export_standalone([table, replace(table, device=Device("NVIDIA H100", "sm_90", 132))], tmp_path / "wph")
    with pytest.raises(UsageError, match="no entries"):
        export_standalone([replace(table, by_batch=())], tmp_path)
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UsageError, match="is not empty: expected a new folder"):
        export_standalone([table], tmp_path)


def test_command_line(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    data = b"\x7fELF"
    table = make_table([default_config(DECODE)])
    sha = hashlib.sha256(data).hexdigest()
    kernel = replace(table.kernels[0], id=kernel_id("sm_90", sha), cubin_sha256=sha)
    renamed = {table.kernels[0].id: kernel.id}
    table = replace(
        table,
        kernels=(kernel,),
        by_batch=tuple(replace(e, kernel=renamed[e.kernel]) for e in table.by_batch),
        by_batch_and_context=tuple(replace(e, kernel=renamed[e.kernel]) for e in table.by_batch_and_context),
    )
    path = write(table, tmp_path / "tables", {kernel.id: data})
    command = [sys.executable, str(root / "tune.py"), "export", str(path), "--standalone", "--to", "wph"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "wph: 1 kernels for sm_90" in done.stdout, done.stderr
    assert (tmp_path / "wph/include/wph.h").is_file()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "not empty" in done.stderr


# --- what is built ----------------------------------------------------------------------------------------------------


TOOLS = ("cmake", "ctest", "ninja")


@cache
def folder_of_tools() -> Path:
    """The build tools alone, wherever they are installed."""
    folder = Path(tempfile.mkdtemp(prefix="wph-tools-"))
    atexit.register(shutil.rmtree, folder)
    for tool in TOOLS:
        if found := shutil.which(tool):
            (folder / tool).symlink_to(found)
    return folder


def bare_environment() -> dict[str, str]:
    """Without this package, its environment, or anything else that a stranger's machine lacks. Where nvcc is a wheel's,
    it does not find the libraries beside it by itself.
    """
    nvcc = toolchain.find(("sm_90",)).nvcc
    path = f"{folder_of_tools()}:/usr/local/bin:/usr/bin:/bin"
    return {"PATH": path, "HOME": "/nonexistent", "CUDACXX": str(nvcc), "LIBRARY_PATH": str(nvcc.parents[1] / "lib")}


def shell(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=bare_environment(), capture_output=True, text=True, timeout=600)


def build_project(folder: Path, generator: str) -> Path:
    missing = [tool for tool in TOOLS if not shutil.which(tool, path=bare_environment()["PATH"])]
    if missing:
        pytest.skip(f"no {missing[0]}")
    for command in (("cmake", "-B", "build", "-G", generator), ("cmake", "--build", "build", "-j2")):
        done = shell(*command, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "build"


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


# --- the reference in C++ ---------------------------------------------------------------------------------------------

_DUMP = """
#include <cstdio>
#include "layouts.h"
using namespace wph_test;
// Reads vectors from standard input; prints the bytes of each as key and value, then the channels they stand for.
int main() {
    for (const Layout &layout : LAYOUTS) {
        Layer layer;
        int signs, channels;
        if (std::scanf("%d %d", &signs, &channels) != 2) return 1;
        for (int i = 0, x; i < signs && std::scanf("%d", &x) == 1; ++i) layer.signs.push_back(x);
        for (int i = 0, x; i < channels && std::scanf("%d", &x) == 1; ++i) layer.channels.push_back(x);
        int rows;
        if (std::scanf("%d", &rows) != 1) return 1;
        for (int r = 0; r < rows; ++r) {
            std::vector<double> x(layout.head_dim);
            for (double &v : x) if (std::scanf("%lf", &v) != 1) return 1;
            for (const Row *row : {&layout.key, &layout.value}) {
                std::vector<unsigned char> bytes(layout.slot_bytes);
                encode(layout, *row, layer, x, bytes.data());
                for (unsigned char b : bytes) std::printf("%d ", b);
                for (double v : decode(layout, *row, layer, bytes.data())) std::printf("%.17g ", v);
                std::puts("");
            }
        }
    }
}
"""


def test_codec_of_the_tests_is_the_reference(tmp_path: Path) -> None:
    formats = ("turboquant_k8v4", "turboquant_4bit_nc", "turboquant_3bit_nc", "turboquant_seed", "turboquant_outlier")
    configs = [default_config(Problem("decode", 64, 1, name)) for name in formats]
    export_standalone([make_table([config]) for config in configs], tmp_path)
    (tmp_path / "dump.cu").write_text(_DUMP)
    nvcc = bare_environment()["CUDACXX"]
    done = shell(nvcc, "-std=c++17", "-Iinclude", "-Itest", "dump.cu", "-o", "dump", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    codecs = [Codec.for_layout(slot_layout(name, 64), seed=3) for name in formats]
    rows = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)).bfloat16().double()
    words = []
    for codec in codecs:
        signs = [] if codec.signs is None else codec.signs.int().tolist()
        channels = [] if codec.channels is None else codec.channels.tolist()
        words += [len(signs), len(channels), *signs, *channels, len(rows), *rows.flatten().tolist()]
    done = subprocess.run([tmp_path / "dump"], input=" ".join(map(str, words)), capture_output=True, text=True)
    lines = iter(done.stdout.splitlines())
    for codec in codecs:
        slot = codec.layout.slot_bytes
        pairs = (
            (quantize_key, dequantize_key, codec.layout.key.size),
            (quantize_value, dequantize_value, codec.layout.value.size),
        )
        for row in rows:
            for quantize, dequantize, size in pairs:
                numbers = next(lines).split()
                found = torch.tensor([int(n) for n in numbers[:slot]], dtype=torch.uint8)
                assert torch.equal(found[:size], quantize(row, codec)), codec.layout.format.name
                decoded = torch.tensor([float(n) for n in numbers[slot:]], dtype=torch.float64)
                torch.testing.assert_close(decoded, dequantize(found[:size], codec), rtol=1e-12, atol=1e-12)
    assert next(lines, None) is None


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
