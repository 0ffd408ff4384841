"""The random model that every engine loads, and the prompts it is asked to continue."""

from __future__ import annotations

import hashlib
import json
import os
import random
from dataclasses import asdict, dataclass
from pathlib import Path

VOCABULARY = 8192
ENDING = 16
"""Last tokens that all prompts of a set share."""


@dataclass(frozen=True)
class Model:
    """A Qwen3-like model.

    ``sharpness``: standard deviation of the scores before softmax. Attention over random keys averages values, the
    more the longer the context: with 1.5 it leaves so little of them that prompts of 32768 tokens continue alike.
    Logits of two prompts apart, and of a bf16 run from an fp32 one, rms, in a model of 28 layers with hidden size 512
    and 4 heads on the CPU:

    | sharpness | 64 tokens | 512 | 2048 | 32768 | bf16, 512 |
    | 1.5 | 2.2 | 1.4 | 0.8 | 0.2 | 0.04 |
    | 2.5 | 2.7 | 2.1 | 1.5 | 0.5 | 0.06 |
    | 3.0 | 2.9 | 2.5 | 2.0 | 1.0 | 0.09 |

    In vLLM, with 1.5, the same 8 tokens followed both prompts of 1 in 992 pairs of 2048 tokens, of 12 in 56 of 32640.
    """

    head_dim: int = 128
    q_heads: int = 32
    kv_heads: int = 8
    layers: int = 28
    hidden: int = 2048
    intermediate: int = 2048
    sharpness: float = 3.0
    max_length: int = 33280


def write_checkpoint(model: Model, work: Path) -> Path:
    """A Qwen3 checkpoint with weights of real size; kept if it is there."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3Config

    digest = hashlib.sha256(json.dumps(asdict(model)).encode()).hexdigest()[:10]
    folder = work / f"model-{digest}"
    if (folder / "model.safetensors").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=model.layers,
        num_attention_heads=model.q_heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=model.max_length + 1024,
        tie_word_embeddings=False,
        architectures=["Qwen3ForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # a billion weights
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, columns: int, gain: float) -> torch.Tensor:
        drawn = torch.randn(rows, columns, generator=generator, device=device)
        return (drawn * gain * columns**-0.5).bfloat16().cpu()

    # Per-head RMS norms make |q| = |k| = sqrt(D) times their weights, so scores have the product's standard deviation.
    norm = torch.full((model.head_dim,), model.sharpness**0.5).bfloat16()
    ones = torch.ones(model.hidden).bfloat16()
    q_size, kv_size = model.q_heads * model.head_dim, model.kv_heads * model.head_dim
    # What attention writes decides the next token, yet rounding grows little from layer to layer (Model's figures).
    output_gain = 1.7 * model.layers**-0.5
    weights = {
        "model.embed_tokens.weight": normal(VOCABULARY, model.hidden, model.hidden**0.5),
        "model.norm.weight": ones,
        "lm_head.weight": normal(VOCABULARY, model.hidden, 3.0),
    }
    for i in range(model.layers):
        p = f"model.layers.{i}."
        weights |= {
            p + "input_layernorm.weight": ones.clone(),
            p + "post_attention_layernorm.weight": ones.clone(),
            p + "self_attn.q_norm.weight": norm.clone(),
            p + "self_attn.k_norm.weight": norm.clone(),
            p + "self_attn.q_proj.weight": normal(q_size, model.hidden, 1.0),
            p + "self_attn.k_proj.weight": normal(kv_size, model.hidden, 1.0),
            p + "self_attn.v_proj.weight": normal(kv_size, model.hidden, 1.0),
            p + "self_attn.o_proj.weight": normal(model.hidden, q_size, output_gain),
            p + "mlp.gate_proj.weight": normal(model.intermediate, model.hidden, 1.0),
            p + "mlp.up_proj.weight": normal(model.intermediate, model.hidden, 1.0),
            p + "mlp.down_proj.weight": normal(model.hidden, model.intermediate, 0.1),
        }
    save_file(weights, folder / "writing.safetensors", metadata={"format": "pt"})
    os.replace(folder / "writing.safetensors", folder / "model.safetensors")
    return folder


def prompts(lengths: tuple[int, ...], seed: int) -> list[list[int]]:
    """Random token ids; every prompt ends in the same tokens, so that only attention can tell them apart."""
    draw = random.Random(seed)
    ending = [draw.randrange(VOCABULARY) for _ in range(ENDING)]
    return [[draw.randrange(VOCABULARY) for _ in range(n - ENDING)] + ending for n in lengths]


def beginnings(batch: int, context: int) -> list[list[int]]:
    """``batch`` prompts of ``context`` tokens; shorter ones begin longer ones, so a prefix cache serves them all."""
    return [random.Random(1000 + i).choices(range(VOCABULARY), k=context) for i in range(batch)]
