"""The plugin in a real, installed vLLM: discovered, replacing one class by name, harmless when anything is broken.

Every test runs a process of its own: vLLM keeps its registry and its plugins per process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

import pytest

from tuner.vllm import versions

ROOT = Path(__file__).resolve().parent.parent
OURS = "tuner.vllm.backend.WphTurboQuantBackend"
THEIRS = "vllm.v1.attention.backends.turboquant_attn.TurboQuantAttentionBackend"
PRELUDE = """
import sys
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.plugins import load_general_plugins
TQ = AttentionBackendEnum.TURBOQUANT
"""

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(util.find_spec("vllm") is None, reason="vLLM is not installed (0.24.0 is enough)"),
]


def run(code: str, *, package: Path = ROOT, **environment: str) -> tuple[list[str], str]:
    """Printed words and the log of a process that has vLLM and the package in ``package``."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("WPH_", "VLLM_"))}
    env |= {"PYTHONPATH": str(package), **environment}
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code], capture_output=True, text=True, env=env, cwd=package, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    words = [line.removeprefix("RESULT ") for line in lines if line.startswith("RESULT ")]
    return words, done.stdout + done.stderr


def supported() -> None:
    reason = versions.objection(versions.installed())
    if reason:
        pytest.skip(f"the installed vLLM is not supported: {reason}")


def entry_point() -> None:
    if not [p for p in metadata.entry_points(group="vllm.general_plugins") if p.name == "wph"]:
        pytest.skip("this package is not pip-installed beside vLLM, so its entry point does not exist")


def test_vllm_discovers_the_plugin_and_its_class_is_replaced_and_restored() -> None:
    supported()
    entry_point()
    code = f"""
load_general_plugins()
import torch
print("RESULT", TQ.get_path(), torch.cuda.is_initialized(), "cupy_backends" in sys.modules)
cls = TQ.get_class()
print("RESULT", cls.__module__ + "." + cls.__name__, cls.get_name(), torch.cuda.is_initialized())
from tuner.vllm import plugin
plugin.register()
TQ.clear_override()
print("RESULT", TQ.get_path())
assert TQ.get_path() == {THEIRS!r}
"""
    words, _ = run(code)
    assert words == [f"{OURS} False False", f"{OURS} TURBOQUANT False", THEIRS]


def test_disabled_by_the_environment() -> None:
    entry_point()
    words, log = run('load_general_plugins(); print("RESULT", TQ.get_path())', WPH_DISABLE="1")
    assert words == [THEIRS]
    assert log.count("stepping aside") == 1 and "WPH_DISABLE is set" in log


def test_left_out_by_vllm_plugins() -> None:
    words, log = run('load_general_plugins(); print("RESULT", TQ.get_path())', VLLM_PLUGINS="another")
    assert words == [THEIRS] and "wph:" not in log


def test_another_plugin_keeps_the_backend() -> None:
    code = """
from tuner.vllm import plugin
register_backend(TQ, "some.other.Backend")
plugin.register()
print("RESULT", TQ.get_path())
"""
    words, log = run(code)
    assert words == ["some.other.Backend"]
    assert "some.other.Backend" in log.split("stepping aside")[1].splitlines()[0]


def test_an_unsupported_version_is_left_alone() -> None:
    code = """
from tuner.vllm import plugin, versions
versions.installed = lambda: "0.26.0"
plugin.register(); plugin.register()
print("RESULT", TQ.get_path())
"""
    words, log = run(code)
    assert words == [THEIRS]
    assert log.count("stepping aside") == 1 and "broken in vLLM 0.25.1 and 0.26" in log


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            "seam.facts()['methods']['TurboQuantAttentionImpl._decode_attention'].append('new')",
            "_decode_attention takes",
        ),
        ("seam.facts()['methods']['TurboQuantAttentionImpl.gone'] = []", "has no TurboQuantAttentionImpl.gone"),
        ("seam.facts()['continuation_keywords'].append('new')", "passes no new"),
        ("seam.MODULE = 'vllm.v1.attention.backends.gone'", "this vLLM has no vllm.v1.attention.backends.gone"),
        ("del sys.modules['vllm.v1.attention.backends.registry'].register_backend", "ImportError"),
    ],
)
def test_a_vllm_that_looks_otherwise_is_left_alone(change: str, reason: str) -> None:
    supported()
    words, log = run(f"""
from tuner.vllm import plugin, seam
{change}
plugin.register(); plugin.register()
print("RESULT", TQ.get_path())
""")
    assert words == [THEIRS]
    assert log.count("stepping aside") == 1 and reason in log


def test_any_file_of_ours_may_be_missing_or_corrupt(tmp_path: Path) -> None:
    """With each file deleted, then filled with rubbish, vLLM still loads a working TURBOQUANT backend."""
    supported()
    copy = tmp_path / "site"
    shutil.copytree(ROOT / "tuner", copy / "tuner", ignore=shutil.ignore_patterns("__pycache__"))
    code = f"""
import os, traceback
import torch
from importlib import metadata
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.v1.attention.backends import turboquant_attn
sys.dont_write_bytecode = True
point = metadata.EntryPoint("wph", "tuner.vllm.plugin:register", "vllm.general_plugins")
config = VllmConfig(device_config=DeviceConfig("cpu"))
def attempt():
    try:  # as vLLM loads plugins: a module that cannot be imported is logged, what it registers is called bare
        register = point.load()
    except Exception:
        register = lambda: None
    register()
    backend = TQ.get_class()
    with set_current_vllm_config(config):
        impl = backend.get_impl_cls()(32, 128, 0.1, 8, None, None, "turboquant_4bit_nc")
    assert backend.get_name() == "TURBOQUANT" and impl.num_kv_heads == 8
attempt()
used = [m.__file__ for n, m in list(sys.modules.items()) if n.split(".")[0] == "tuner" and m.__file__]
folder = os.path.dirname(sys.modules["tuner.vllm"].__file__)
used = sorted({{*used, *(os.path.join(folder, name) for name in os.listdir(folder))}})
used = [path for path in used if os.path.isfile(path)]
TQ.clear_override()
for name in [n for n in sys.modules if n.split(".")[0] == "tuner"]:
    del sys.modules[name]  # every child imports the package afresh, everything else is there already
ops = sys.modules["vllm.v1.attention.ops.triton_turboquant_decode"]
turboquant_attn.triton_turboquant_decode_attention = ops.triton_turboquant_decode_attention
assert len(used) > 25 and all(path.startswith({str(copy)!r}) for path in used), used
for path in used:
    good = open(path, "rb").read()
    for bad in (None, b"def broken(:\\n") if path.startswith(folder) else (b"raise RuntimeError('broken')\\n",):
        os.unlink(path)
        if bad is not None:
            open(path, "wb").write(bad)
        child = os.fork()
        if child == 0:
            try:
                attempt()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        open(path, "wb").write(good)
        if status:
            print("RESULT", path, bad)
print("RESULT done")
"""
    words, log = run(code, package=copy)
    assert words == ["done"], log[-4000:]
