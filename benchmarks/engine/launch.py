"""Starts engines, one process each, and gathers what they wrote."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.engine.child import PROGRESS_FD
from benchmarks.engine.plan import UNCOMPRESSED_LAYERS, Engine
from benchmarks.grid.points import parse_shape

ROOT = Path(__file__).resolve().parents[2]
_IN_GRAPH = re.compile(r"wph: (\S+): batch (\d+) in a graph: ")
_OUR_STORE = re.compile(r"wph: store of \d+ layers?: table of ")
_LOADING = re.compile(r"wph: kernels of \d+ layers verified and loaded in ([\d.]+) s")
_WORTH_SAYING = re.compile(r"wph: (?!\S+: batch )|Graph capturing finished|[Cc]ompil\w+ takes|Model loading took")
_OWN_INSTEAD = re.compile(r"wph: (.*: vLLM's (?:kernel )?runs: .*)")
_CUT_BYTES = 1000
"""What is left of a file that is cut short."""
_STOP_S = 20
"""Time an engine gets to end after it was told to."""


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


def environment(engine: Engine, tables: Path, work: Path) -> dict[str, str]:
    """Of the engine's process: ours with the tables, everything else without the plugin, nobody on the network.

    ``ours_own_store`` keeps vLLM's store, ``damaged`` has the plugin with other files than this checkout's.
    """
    damaged = engine.kind == "damaged"
    package, tables = damage(tables, work) if damaged else (ROOT, tables)
    env = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_TUNED_CONFIG_FOLDER": str(tables),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "WPH_LOG": "debug",
        "PYTHONSAFEPATH": "1",  # not the package of the folder that the command is run in
    }
    env.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    for switch in ("WPH_DISABLE", "WPH_STORE"):
        env.pop(switch, None)
    if not (engine.kind.startswith("ours") or damaged):
        env["WPH_DISABLE"] = "1"
    if engine.kind == "ours_own_store":
        env["WPH_STORE"] = "0"
    discovered = [] if installed() else [str(entry_point(work))]
    path = [str(package), str(ROOT), *discovered, os.environ.get("PYTHONPATH", "")]
    return env | {"PYTHONPATH": os.pathsep.join(p for p in path if p)}


def damage(tables: Path, work: Path) -> tuple[Path, Path]:
    """Copies of the package's folder and of ``tables`` in which every cubin is cut short."""
    package, folder = work / "damaged", work / "damaged" / "tables"
    shutil.copytree(ROOT / "tuner", package / "tuner", dirs_exist_ok=True)
    shutil.copytree(tables, folder, dirs_exist_ok=True)
    for cubin in package.rglob("*.cubin"):
        cubin.write_bytes(cubin.read_bytes()[:_CUT_BYTES])
    return package, folder


def installed() -> bool:
    return any(p.name == "wph" for p in metadata.entry_points(group="vllm.general_plugins"))


def entry_point(work: Path) -> Path:
    """A folder with what pip would write for this checkout, so that vLLM discovers the plugin in it."""
    info = work / "site" / "wph_tuner-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: wph-tuner\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nwph = tuner.vllm.plugin:register\n")
    return info.parent


def gather_tables(source: Path | None, work: Path) -> Path:
    """A folder with ``source``'s tables and default kernels."""
    folder = work / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    if source is not None:
        shutil.copytree(source, folder, dirs_exist_ok=True)
    return folder


def add_default_kernels(folder: Path, work: Path, shape: str, cache_format: str, arch: str) -> None:
    """Compiles those that ``folder`` lacks. Raises TunerError."""
    from tuner.space import Problem
    from tuner.vllm import defaults

    parsed = parse_shape(shape)
    problem = Problem("decode", parsed.head_dim, parsed.gqa, cache_format)
    if not (folder / defaults.file_name(problem, arch)).is_file():
        for made in defaults.build_defaults([problem], arch, work / "build"):
            defaults.write(made, folder)


def launch(engine: Engine, work: Path, checkpoint: Path, tables: Path, timeout_s: float) -> dict[str, Any] | None:
    """What the engine did, of this and earlier processes, complete or not; None where it did nothing."""
    out = work / f"{engine.key}.json"
    if not is_complete(out):
        log = out.with_suffix(".log")
        _run(engine, out, log, checkpoint, tables, timeout_s)
        text = log.read_text(errors="replace")
        for line in dict.fromkeys(part for part in text.splitlines() if _WORTH_SAYING.search(part)):
            say(f"  {line}")
        if out.is_file():
            said = {"used_ours": used_ours(text, engine), "our_store": bool(_OUR_STORE.search(text))}
            said |= {"plugin_s": sum(map(float, _LOADING.findall(text)))}
            said |= {"own_instead": runs_instead(text)}
            out.write_text(json.dumps(json.loads(out.read_text()) | said))
        if not is_complete(out):
            say(f"{engine.key}: not complete; the log ends with\n" + "\n".join(text.splitlines()[-25:]))
    if not out.is_file():
        return None
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def is_complete(out: Path) -> bool:
    return out.is_file() and bool(json.loads(out.read_text())["complete"])


def used_ours(log: str, engine: Engine) -> bool:
    """Whether the engine's log says that our kernels went into every graph of every compressed layer."""
    captured = set(_IN_GRAPH.findall(log))
    layers = engine.model.layers - UNCOMPRESSED_LAYERS
    whole = all(len({name for name, b in captured if b == str(batch)}) >= layers for batch in engine.captured)
    return whole and "vLLM's kernel runs from here on" not in log


def runs_instead(log: str) -> list[str]:
    """What an engine's log says of vLLM's kernels that run in the place of ours because of what is wrong with ours."""
    return sorted(set(_OWN_INSTEAD.findall(log)))


def _run(engine: Engine, out: Path, log: Path, checkpoint: Path, tables: Path, timeout_s: float) -> None:
    spec = out.with_suffix(".spec")
    spec.write_text(json.dumps(asdict(engine)))
    command = [sys.executable, "-m", "benchmarks.engine", str(spec), str(checkpoint), str(out)]
    say(f"{engine.key}: starting, log in {log}")
    progress = os.dup(sys.stdout.fileno())
    with log.open("w") as file:
        child = subprocess.Popen(
            command,
            stdout=file,
            stderr=file,
            env=environment(engine, tables, out.parent) | {PROGRESS_FD: str(progress)},
            pass_fds=(progress,),
            start_new_session=True,
        )
        os.close(progress)
        try:
            child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            say(f"{engine.key}: stopped after {timeout_s:.0f} s; the same command goes on from here")
            os.killpg(child.pid, signal.SIGTERM)
            try:
                child.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
