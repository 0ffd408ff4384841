"""The dispatch table: round trip, refusal of what is damaged, atomic writes, lookup, merge, explanation."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest

from tuner.geometry import dynamic_shared_bytes
from tuner.space import Problem, default_config, seed_config
from tuner.table import (
    BatchEntry,
    BucketEntry,
    Choice,
    Device,
    Kernel,
    Provenance,
    RunnerUp,
    Table,
    TableError,
    Timing,
    export,
    find,
    kernel_id,
    lookup,
    merge,
    read,
    read_cubin,
    verify,
    write,
)
from tuner.table.install import TABLE_PATTERN
from tuner.table.schema import to_json
from tuner.table.store import PACKAGE_TABLES

PROBLEM = Problem("decode", 256, 16, "turboquant_4bit_nc")
CUBINS = (b"\x7fELF first cubin", b"\x7fELF second cubin")
NAME = "turboquant_decode,head_dim=256,gqa=16,device_name=NVIDIA_GB10,cache_dtype=turboquant_4bit_nc.json"


def kernel(number: int) -> Kernel:
    config = (default_config, seed_config)[number](PROBLEM)
    sha = hashlib.sha256(CUBINS[number]).hexdigest()
    shared = dynamic_shared_bytes(config)
    return Kernel(kernel_id("sm_121", sha), config.params, "ab" * 32, sha, "sm_121", 100 + number, shared, 0)


K0, K1 = kernel(0), kernel(1)
IDS = {K0.id: CUBINS[0], K1.id: CUBINS[1]}


def timing(context: int, time_us: float, ragged: bool = False) -> Timing:
    baselines = {"triton": 10 * time_us, "fa3_bf16": None}
    return Timing(context, ragged, time_us, 0.99 * time_us, 1.01 * time_us, 0.5 * time_us, baselines, "memory")


def bucket(
    batch: int, context: int, k: Kernel, splits: int, time_us: float = 20.0, ragged: bool = False
) -> BucketEntry:
    return BucketEntry(batch, k.id, splits, timing(context, time_us, ragged), RunnerUp(K1.params, 3, 1.25))


def make_table(**changes: object) -> Table:
    table = Table(
        problem=PROBLEM,
        kv_heads=2,
        device=Device("NVIDIA GB10", "sm_121", 48),
        provenance=Provenance(
            "2026-01-02T03:04:05Z", 7, nvcc="13.0.88", optuna="5.0.0", peers=(("fa3_bf16", "0123456789abcdef"),)
        ),
        evidence="predicted",
        kernels=(K0, K1),
        by_batch=tuple(
            BatchEntry(b, (K0 if b < 8 else K1).id, 64 // b, 1.03, 1.01, (timing(1024, 5.0), timing(65536, 90.0)))
            for b in (1, 8, 64)
        ),
        by_batch_and_context=(
            bucket(1, 1024, K0, 11),
            bucket(1, 65536, K1, 12),
            bucket(8, 1024, K0, 13),
            bucket(8, 65536, K1, 14),
            bucket(64, 1024, K0, 15),
            bucket(64, 65536, K1, 16),
            bucket(8, 65536, K0, 17, ragged=True),
        ),
    )
    return replace(table, **changes)  # type: ignore[arg-type]


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    return write(make_table(), tmp_path, IDS)


def damage(path: Path, **changes: object) -> Path:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def refused(path: Path, words: str) -> None:
    """Refused with one clear line that has ``words``, by read and verify alike."""
    with pytest.raises(TableError) as error:
        read(path)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert any(words in line for line in verify(path))


def test_round_trip(stored: Path) -> None:
    assert stored.name == NAME == make_table().file_name
    assert read(stored) == make_table()
    assert verify(stored) == ()
    assert read_cubin(stored, read(stored), K1.id) == CUBINS[1]
    assert json.loads(stored.read_text())["by_batch"]["8"]["timings"][0]["limit_share"] == 0.5


def test_leaves_nothing_but_the_table_and_its_cubins(stored: Path) -> None:
    files = {str(p.relative_to(stored.parent)) for p in stored.parent.rglob("*") if p.is_file()}
    assert files == {NAME, f"kernels/{K0.id}.cubin", f"kernels/{K1.id}.cubin"}


@pytest.mark.parametrize("cut", [0, 1, 100, 2000, -2])
def test_truncated(stored: Path, cut: int) -> None:
    stored.write_bytes(stored.read_bytes()[:cut])
    refused(stored, "not valid JSON")


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe", b"[" * 200_000, b"NaN", b'{"a":1,"a":2}', b'{"schema_version": ' + b"9" * 5000 + b"}"],
)
def test_not_json(stored: Path, content: bytes) -> None:
    stored.write_bytes(content)
    with pytest.raises(TableError):
        read(stored)


@pytest.mark.parametrize("version", [0, 2, "1", 1.0, True, None])
def test_another_schema_version(stored: Path, version: object) -> None:
    refused(damage(stored, schema_version=version), "schema version")


def test_wrong_arch(stored: Path) -> None:
    assert read(stored, arch="sm_121").device.arch == "sm_121"
    with pytest.raises(TableError, match="is for sm_121: expected a table for sm_90"):
        read(stored, arch="sm_90")


def test_kernel_of_another_arch(stored: Path) -> None:
    device = json.loads(stored.read_text())["device"] | {"arch": "sm_90"}
    refused(damage(stored, device=device), "expected sm_90")


def test_wrong_hash(stored: Path) -> None:
    cubin = stored.parent / "kernels" / f"{K0.id}.cubin"
    cubin.write_bytes(CUBINS[0] + b"!")
    refused(stored, "has SHA-256")
    assert read(stored, cubins=False) == make_table()


def test_missing_cubin(stored: Path) -> None:
    (stored.parent / "kernels" / f"{K1.id}.cubin").unlink()
    refused(stored, "No such file")


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "sm_121-../../../etc/pass", "/etc/passwd", "sm_121-0123456789abcdef\n"]
)
def test_kernel_id_that_climbs_out(stored: Path, name: str) -> None:
    data = to_json(make_table())
    data["kernels"] = {name: data["kernels"][K0.id]}
    stored.write_text(json.dumps(data))
    refused(stored, "kernels")


@pytest.mark.parametrize("what", ["table", "cubin", "folder"])
def test_links_are_not_followed(stored: Path, what: str) -> None:
    kernels = stored.parent / "kernels"
    link = {"table": stored, "cubin": kernels / f"{K0.id}.cubin", "folder": kernels}[what]
    elsewhere = stored.parent / "elsewhere"
    link.rename(elsewhere)
    link.symlink_to(elsewhere)
    refused(stored, "link")


def test_named_pipe_does_not_hang(stored: Path) -> None:
    stored.unlink()
    os.mkfifo(stored)
    refused(stored, "not a plain file")


def test_absurd_size(stored: Path) -> None:
    with stored.open("ab") as file:
        file.truncate(1 << 30)
    refused(stored, "expected at most")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("kv_heads",), 0),
        (("problem", "head_dim"), 96),
        (("problem", "head_dim"), 256.0),
        (("problem", "cache_format"), "turboquant_unknown"),
        (("evidence",), "guessed"),
        (("by_batch", "1", "kernel"), "sm_121-0123456789abcdef"),
        (("by_batch", "1", "splits"), 10**9),
        (("by_batch", "1", "timings", 0, "time_us"), -1),
        (("by_batch", "1", "timings", 0, "time_us"), 1e300),
        (("by_batch_and_context", 0, "timing", "extra"), 1),
        (("kernels", K0.id, "params", "warps"), 3),
        (("kernels", K0.id, "params", "no_such_axis"), 1),
        (("kernels", K0.id, "registers"), True),
        (("provenance", "date"), "yesterday"),
    ],
)
def test_broken_field(stored: Path, place: tuple[str | int, ...], value: object) -> None:
    data = json.loads(stored.read_text())
    spot = data
    for step in place[:-1]:
        spot = spot[step]
    spot[place[-1]] = value
    stored.write_text(json.dumps(data))
    with pytest.raises(TableError) as error:
        read(stored)
    assert "\n" not in str(error.value)


def test_bucket_that_stands_twice(tmp_path: Path) -> None:
    twice = make_table(by_batch_and_context=(bucket(1, 1024, K0, 1), bucket(1, 1024, K1, 2)))
    with pytest.raises(TableError, match="stands twice"):
        write(twice, tmp_path, IDS)
    assert not list(tmp_path.iterdir())


def test_write_refuses_wrong_cubins_and_keeps_the_old_table(stored: Path) -> None:
    before = stored.read_bytes()
    newer = make_table(kv_heads=4)
    with pytest.raises(TableError, match="no cubin"):
        write(newer, stored.parent, {K0.id: CUBINS[0]})
    with pytest.raises(TableError, match="SHA-256"):
        write(newer, stored.parent, IDS | {K1.id: b"other"})
    assert stored.read_bytes() == before and verify(stored) == ()


def test_write_where_it_cannot(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TableError, match="cannot write"):
        write(make_table(), tmp_path / "file", IDS)


def test_verify_names_every_problem(stored: Path) -> None:
    for cubin in (stored.parent / "kernels").iterdir():
        cubin.write_bytes(b"")
    moved = stored.rename(stored.with_name("other.json"))
    assert len(verify(moved)) == 3


@pytest.mark.parametrize("device", ["NVIDIA H200", "NVIDIA H200 NVL"])
def test_a_family_shares_its_tables(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = NAME.replace("NVIDIA_GB10", "NVIDIA_H200")
    assert make_table(device=Device(device, "sm_90", 132)).file_name == name
    (tmp_path / name).touch()
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    assert find(PROBLEM, device) == tmp_path / name


def test_find_prefers_the_users_folder(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(stored.parent))
    assert find(PROBLEM, "NVIDIA GB10") == stored
    assert find(PROBLEM, "NVIDIA Imaginary 1") is None
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(stored.parent / "none"))
    assert find(PROBLEM, "NVIDIA GB10") != stored


def test_merge_takes_the_newer_and_keeps_the_rest() -> None:
    old = make_table()
    new = make_table(
        provenance=replace(old.provenance, date="2026-02-01T00:00:00Z", seed=8),
        kernels=(K0,),
        by_batch=(replace(old.by_batch[0], splits=5),),
        by_batch_and_context=(bucket(1, 1024, K0, 99), bucket(2, 1024, K0, 98)),
    )
    for merged in (merge(old, new), merge(new, old)):
        assert [e.splits for e in merged.by_batch] == [5, 8, 1]
        assert lookup(merged, 1, 1024) == Choice(K0.id, 99)
        assert lookup(merged, 2, 1024) == Choice(K0.id, 98)
        assert lookup(merged, 8, 65536) == Choice(K1.id, 14)
        assert merged.provenance.seed == 8 and "seed 7" in merged.provenance.history[0]
        assert set(merged.kernels) == {K0, K1}


def test_merge_compares_choices_for_all_contexts_with_the_buckets_of_the_result() -> None:
    old = make_table()
    faster = replace(
        old,
        provenance=replace(old.provenance, date="2026-02-01T00:00:00Z"),
        by_batch=(),
        by_batch_and_context=(bucket(1, 1024, K0, 11, 4.0), bucket(8, 65536, K1, 14, 100.0)),
    )
    one, eight, sixty_four = merge(old, faster).by_batch
    # 5 and 90 us, where the best of each context is 4 and 20, 20 and 100, 20 and 20.
    assert one.worst_ratio == 4.5 and one.mean_ratio == pytest.approx((1.25 * 4.5) ** 0.5)
    assert eight.worst_ratio == eight.mean_ratio == 1.0
    assert sixty_four.worst_ratio == 4.5 and sixty_four.mean_ratio == pytest.approx(4.5**0.5)


def test_choices_for_all_contexts_of_the_package_are_compared_with_its_buckets() -> None:
    compared = 0
    for path in PACKAGE_TABLES.glob(TABLE_PATTERN):
        table = read(path, cubins=False)
        best = {(e.batch, e.timing.context, e.timing.ragged): e.timing.time_us for e in table.by_batch_and_context}
        for entry in table.by_batch:
            ratios = [max(1.0, t.time_us / best[entry.batch, t.context, t.ragged]) for t in entry.timings]
            assert entry.worst_ratio == pytest.approx(max(ratios)), (path.name, entry.batch)
            assert entry.mean_ratio == pytest.approx(math.prod(ratios) ** (1 / len(ratios))), (path.name, entry.batch)
            compared += 1
    assert compared > 300


def test_merge_never_mixes_evidence() -> None:
    predicted, measured = make_table(), make_table(evidence="measured", by_batch=make_table().by_batch[:1])
    assert merge(predicted, measured) is measured
    assert merge(measured, predicted) is measured


@pytest.mark.parametrize(
    "change",
    [
        {"kv_heads": 4},
        {"problem": Problem("decode", 128, 4, "turboquant_4bit_nc")},
        {"device": Device("X", "sm_90", 1)},
    ],
)
def test_merge_refuses_unlike_tables(change: dict[str, object]) -> None:
    with pytest.raises(TableError, match="cannot merge"):
        merge(make_table(), make_table(**change))


def test_export_copies_and_checks(stored: Path, tmp_path: Path) -> None:
    exported = export(stored, tmp_path / "out", {K0.id: "// text"})
    assert read(exported) == make_table()
    assert (tmp_path / "out" / "sources" / f"{K0.id}.cu").read_text() == "// text"
    with pytest.raises(TableError, match="does not have"):
        export(stored, tmp_path / "out2", {"other": ""})


def test_import_stays_light() -> None:
    import subprocess
    import sys

    code = "import sys, tuner.table; print(sorted({'torch','triton','optuna','cupy','jinja2'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_kernel_of_another_version_is_refused(stored: Path) -> None:
    """Shared memory is laid out when a kernel is compiled: launched with less, it would write past the end."""
    kernels = json.loads(stored.read_text())["kernels"]
    kernels[K0.id]["shared_bytes"] += 128
    with pytest.raises(TableError, match=r"made by another version of this package; make it anew"):
        read(damage(stored, kernels=kernels))
