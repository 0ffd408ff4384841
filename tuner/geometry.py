"""Launch geometry and scratch sizes: what a caller needs beside the cubin to start a kernel."""

from __future__ import annotations

from dataclasses import dataclass

from tuner.space.core import Config
from tuner.targets import Target


@dataclass(frozen=True)
class Geometry:
    """Grid in CTAs, block in threads, dynamic shared memory in bytes."""

    grid: tuple[int, int, int]
    block: int
    shared_bytes: int


@dataclass(frozen=True)
class Scratch:
    """Device memory that a launch needs: fp32 partial results, and int32 counters that start as zero."""

    partial_floats: int
    counters: int


def decode_geometry(config: Config, *, batch: int, kv_heads: int, splits: int) -> Geometry:
    """Geometry of ``wph_decode``; ``splits`` as in DecodeParams."""
    raise NotImplementedError


def reduce_geometry(config: Config, *, batch: int, kv_heads: int) -> Geometry:
    """Geometry of ``wph_decode_reduce`` (configurations with ``reduction=kernel``)."""
    raise NotImplementedError


def decode_scratch(config: Config, *, batch: int, kv_heads: int, splits: int) -> Scratch:
    """Scratch of ``wph_decode``; counters must be zero before the first launch and are zero after each."""
    raise NotImplementedError


def split_candidates(
    config: Config, *, registers: int, batch: int, kv_heads: int, max_context: int, target: Target
) -> tuple[int, ...]:
    """Values of ``splits`` worth timing, the most promising first (about three)."""
    raise NotImplementedError
