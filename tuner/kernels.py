"""Which kernel a call runs: a table's choice or the default configuration, loaded once per device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from tuner.errors import TunerError
from tuner.geometry import split_candidates
from tuner.launch import LoadedKernel
from tuner.space import Config, Problem, default_config
from tuner.suits import CacheOrder, refusal, suited
from tuner.table import Choice, Table, find, lookup, mixes_lengths, read, read_cubin, substitute, table_file_name
from tuner.targets import Target, attached, get_target


@dataclass(frozen=True)
class Selection:
    """A loaded kernel and the ``splits`` to launch it with (1 where the op has none)."""

    kernel: LoadedKernel
    splits: int


class Tables:
    """The dispatch tables for one device, each read when its problem first comes up.

    ``folder`` None: where the package and the environment put them. A problem without a table has no choice. Raises
    TableError where there is one but it cannot be trusted.
    """

    def __init__(self, folder: Path | None = None, device: int | None = None) -> None:
        self.device = torch.cuda.current_device() if device is None else device
        self._folder = folder
        self._tables: dict[Problem, tuple[Path, Table] | None] = {}
        self._kernels: dict[str, LoadedKernel] = {}

    def select(
        self,
        problem: Problem,
        *,
        batch: int,
        kv_heads: int,
        context: int | None = None,
        tokens: int | None = None,
        longest: int = 1,
        order: CacheOrder | None = None,
    ) -> Selection | None:
        """The table's choice; ``context`` None asks for the one that is valid for every length. ``tokens``: of all
        requests together, where they are known.

        Where its kernel cannot read a cache of ``order``, another kernel of the table, with splits for requests of up
        to ``context``, else ``longest`` tokens. None without a table, far from what it covers, or where none can.
        """
        found = self._table(problem)
        if found is None:
            return None
        path, table = found
        choice = lookup(table, batch, context, kv_heads=kv_heads, ragged=mixes_lengths(batch, context, tokens))
        if choice is None:
            return None
        kernel = self._load(path, table, choice)
        if order is not None and refusal(kernel.config, order):
            target = attached(self.device) or get_target(device_arch(self.device))
            choice = substitute(table, batch, order, target, context=context or longest)
            if choice is None:
                return None
            kernel = self._load(path, table, choice)
        return Selection(kernel, choice.splits)

    def _table(self, problem: Problem) -> tuple[Path, Table] | None:
        if problem not in self._tables:
            name = torch.cuda.get_device_name(self.device)
            path: Path | None
            if self._folder is None:
                path = find(problem, name)
            else:
                path = self._folder / table_file_name(problem, name)
                path = path if path.is_file() else None
            self._tables[problem] = None if path is None else (path, read(path, arch=device_arch(self.device)))
        return self._tables[problem]

    def _load(self, path: Path, table: Table, choice: Choice) -> LoadedKernel:
        if choice.kernel not in self._kernels:
            config = table.kernel(choice.kernel).config(table.problem)
            self._kernels[choice.kernel] = LoadedKernel.load(
                read_cubin(path, table, choice.kernel), config, self.device
            )
        return self._kernels[choice.kernel]


def default_kernel(problem: Problem, device: int) -> Selection:
    """The default configuration of op dequant or store, built the first time."""
    return Selection(_built(default_config(problem), device)[0], 1)


def default_decode(problem: Problem, device: int, order: CacheOrder, *, batch: int, context: int) -> Selection:
    """The default configuration that can read the cache; splits for requests of up to ``context`` tokens."""
    kernel, registers, target = _built(suited(default_config(problem), order), device)
    candidates = split_candidates(
        kernel.config,
        registers=registers,
        batch=max(1, batch),
        kv_heads=order.kv_heads,
        max_context=max(1, context),
        target=target,
    )
    return Selection(kernel, candidates[0])


@cache
def _built(config: Config, device: int) -> tuple[LoadedKernel, int, Target]:
    """``config`` compiled and loaded, once per process; also its registers per thread and the device."""
    from tuner.build import BuildFailure, build
    from tuner.render import render

    arch = device_arch(device)
    target = attached(device) or get_target(arch)
    source = render(config)
    built = build([source], [arch])[source.digest, arch]
    if isinstance(built, BuildFailure):
        raise TunerError(f"the default kernel does not compile for {arch}: {built.message} (see {built.log})")
    return LoadedKernel.load(built.cubin, config, device), built.registers, target


def device_arch(device: int) -> str:
    """ "sm_90" and the like."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
