"""Which vLLM releases the plugin takes part in, and the seams it relies on, without vLLM installed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tuner.vllm import seam, versions

METHODS = {
    "TurboQuantAttentionBackend": {"get_name": "", "get_impl_cls": "", "get_builder_cls": ""},
    "TurboQuantMetadataBuilder": {"__init__": "self, kv_cache_spec, layer_names, vllm_config, device"},
    "TurboQuantAttentionImpl": {
        "__init__": "self, num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype, "
        "logits_soft_cap, attn_type, kv_sharing_target_layer_name, **kwargs",
        "_prefill_attention": "self, query, key, value, kv_cache, attn_metadata, Pi, centroids, PiT=None, layer=None",
        "_decode_attention": "self, query, kv_cache, attn_metadata, Pi, centroids, PiT=None, layer=None",
    },
}
KEYWORDS = [
    *("query", "kv_cache", "block_table", "seq_lens", "Pi", "centroids", "scale", "mse_bits", "key_packed_size"),
    *("value_quant_bits", "key_fp8", "norm_correction", "PiT"),
]


def backend_source() -> str:
    """A module with the recorded seams and nothing else."""
    lines = []
    for name, methods in METHODS.items():
        lines.append(f"class {name}:")
        for method, parameters in methods.items():
            body = "pass"
            if method == "_prefill_attention":
                body = f"{seam.CONTINUATION}({', '.join(f'{k}={k}' for k in KEYWORDS)})"
            lines.append(f"    def {method}({parameters}): {body}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    "version",
    ["0.20.2", "0.22.0", "0.22.1", "0.23.0", "0.24.0", "0.24.0+cu130", "0.25.0", "0.27.0", "0.30.1", "0.33.0"],
)
def test_supported_releases(version: str) -> None:
    assert versions.objection(version) is None


@pytest.mark.parametrize(
    ("version", "word"),
    [
        ("0.25.1", "broken"),
        ("0.26.0", "broken"),
        ("0.20.0", "not known"),
        ("0.21.0", "not known"),
        ("0.34.0", "not known"),
        ("1.24.0", "not known"),
        ("0.28.0rc1", "no release"),
        ("0.24.1.dev3+gabc", "no release"),
        ("nonsense", "no release"),
        (None, "not installed"),
    ],
)
def test_other_versions_are_left_alone_with_a_reason(version: str | None, word: str) -> None:
    assert word in (versions.objection(version) or "")


def test_recorded_seams_are_accepted() -> None:
    assert seam.objection(backend_source()) is None


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("Pi, centroids, PiT=None, layer=None): pass", "Pi, centroids): pass", "_decode_attention takes"),
        ("_decode_attention", "_decode", "has no TurboQuantAttentionImpl._decode_attention"),
        ("seq_lens=seq_lens", "lengths=seq_lens", "passes no seq_lens"),
        (seam.CONTINUATION, "another_kernel", "passes no query"),
        ("vllm_config, device", "vllm_config", "TurboQuantMetadataBuilder.__init__ takes"),
        ("class TurboQuantAttentionImpl", "class (", "does not parse"),
    ],
)
def test_another_backend_is_refused(old: str, new: str, word: str) -> None:
    source = backend_source()
    assert old in source
    assert word in (seam.objection(source.replace(old, new)) or "")


def test_every_supported_minor_was_read() -> None:
    read = {tuple(map(int, version.split(".")[:2])) for version in seam.facts()["read_in"]}
    assert read == {(0, 20), (0, 22), (0, 23), (0, 24), (0, 25), *((0, minor) for minor in range(27, 34))}
    assert all(versions.objection(version) is None for version in seam.facts()["read_in"])


def unpacked() -> dict[str, Path]:
    """Version -> its backend's source, from $WPH_VLLM_WHEELS/<version>/vllm/..."""
    root = os.environ.get("WPH_VLLM_WHEELS")
    place = seam.MODULE.replace(".", "/") + ".py"
    return {p.name: p / place for p in Path(root).iterdir() if (p / place).is_file()} if root else {}


@pytest.mark.parametrize("version", sorted(seam.facts()["read_in"]))
def test_seam_of_released_wheel(version: str) -> None:
    path = unpacked().get(version)
    if path is None:
        pytest.skip("WPH_VLLM_WHEELS names no folder with <version>/vllm/... of this release")
    source = path.read_text()
    assert seam.objection(source) is None
    line = seam.facts()["read_in"][version]["decode_seam_line"]
    assert "def _decode_attention" in source.splitlines()[line - 1]
