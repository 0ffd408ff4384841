"""The verbs that take dispatch tables: verify, install, explain, export, report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import make_table, refused, tune


def test_verify_accepts_what_was_written(tmp_path: Path) -> None:
    path = make_table(tmp_path)
    for argument in (path, tmp_path):
        done = tune("verify", argument, cwd=tmp_path)
        assert done.returncode == 0 and done.stdout.split() == ["ok", str(path)]


@pytest.mark.parametrize("damage", ["truncated", "schema", "hash", "climbs"])
def test_verify_and_install_refuse_broken_tables(damage: str, tmp_path: Path) -> None:
    path = make_table(tmp_path / "tables")
    cubin = next((tmp_path / "tables/kernels").iterdir())
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:300])
    elif damage == "hash":
        cubin.write_bytes(b"another cubin")
    else:
        data = json.loads(path.read_text())
        if damage == "schema":
            data["schema_version"] = 99
        else:
            kernel = data["kernels"].pop(cubin.stem)
            data["kernels"]["../../" + cubin.stem] = kernel
        path.write_text(json.dumps(data))
    refused(tune("verify", path, cwd=tmp_path), 1, "1 of 1 tables")
    folder = tmp_path / "vllm"
    refused(tune("install", path, cwd=tmp_path, VLLM_TUNED_CONFIG_FOLDER=str(folder)), 1)
    assert not folder.exists()


def test_install_dry_run_then_install_then_uninstall(tmp_path: Path) -> None:
    path = make_table(tmp_path / "tables")
    folder = tmp_path / "vllm"
    folder.mkdir()
    (folder / "E=8,N=4096,device_name=NVIDIA_GB10.json").write_text("{}")
    env = {"VLLM_TUNED_CONFIG_FOLDER": str(folder)}

    done = tune("install", path, "--dry-run", cwd=tmp_path, **env)
    assert done.returncode == 0 and "would write" in done.stdout
    assert len(list(folder.iterdir())) == 1

    done = tune("install", path, cwd=tmp_path, **env)
    assert done.returncode == 0 and "wrote" in done.stdout
    assert (folder / path.name).read_bytes() == path.read_bytes()
    assert tune("verify", folder / path.name, cwd=tmp_path).returncode == 0

    # Another context joins the one that is there.
    other = make_table(tmp_path / "other", context=65536)
    assert "merged" in tune("install", other, cwd=tmp_path, **env).stdout
    merged = json.loads((folder / path.name).read_text())
    assert [e["timing"]["context"] for e in merged["by_batch_and_context"]] == [4096, 65536]

    refused(tune("install", path, "--uninstall", cwd=tmp_path, **env), 2, "--uninstall", "no tables")
    assert (folder / path.name).is_file()
    assert "would remove" in tune("install", "--uninstall", "--dry-run", cwd=tmp_path, **env).stdout
    assert tune("install", "--uninstall", cwd=tmp_path, **env).returncode == 0
    assert [p.name for p in folder.iterdir()] == ["E=8,N=4096,device_name=NVIDIA_GB10.json"]
    assert "nothing of ours" in tune("install", "--uninstall", cwd=tmp_path, **env).stdout


def test_install_of_two_tables_of_one_name_keeps_the_buckets_of_both(tmp_path: Path) -> None:
    paths = [make_table(tmp_path / name, context=context) for name, context in (("a", 4096), ("b", 65536))]
    folder = tmp_path / "vllm"
    done = tune("install", *paths, cwd=tmp_path, VLLM_TUNED_CONFIG_FOLDER=str(folder))
    assert done.returncode == 0 and done.stdout.count("wrote") == 1
    found = json.loads((folder / paths[0].name).read_text())["by_batch_and_context"]
    assert [e["timing"]["context"] for e in found] == [4096, 65536]


def test_install_without_the_variable_uses_vllms_own_folder(tmp_path: Path) -> None:
    path = make_table(tmp_path / "tables")
    done = tune("install", path, cwd=tmp_path, VLLM_CONFIG_ROOT=str(tmp_path / "config"))
    assert done.returncode == 0
    assert (tmp_path / "config/tuned" / path.name).is_file()


def test_install_refuses_predictions_unless_allowed(tmp_path: Path) -> None:
    path = make_table(tmp_path / "tables", evidence="predicted")
    env = {"VLLM_TUNED_CONFIG_FOLDER": str(tmp_path / "vllm")}
    refused(tune("install", path, cwd=tmp_path, **env), 1, "predicted", "--allow-predicted")
    assert not (tmp_path / "vllm").exists()
    assert tune("install", path, "--allow-predicted", cwd=tmp_path, **env).returncode == 0


def test_explain_names_kernel_limit_and_evidence(tmp_path: Path) -> None:
    path = make_table(tmp_path)
    done = tune("explain", path, "--batch", 1, "--context", 4096, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "measured" in done.stdout and "75%" in done.stdout


def test_export_has_the_source_only_where_it_is_the_kernels(tmp_path: Path) -> None:
    path = make_table(tmp_path / "fresh")
    done = tune("export", path, "--to", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (source,) = (tmp_path / "out").rglob("*.cu")
    assert "wph_decode" in source.read_text()

    stale = make_table(tmp_path / "stale", digest="0" * 64)
    done = tune("export", stale, "--to", tmp_path / "out2", cwd=tmp_path)
    assert done.returncode == 0 and "another version" in done.stdout
    assert not list((tmp_path / "out2").rglob("*.cu"))


def test_report_on_the_terminal_and_as_a_page(tmp_path: Path) -> None:
    path = make_table(tmp_path)
    done = tune("report", path, cwd=tmp_path)
    assert done.returncode == 0 and "measured" in done.stdout and "10.0 x" in done.stdout
    assert tune("report", path, "--html", tmp_path / "r/page.html", cwd=tmp_path).returncode == 0
    assert "<svg" in (tmp_path / "r/page.html").read_text()


def test_tables_are_found_in_build_by_default(tmp_path: Path) -> None:
    path = make_table(tmp_path / "build/tables")
    assert path.name in tune("verify", cwd=tmp_path).stdout


# --- space, doctor ----------------------------------------------------------------------------------------------------
