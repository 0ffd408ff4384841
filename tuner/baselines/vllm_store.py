"""vLLM's own TurboQuant store, unmodified: what its backend runs for every layer and step.

For rotated keys that is a cast to fp32, the norm, the division, the rotation as a matrix product, a cast of the values
and one Triton kernel that packs; for FP8 keys the Triton kernel alone. Its sources are found as vllm_triton says.
"""

from __future__ import annotations

from typing import Any

from tuner.baselines import vllm_triton
from tuner.baselines.inputs import Constants
from tuner.baselines.store_inputs import StoreInputs
from tuner.baselines.support import hadamard_matrix
from tuner.errors import TunerError
from tuner.space.core import Problem

MODULE = f"{vllm_triton.OPS}.triton_turboquant_store"
_FILES = ("triton_turboquant_store.py", "triton_turboquant_decode.py", "triton_decode_attention.py")


def unavailable(name: str, device: Any, problem: Problem) -> str | None:
    """Why vLLM's store cannot run on ``device`` for ``problem``, or None."""
    return vllm_triton.unavailable(name, device, problem, _FILES)


def prepare(name: str, inputs: StoreInputs, constants: Constants | None = None) -> Any:
    """A call of vLLM's launcher with the arguments that its backend passes; it allocates its temporaries itself."""
    from tuner.reference import midpoints

    reason = unavailable(name, inputs.key.device, inputs.problem)
    if reason:
        raise TunerError(f"baseline {name} is not available: {reason}")
    layout = inputs.layout
    arguments = {
        "key": inputs.key,
        "value": inputs.value,
        "kv_cache": inputs.kv_cache,
        "slot_mapping": inputs.slot_mapping,
        "PiT": hadamard_matrix(layout.head_dim, inputs.key.device),
        "midpoints": midpoints(inputs.codec.centroids),
        "mse_bits": layout.key.bits,
        "key_packed_size": layout.key.size,
        "value_quant_bits": layout.value.bits,
        "key_fp8": not layout.format.key_codebook,
    }
    launcher = vllm_triton.load_op(MODULE, "triton_turboquant_store")
    return lambda: launcher(**arguments)
