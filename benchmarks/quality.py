"""What each cache format costs in accuracy: the quality table, from the float64 reference on the CPU.

    python benchmarks/quality.py                              # every format, D 64 to 512; 30 s on two CPU cores
    python benchmarks/quality.py --markdown docs/quality.md   # replaces the table in there

No kernel takes part: kernels are held against the same reference by the tests. Every figure compares with the original
bf16 vectors, not with another coded form of them.

* error: root of sum |x' - x|^2 / sum |x|^2 over all rows. cosine: mean over rows.
* output: the same error for the output of decode attention over 1024 tokens, 64 random queries per KV head, scaled so
  that the scores before the softmax have a standard deviation of 2.
* data: "Gaussian": independent standard normal channels. "outliers": the same, but 5% of the channels, the same ones
  for all tokens, are 10 times as loud in keys and 4 times in values. Formats that keep some channels in bf16 chose
  theirs without knowing; in "calibrated" the loud ones are among them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.command import ended  # noqa: E402
from tuner.errors import TunerError, UsageError  # noqa: E402
from tuner.formats import FORMATS, HEAD_DIMS, SlotLayout, check_head_dim, get_format, slot_layout  # noqa: E402
from tuner.reference import Codec, dequantize_key, dequantize_value, quantize_key, quantize_value  # noqa: E402

TOKENS = 1024
KV_HEADS = 2
QUERIES = 64
"""Per KV head."""
LOUD_SHARE = 0.05
LOUD_KEY, LOUD_VALUE = 10.0, 4.0
SCORE_DEVIATION = 2.0
SEED = 0
BEGIN, END = "<!-- table: python benchmarks/quality.py -->", "<!-- end of table -->"


@dataclass(frozen=True)
class Quality:
    """Errors are relative, 0 is exact; cosines are between a vector and its decoded form."""

    cache_format: str
    head_dim: int
    data: str
    compression: float
    key_error: float
    key_cosine: float
    value_error: float
    value_cosine: float
    output_error: float


def datasets(layout: SlotLayout) -> tuple[str, ...]:
    """Which data make a difference for this format."""
    return ("Gaussian", "outliers", "calibrated") if layout.outliers else ("Gaussian", "outliers")


def rows(layout: SlotLayout, codec: Codec, data: str) -> tuple[Tensor, Tensor]:
    """bf16 keys and values [TOKENS, KV_HEADS, D], the same for every format but for where calibrated channels are."""
    generator = torch.Generator().manual_seed(SEED)
    key, value = torch.randn(2, TOKENS, KV_HEADS, layout.head_dim, generator=generator)
    if data != "Gaussian":
        loud = torch.randperm(layout.head_dim, generator=generator)[: max(1, int(LOUD_SHARE * layout.head_dim))]
        if data == "calibrated":
            assert codec.channels is not None
            loud = codec.channels[layout.normal :].long()[: len(loud)]
        key[..., loud] *= LOUD_KEY
        value[..., loud] *= LOUD_VALUE
    return key.bfloat16(), value.bfloat16()


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Float64 [Hk, QUERIES, D]; ``query`` [Hk, QUERIES, D] is scaled already."""
    weights = torch.softmax(torch.einsum("hgd,thd->hgt", query, key), dim=-1)
    return torch.einsum("hgt,thd->hgd", weights, value)


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def quality(cache_format: str, head_dim: int, data: str) -> Quality:
    """One row of the table."""
    layout = slot_layout(cache_format, head_dim)
    codec = Codec.for_layout(layout, SEED + 1)  # other random numbers than the data's
    coded_key, coded_value = rows(layout, codec, data)
    key, value = coded_key.double(), coded_value.double()
    key_back = dequantize_key(quantize_key(coded_key, codec), codec)
    value_back = dequantize_value(quantize_value(coded_value, codec), codec)
    shape = (KV_HEADS, QUERIES, head_dim)
    query = torch.randn(shape, generator=torch.Generator().manual_seed(SEED + 2), dtype=torch.float64)
    query *= SCORE_DEVIATION / torch.einsum("hgd,thd->hgt", query, key).std(dim=-1, keepdim=True)
    return Quality(
        cache_format,
        head_dim,
        data,
        layout.compression,
        error(key_back, key),
        float(torch.cosine_similarity(key_back, key, dim=-1).mean()),
        error(value_back, value),
        float(torch.cosine_similarity(value_back, value, dim=-1).mean()),
        error(attention(query, key_back, value_back), attention(query, key, value)),
    )


def table(formats: Iterable[str], head_dims: Iterable[int]) -> list[Quality]:
    """All rows, by data, head dim and format."""
    asked = [(f, d, data) for f in formats for d in head_dims for data in datasets(slot_layout(f, d))]
    order = ("Gaussian", "outliers", "calibrated")
    return [quality(*a) for a in sorted(asked, key=lambda a: (order.index(a[2]), a[1], list(FORMATS).index(a[0])))]


def markdown(found: Sequence[Quality]) -> str:
    """A table that a person can read, in Markdown."""
    lines = [
        "| data | D | format | x fewer bytes | key error | key cosine | value error | value cosine | output error |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for q in found:
        lines.append(
            f"| {q.data} | {q.head_dim} | `{q.cache_format}` | {q.compression:.2f} | {q.key_error:.4f} | "
            f"{q.key_cosine:.5f} | {q.value_error:.4f} | {q.value_cosine:.5f} | {q.output_error:.4f} |"
        )
    return "\n".join(lines) + "\n"


def replace_table(text: str, new: str) -> str:
    """``text`` with ``new`` between its two markers. Raises TunerError where they are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise TunerError(f"no place for the table: expected a line {BEGIN!r} and below it {END!r}")
    return f"{before}{begin}\n{new}{end}{after}"


def run(args: argparse.Namespace) -> int:
    formats = [get_format(name).name for name in args.formats.split(",")]
    try:
        head_dims = [check_head_dim(int(d)) for d in args.head_dims.split(",")]
    except ValueError as e:
        raise UsageError(f"--head-dims is {args.head_dims!r}: {e}") from None
    found = table(formats, head_dims)
    text = markdown(found)
    print(text, end="")
    try:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps([asdict(q) for q in found], indent=1) + "\n")
        if args.markdown:
            args.markdown.write_text(replace_table(args.markdown.read_text(), text))
    except OSError as e:
        raise TunerError(f"cannot keep the table: {e}") from None
    print(f"written to {args.json}", file=sys.stderr)
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    made.add_argument("--formats", default=",".join(FORMATS), metavar="NAMES", help="[default: all]")
    made.add_argument("--head-dims", default=",".join(map(str, HEAD_DIMS)), metavar="N,...", help="[default: all]")
    made.add_argument("--json", type=Path, default=Path("build/quality.json"), metavar="FILE")
    made.add_argument("--markdown", type=Path, metavar="FILE", help="a page whose table is replaced")
    return made


if __name__ == "__main__":
    sys.exit(ended(run, parser()))
