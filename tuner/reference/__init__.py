"""The truth that everything is checked against: quantise, store, dequantise and attend in plain torch.

Arithmetic is float64; only what the byte formats fix (fp16 norms, scales and zero points, the fp32 affine
quantisation of values, FP8 keys, bf16 outliers) is rounded as they say. Any device works, the CPU is usual.
"""

from tuner.reference.attention import attend, dequantize, store
from tuner.reference.cases import Case, bulk_cache, bulk_case, make_cache, synthetic_cache
from tuner.reference.codec import Codec, coefficients, dequantize_key, dequantize_value, quantize_key, quantize_value
from tuner.reference.lloyd_max import codebook, midpoints
from tuner.reference.rotation import hadamard, outlier_channels, rotation_signs

__all__ = [
    "Case",
    "Codec",
    "attend",
    "bulk_cache",
    "bulk_case",
    "codebook",
    "coefficients",
    "dequantize",
    "dequantize_key",
    "dequantize_value",
    "hadamard",
    "make_cache",
    "midpoints",
    "outlier_channels",
    "quantize_key",
    "quantize_value",
    "rotation_signs",
    "store",
    "synthetic_cache",
]
