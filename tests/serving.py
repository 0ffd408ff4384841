"""A server's side of a paged cache: requests that come, grow and go, for tests of what follows them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

import tuner
from tuner.reference import Codec, make_cache, store

UNTOUCHED = 0x7FC5
"""A bf16 NaN that no kernel produces."""
HEADS = 3


@dataclass
class Server:
    """Requests that come, grow and go over one cache; freed blocks are the first to be used again."""

    codec: Codec
    blocks: int
    block_size: int
    device: str = "cpu"
    padding: int = 0
    pages: dict[int, list[int]] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = torch.Generator().manual_seed(self.block_size)
        self.cache = make_cache(
            self.codec.layout, self.blocks, self.block_size, HEADS, padding=self.padding, device=self.device
        )
        shape = (2, self.blocks, self.block_size, HEADS, self.codec.layout.head_dim)
        self.image = torch.full(shape, UNTOUCHED, dtype=torch.int16, device=self.device)
        self.free = torch.randperm(self.blocks, generator=self.rng).tolist()

    def append(self, request: int, tokens: int) -> list[int]:
        """Slots of ``tokens`` more tokens of ``request``."""
        pages, length = self.pages.setdefault(request, []), self.lengths.get(request, 0)
        self.lengths[request] = length + tokens
        while len(pages) * self.block_size < length + tokens:
            pages.append(self.free.pop())
        at = range(length, length + tokens)
        return [pages[i // self.block_size] * self.block_size + i % self.block_size for i in at]

    def finish(self, request: int) -> None:
        self.free += self.pages.pop(request)
        del self.lengths[request]

    def write(self, slots: torch.Tensor) -> None:
        """Stores new rows at ``slots``."""
        rows = torch.randn(2, len(slots), HEADS, self.codec.layout.head_dim, generator=self.rng).to(self.device)
        store(self.cache, *rows.bfloat16(), slots, self.codec)

    @property
    def outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = self.image.view(torch.bfloat16)
        return key, value

    def table(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Block table and lengths of the live requests."""
        columns = max(map(len, self.pages.values()))
        rows = [pages + [-1] * (columns - len(pages)) for pages in self.pages.values()]
        lengths = list(self.lengths.values())
        return (
            torch.tensor(rows, dtype=torch.int32, device=self.device),
            torch.tensor(lengths, dtype=torch.int32, device=self.device),
        )

    def assert_image_of_live_rows(self, full: torch.Tensor) -> None:
        """``full``: int16 image of the same shape, decoded at once. Live rows must have its bits."""
        for request, pages in self.pages.items():
            for column, block in enumerate(pages):
                n = min(self.block_size, self.lengths[request] - column * self.block_size)
                assert not (full[:, block, :n] == UNTOUCHED).any()
                assert torch.equal(self.image[:, block, :n], full[:, block, :n]), f"request {request}, column {column}"


def full_image(server: Server, **constants: torch.Tensor | None) -> torch.Tensor:
    """int16, of the live rows, decoded at once and not in a graph; a GPU is needed. ``constants``: the codec's."""
    layout = server.codec.layout
    image = torch.full_like(server.image, UNTOUCHED)
    key, value = image.view(torch.bfloat16)
    tuner.dequantize(
        server.cache,
        *server.table(),
        cache_format=layout.format.name,
        head_dim=layout.head_dim,
        by_block_id=True,
        out=(key, value),
        **constants,
    )
    return image


def padded(slots: list[int], size: int) -> torch.Tensor:
    """``slots`` among entries of -1, as a batch that is padded to a captured size hands them over."""
    return torch.tensor(slots + [-1] * (size - len(slots)), dtype=torch.int64)


SCRIPT: tuple[dict[int, int | None], ...] = (
    {1: 20, 2: 5, 3: 16},  # prefill: request 1 ends inside a block, 3 with it
    {1: 1, 2: 1, 3: 1},  # decode: request 3 opens a block
    {1: 1, 2: 1, 3: 1},
    {2: None},  # ends
    {4: 3, 1: 1, 3: 1},  # request 4 takes the block of request 2, and is shorter
    {4: 1, 1: 1, 3: 1},
    {1: None, 3: None},
    {5: 37, 4: 1},  # takes all of their blocks, in another order
    {5: 30, 4: 1},  # the next chunk of a prefill starts inside a block
    {5: 1, 4: 1},
)
CAPTURED = 48
"""Slots per call, whatever a step needs: what a CUDA graph fixes."""


def serve(server: Server) -> Iterator[torch.Tensor]:
    """Runs SCRIPT; yields the slots, int64 [CAPTURED], of each step that writes some, after writing them."""
    for step in SCRIPT:
        slots: list[int] = []
        for request, tokens in step.items():
            if tokens is None:
                server.finish(request)
            else:
                slots += server.append(request, tokens)
        if slots:
            dirty = padded(slots, CAPTURED).to(server.device)
            server.write(dirty)
            yield dirty
