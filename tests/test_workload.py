"""tuner.workload: buckets, presets, and models read from Hugging Face configurations."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tuner.errors import UsageError
from tuner.formats import slot_layout
from tuner.workload import (
    PRESETS,
    Bucket,
    Shape,
    cache_bytes,
    default_buckets,
    default_shape,
    default_workload,
    load_model,
)
from tuner.workload.huggingface import SLIDING

CONFIGS = Path(__file__).parent / "configs"
PLAIN = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 4}


def load(tmp_path: Path, config: Any) -> tuple[tuple[Shape, int], ...]:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return load_model(path).shapes


@pytest.mark.parametrize("name", PRESETS)
def test_preset_equals_its_configuration(name: str) -> None:
    assert load_model(name) is PRESETS[name]
    read = load_model(CONFIGS / f"{name}.json")
    assert (read.name, read.shapes, read.buckets) == (name, PRESETS[name].shapes, PRESETS[name].buckets)


def test_folder_stands_for_its_config(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PLAIN))
    assert load_model(folder).name == load_model(folder / "config.json").name == "my-model"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {Shape(128, 32, 8): 4}),
        ({"head_dim": None, "hidden_size": 2048}, {Shape(64, 32, 8): 4}),
        ({"head_dim": None, "attention_head_dim": 256}, {Shape(256, 32, 8): 4}),
        ({"num_key_value_heads": None}, {Shape(128, 32, 32): 4}),
        ({"full_attention_interval": 4}, {Shape(128, 32, 8): 1}),
        ({"hybrid_override_pattern": "M-*E", "sliding_window": 7}, {Shape(128, 32, 8): 1}),
        ({"layers_block_type": ["mamba", "attention", "moe", "attention"]}, {Shape(128, 32, 8): 2}),
        ({"layer_types": ["linear_attention", "conv", "full_attention", "mlp"]}, {Shape(128, 32, 8): 1}),
        (
            {"layer_types": ["sliding_attention"] * 3 + ["full_attention"], "sliding_window": 512},
            {Shape(128, 32, 8): 1, Shape(128, 32, 8, SLIDING): 3},
        ),
        ({"sliding_window": 4096}, {Shape(128, 32, 8, SLIDING): 4}),
        ({"sliding_window": 4096, "use_sliding_window": False}, {Shape(128, 32, 8): 4}),
        (
            {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 3},
            {Shape(128, 32, 8): 3, Shape(128, 32, 8, SLIDING): 1},
        ),
        (
            {"sliding_window": 512, "sliding_window_pattern": 4},
            {Shape(128, 32, 8): 1, Shape(128, 32, 8, SLIDING): 3},
        ),
        (
            {"sliding_window": 512, "model_type": "gemma2"},
            {Shape(128, 32, 8): 2, Shape(128, 32, 8, SLIDING): 2},
        ),
        ({"attn_logit_softcapping": 50.0}, {Shape(128, 32, 8, "a soft-cap"): 4}),
        ({"attn_logit_softcapping": None, "alibi": False}, {Shape(128, 32, 8): 4}),
        ({"alibi": True}, {Shape(128, 32, 8, "ALiBi"): 4}),
        (
            {"model_type": "gpt_oss", "layer_types": ["sliding_attention", "full_attention"] * 2},
            {Shape(128, 32, 8, "attention sinks"): 2, Shape(128, 32, 8, f"{SLIDING} and attention sinks"): 2},
        ),
        # Gemma 4's smaller models do not share keys and values: all their layers have the same KV heads.
        ({"global_head_dim": 512, "num_global_key_value_heads": 4}, {Shape(512, 32, 4): 4}),
        (
            {"global_head_dim": 512, "num_global_key_value_heads": 4, "attention_k_eq_v": False},
            {Shape(512, 32, 8): 4},
        ),
    ],
)
def test_ways_to_describe_layers(tmp_path: Path, changes: dict[str, Any], expected: dict[Shape, int]) -> None:
    config = PLAIN | changes
    assert dict(load(tmp_path, config)) == expected
    assert dict(load(tmp_path, {"text_config": config, "vision_config": {"num_attention_heads": 3}})) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([1, 2], "expected a JSON object"),
        ({"model_type": "clip"}, "no num_attention_heads"),
        (PLAIN | {"num_attention_heads": 32.0}, "num_attention_heads is 32.0: expected a positive integer"),
        (PLAIN | {"num_attention_heads": True}, "num_attention_heads is True"),
        (PLAIN | {"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        (PLAIN | {"num_key_value_heads": 5}, "32 query heads cannot share 5 KV heads"),
        (PLAIN | {"head_dim": [128]}, r"head_dim is \[128\]"),
        (PLAIN | {"head_dim": 96}, "unsupported head dim 96: expected one of 64, 128, 256, 512"),
        (PLAIN | {"head_dim": None}, "neither head_dim nor hidden_size"),
        (PLAIN | {"head_dim": None, "hidden_size": 100}, "not a multiple"),
        (PLAIN | {"num_hidden_layers": None}, "no num_hidden_layers"),
        (PLAIN | {"num_hidden_layers": 10**12}, "at most 10000"),
        (PLAIN | {"layer_types": ["full_attention"]}, "num_hidden_layers is 4, but 1 layers are listed"),
        (PLAIN | {"layer_types": "full"}, "expected a list of strings"),
        (PLAIN | {"layer_types": ["lightning_attention"] * 4}, "unknown layer type 'lightning_attention'"),
        (PLAIN | {"layer_types": ["linear_attention"] * 4}, "nothing to tune"),
        (PLAIN | {"hybrid_override_pattern": 3}, "expected a string"),
        (PLAIN | {"kv_lora_rank": 512}, "latent attention"),
    ],
)
def test_unusable_config_is_one_clear_line(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load(tmp_path, config)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe", b"[" * 100_000, b"1" * 10_000, b"\n{\n\n,}"])
def test_unreadable_file_is_one_clear_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load_model(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["gpt-5", "no/such/config.json", "nul\0byte", ""])
def test_unknown_model_names_the_presets(name: str) -> None:
    with pytest.raises(UsageError):
        load_model(name)
    with pytest.raises(UsageError, match=r"llama-3\.1-8b"):
        load_model("gpt-5")


FIELDS = [
    "text_config",
    "head_dim",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "layer_types",
    "layers_block_type",
    "full_attention_interval",
    "hybrid_override_pattern",
    "global_head_dim",
    "num_global_key_value_heads",
    "attention_k_eq_v",
    "sliding_window",
    "sliding_window_pattern",
    "use_sliding_window",
    "max_window_layers",
    "model_type",
    "kv_lora_rank",
    "attention_head_dim",
]
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([1, 2, 4, 8, 32, 64, 128, 256])
    | st.floats()
    | st.text()
    | st.sampled_from(["full_attention", "sliding_attention", "M*M-", "gemma2"])
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS) | st.text(), inner),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=JSON | st.dictionaries(st.sampled_from(FIELDS), LEAVES), plain=st.booleans())
def test_no_json_raises_anything_else(tmp_path: Path, config: Any, plain: bool) -> None:
    if plain and isinstance(config, dict):
        config = PLAIN | config
    try:
        shapes = load(tmp_path, config)
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        assert shapes and all(layers >= 1 for _, layers in shapes)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=64))
def test_no_bytes_raise_anything_else(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UsageError):
        load_model(path)


def test_default_grid() -> None:
    buckets = default_buckets()
    keys = [b.key for b in buckets]
    assert len(keys) == len(set(keys)) == 46
    assert {"b1_c1024", "b128_c131072", "b4_ragged65536"} <= set(keys)
    assert "b2_ragged65536" not in keys
    assert default_workload(256).shapes == ((default_shape(256), 1),)


@pytest.mark.parametrize("bucket", [b for b in default_buckets() if b.ragged], ids=lambda b: b.key)
def test_ragged_lengths(bucket: Bucket) -> None:
    lengths = bucket.lengths(seed=1)
    assert lengths == bucket.lengths(seed=1) and lengths != bucket.lengths(seed=2)
    assert sorted(lengths) == sorted(bucket.lengths(seed=2))
    assert len(lengths) == bucket.batch and len(set(lengths)) == bucket.batch
    assert min(lengths) >= 128 and max(lengths) <= bucket.context
    # Log-uniform: the geometric mean is that of the ends.
    assert geometric_mean(lengths) == pytest.approx((128 * bucket.context) ** 0.5, rel=0.01)
    assert bucket.tokens == sum(lengths)


def test_even_bucket() -> None:
    assert Bucket(3, 1024).lengths() == [1024] * 3 and Bucket(3, 1024).tokens == 3072


@pytest.mark.parametrize(
    ("head_dim", "gqa", "shape"),
    [
        (64, None, Shape(64, 32, 8)),
        (128, None, Shape(128, 32, 8)),
        (256, None, Shape(256, 16, 2)),
        (512, None, Shape(512, 32, 4)),
        (256, 16, Shape(256, 32, 2)),
        (128, 5, Shape(128, 40, 8)),
    ],
)
def test_default_shape(head_dim: int, gqa: int | None, shape: Shape) -> None:
    assert default_shape(head_dim, gqa) == shape
    assert gqa is None or shape.gqa == gqa


def test_refusals() -> None:
    for make in (
        lambda: default_shape(100),
        lambda: default_shape(128, 0),
        lambda: Shape(128, 6, 4),
        lambda: Shape(128, 0, 0),
        lambda: Bucket(0, 1024),
        lambda: Bucket(1, 0),
        lambda: Bucket(4, 64, ragged=True),
    ):
        with pytest.raises(UsageError):
            make()


def test_cache_bytes_count_both_planes() -> None:
    bucket = Bucket(2, 1024)
    for name, token_bytes in (("turboquant_4bit_nc", 134), ("turboquant_seed", 256)):
        layout = slot_layout(name, 128)
        assert cache_bytes(default_shape(128), layout, bucket) == 2 * 1024 * 8 * token_bytes


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [(1, Shape(128, 32, 8)), (2, Shape(128, 16, 4)), (8, Shape(128, 4, 1)), (16, Shape(128, 2, 1))],
)
def test_tensor_parallelism_divides_heads_as_vllm_does(ranks: int, expected: Shape) -> None:
    """Beyond one KV head per GPU, GPUs hold copies of one."""
    workload = PRESETS["qwen3-4b"].shard(ranks)
    assert workload.shapes == ((expected, 36),) and workload.buckets == PRESETS["qwen3-4b"].buckets


@pytest.mark.parametrize("ranks", [0, -1, 3, 24, 64])
def test_heads_that_cannot_be_divided(ranks: int) -> None:
    with pytest.raises(UsageError, match=rf"32 query and 8 KV heads cannot be divided among {ranks} GPUs"):
        PRESETS["qwen3-4b"].shard(ranks)
