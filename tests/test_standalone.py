"""Standalone exports: what was timed, as text for people; the codec of its tests is the reference."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from standalone_projects import DECODE, all_tables, bare_environment, decode_configs, make_table, shell

from tuner.errors import TunerError, UsageError
from tuner.formats import slot_layout
from tuner.reference import Codec, dequantize_key, dequantize_value, quantize_key, quantize_value
from tuner.render import header, primitives, render
from tuner.space import Problem, default_config
from tuner.standalone import export_standalone
from tuner.table import Device, kernel_id, write

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
