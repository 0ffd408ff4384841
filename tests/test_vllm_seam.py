"""The plugin and its backend on a package that has vLLM's recorded seams and nothing else; no GPU, no vLLM.

The package is written into a folder: metadata of a supported release, the registry, and a backend whose methods say
that they were called. What real releases do with it is tested in test_vllm_backend.py and test_vllm_plugin.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_vllm_versions import KEYWORDS
from tuner.vllm import seam, versions

if versions.installed() is not None:
    pytest.skip("vLLM is installed: its own backend is tested instead", allow_module_level=True)

ROOT = Path(__file__).parents[1]

REGISTRY = """
import enum
OVERRIDES = {}
class AttentionBackendEnum(enum.Enum):
    TURBOQUANT = "vllm.v1.attention.backends.turboquant_attn.TurboQuantAttentionBackend"
    def is_overridden(self): return self in OVERRIDES
    def get_path(self): return OVERRIDES.get(self, self.value)
def register_backend(member, path): OVERRIDES[member] = path
"""

BACKEND = f"""
CALLS = []
def triton_turboquant_decode_attention(**call):
    CALLS.append("kernel")
    return "theirs"
class TurboQuantAttentionBackend:
    @staticmethod
    def get_name(): return "TURBOQUANT"
    @staticmethod
    def get_impl_cls(): return TurboQuantAttentionImpl
    @staticmethod
    def get_builder_cls(): return TurboQuantMetadataBuilder
class TurboQuantMetadataBuilder:
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        self.layer_names = layer_names
class TurboQuantAttentionImpl:
    def __init__(self, num_heads, head_size, scale, num_kv_heads=None, alibi_slopes=None, sliding_window=None,
                 kv_cache_dtype="auto", logits_soft_cap=None, attn_type="decoder", kv_sharing_target_layer_name=None,
                 **kwargs):
        self._soa_store = kwargs.get("soa", False)
    def _prefill_attention(self, query, key, value, kv_cache, attn_metadata, Pi, centroids, PiT=None, layer=None):
        block_table, seq_lens, scale = attn_metadata.block_table, attn_metadata.seq_lens, 1.0
        mse_bits = key_packed_size = value_quant_bits = key_fp8 = norm_correction = None
        return triton_turboquant_decode_attention({", ".join(f"{k}={k}" for k in KEYWORDS)})
    def _decode_attention(self, query, kv_cache, attn_metadata, Pi, centroids, PiT=None, layer=None):
        CALLS.append("decode")
        return "theirs"
"""

PRELUDE = """
import logging, sys
from types import SimpleNamespace
import torch
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
from tuner.vllm import plugin
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
TQ = AttentionBackendEnum.TURBOQUANT
def say(*words): print("RESULT", *words)
"""

IMPL = """
from tuner.vllm import backend
from vllm.v1.attention.backends import turboquant_attn as upstream
def build(**changes):
    given = dict(num_heads=8, head_size=64, scale=0.1, num_kv_heads=2, kv_cache_dtype="turboquant_4bit_nc")
    return backend.WphTurboQuantImpl(**(given | changes))
meta = SimpleNamespace(block_table=torch.zeros(1, 1, dtype=torch.int32), max_seq_len=77,
                       seq_lens=torch.ones(1, dtype=torch.int32))
query, cache = torch.zeros(1, 8, 64), torch.zeros(1, 16, 2, 70, dtype=torch.uint8)
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    made = tmp_path / "site"
    attention = made / "vllm" / "v1" / "attention"
    (attention / "backends").mkdir(parents=True)
    for folder in (made / "vllm", made / "vllm" / "v1", attention, attention / "backends"):
        (folder / "__init__.py").write_text("")
    (attention / "backend.py").write_text(
        "import enum\nclass AttentionCGSupport(enum.Enum):\n"
        "    UNIFORM_SINGLE_TOKEN_DECODE = 1\n    UNIFORM_BATCH = 2\n"
    )
    (attention / "backends" / "registry.py").write_text(REGISTRY)
    (attention / "backends" / "turboquant_attn.py").write_text(BACKEND)
    describe(made, "0.24.0")
    return made


def describe(package: Path, version: str) -> None:
    info = package / "vllm-0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


def run(package: Path, code: str, **environment: str) -> tuple[list[str], str]:
    """(words of the RESULT lines, everything printed) of ``code`` in a process that finds ``package``."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("WPH_", "VLLM_"))}
    env |= {"PYTHONPATH": f"{package}{os.pathsep}{ROOT}", **environment}
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code], capture_output=True, text=True, env=env, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return results, done.stdout + done.stderr


def test_the_package_has_the_recorded_seams(package: Path) -> None:
    assert seam.objection((package / (seam.MODULE.replace(".", "/") + ".py")).read_text()) is None


def test_the_backend_is_registered_by_name_once_and_again(package: Path) -> None:
    code = """
plugin.register(); plugin.register()
say(TQ.get_path(), "tuner.vllm.backend" in sys.modules)
from tuner.vllm import diagnose
for name, check in diagnose.checks()[:3:2]:
    say(name, check().ok, check().detail)
"""
    words, log = run(package, code)
    assert words[0] == "tuner.vllm.backend.WphTurboQuantBackend False"
    assert words[1] == "vLLM True 0.24.0, supported"
    assert words[2].startswith("vLLM seam True") and "stepping aside" not in log


def test_another_plugin_keeps_the_backend(package: Path) -> None:
    code = """
register_backend(TQ, "some.other.Backend")
plugin.register()
say(TQ.get_path())
"""
    words, log = run(package, code)
    assert words == ["some.other.Backend"]
    assert "stepping aside" in log and "another plugin provides TURBOQUANT: some.other.Backend" in log


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("version", "broken in vLLM 0.25.1"),
        ("no module", "this vLLM has no vllm.v1.attention.backends.turboquant_attn"),
        ("another method", "has no TurboQuantAttentionImpl._decode_attention"),
        ("no registry", "ImportError"),
    ],
)
def test_what_the_plugin_does_not_know_is_left_alone(package: Path, change: str, reason: str) -> None:
    backends = package / "vllm" / "v1" / "attention" / "backends"
    source = backends / "turboquant_attn.py"
    if change == "version":
        describe(package, "0.26.0")
    elif change == "no module":
        source.unlink()
    elif change == "another method":
        source.write_text(source.read_text().replace("_decode_attention(self", "_decode(self"))
    code = "plugin.register()\nsay(TQ.get_path())\n"
    if change == "no registry":
        code = 'del sys.modules["vllm.v1.attention.backends.registry"].register_backend\n' + code
    words, log = run(package, code)
    assert words == [seam.MODULE + ".TurboQuantAttentionBackend"]
    assert log.count("stepping aside") == 1 and reason in log


def test_the_backend_hands_out_our_classes(package: Path) -> None:
    code = (
        IMPL
        + """
cls = backend.WphTurboQuantBackend
say(cls.get_name(), cls.get_impl_cls().__name__, cls.get_builder_cls()._cudagraph_support.name)
say(build().wph_layer.facts.describe(), build().wph_layer.reason)
say(build(sliding_window=512).wph_layer.reason)
say(build(soa=True).wph_layer.reason)
say(build(kv_cache_dtype="auto").wph_layer.reason)
"""
    )
    words, _ = run(package, code)
    assert words[:4] == [
        "TURBOQUANT WphTurboQuantImpl UNIFORM_SINGLE_TOKEN_DECODE",
        "head dim 64, 8/2 heads, turboquant_4bit_nc None",
        "it has sliding window of 512",
        "the cache is kept in AMD's layout",
    ]
    assert words[4].startswith("no kernel for cache format auto")


def test_what_our_layer_declines_runs_on_theirs(package: Path) -> None:
    code = (
        IMPL
        + """
impl = build()
say(impl._decode_attention(query, cache, meta, None, torch.zeros(16)), upstream.CALLS)
say(impl._prefill_attention(query, None, None, cache, meta, None, torch.zeros(16)), upstream.CALLS)
impl.wph_layer = None
say(impl._prefill_attention(query, None, None, cache, meta, None, torch.zeros(16)), upstream.CALLS)
"""
    )
    words, _ = run(package, code)
    assert words == ["theirs ['decode']", "theirs ['decode', 'kernel']", "theirs ['decode', 'kernel', 'kernel']"]


def test_what_our_layer_serves_never_reaches_theirs(package: Path) -> None:
    code = (
        IMPL
        + """
class Serving:
    def decode(self, query, kv_cache, block_table, seq_lens, centroids, context, tokens=None):
        return f"ours of {context}"
impl = build()
impl.wph_layer = Serving()
say(impl._decode_attention(query, cache, meta, None, None), upstream.CALLS)
say(impl._prefill_attention(query, None, None, cache, meta, None, None), upstream.CALLS)
say(upstream.triton_turboquant_decode_attention(query=query), upstream.CALLS)
backend.unhook()
say(impl._prefill_attention(query, None, None, cache, meta, None, None), upstream.CALLS)
backend.hook()
say(impl._prefill_attention(query, None, None, cache, meta, None, None))
"""
    )
    words, _ = run(package, code)
    assert words == [
        "ours of 77 []",
        "ours of 77 []",
        "theirs ['kernel']",  # called from outside a prefill of ours
        "theirs ['kernel', 'kernel']",
        "ours of 77",
    ]


def test_trouble_at_start_up_leaves_a_working_builder(package: Path) -> None:
    code = (
        IMPL
        + """
builder = backend.WphTurboQuantMetadataBuilder(None, ["layers.0"], None, torch.device("cpu"))
say(builder.layer_names)
"""
    )
    words, log = run(package, code)
    assert words == ["['layers.0']"]
    assert "vLLM's own TurboQuant kernels run: start-up failed: AttributeError" in log
