"""What is tuned for: the attention shapes of a model, and the batch sizes and contexts they are timed at."""

from tuner.workload.core import (
    Bucket,
    Shape,
    Workload,
    bf16_bytes,
    cache_bytes,
    default_buckets,
    default_shape,
    default_workload,
    store_buckets,
)
from tuner.workload.huggingface import read_shapes
from tuner.workload.presets import PRESETS, load_model

__all__ = [
    "PRESETS",
    "Bucket",
    "Shape",
    "Workload",
    "bf16_bytes",
    "cache_bytes",
    "default_buckets",
    "default_shape",
    "default_workload",
    "load_model",
    "read_shapes",
    "store_buckets",
]
