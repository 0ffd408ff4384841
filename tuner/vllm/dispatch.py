"""Which kernel serves a call: everything that may ever run is verified and loaded when a problem first comes up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tuner.errors import TunerError, UsageError
from tuner.geometry import decode_scratch, dynamic_shared_bytes, entry_points, split_candidates
from tuner.launch import LoadedKernel
from tuner.space.core import Config, Problem
from tuner.suits import CacheOrder, refusal
from tuner.table import CUT_OFF, Table, TableError, find, lookup, mixes_lengths, read, read_cubin, substitute
from tuner.table.substitute import splits_by_rule
from tuner.targets import Target, attached
from tuner.vllm import defaults, log

_REMEMBERED = 4096
Loader = Callable[[bytes, Config], LoadedKernel]


@dataclass(frozen=True)
class Chosen:
    """A loaded kernel and the splits to launch it with; ``origin`` says who chose it."""

    kernel: LoadedKernel
    splits: int
    origin: str


@dataclass(frozen=True)
class _Default:
    kernel: LoadedKernel
    registers: int


class Dispatch:
    """The kernels of one problem on one device; ``problem_found`` says why there are none, or why not the tuned ones.

    A table that is damaged, for another arch, or with cubins that are not what it names leaves the problem to vLLM's
    kernel, even where default kernels exist: someone meant to install something and should hear that it is broken.
    """

    def __init__(self, problem: Problem, kv_heads: int, target: Target, load: Loader) -> None:
        """``target`` is the device, with its own name; ``load`` makes verified cubins ready to launch on it."""
        self.problem, self.kv_heads, self.target = problem, kv_heads, target
        self.table: Table | None = None
        self.defaults: tuple[_Default, ...] = ()
        self._ready = load
        self._kernels: dict[str, LoadedKernel] = {}
        self._choices: dict[tuple[int, int | None, bool, CacheOrder], Chosen | str] = {}
        self.problem_found = self._load()

    @property
    def usable(self) -> bool:
        return self.table is not None or bool(self.defaults)

    def describe(self) -> str:
        """What runs, for the summary."""
        if self.table is not None:
            table = self.table
            found = f"table of {table.device.name} ({table.evidence}, {len(table.kernels)} kernels)"
            return found + coverage(table, self.kv_heads)
        if self.defaults:
            return "default kernel (no table for this device: tune to choose better ones)"
        return f"vLLM's kernel: {self.problem_found}"

    def choose(
        self, batch: int, context: int | None, max_context: int, order: CacheOrder, tokens: int | None = None
    ) -> Chosen | str:
        """The kernel for ``batch`` rows, or why vLLM's own must run.

        ``context`` is the longest request, None in a CUDA graph, whose kernel serves every length up to
        ``max_context``; ``tokens`` all requests' together, if they are known. First the table's choice. Where its
        kernel cannot read a cache of ``order``, another one of the table; where the table does not reach, the default
        kernel. What is left of these comes last.
        """
        ragged = mixes_lengths(batch, context, tokens)
        key = (batch, context, ragged, order)
        if key not in self._choices:
            if len(self._choices) >= _REMEMBERED:
                self._choices.clear()
            self._choices[key] = self._choose(batch, context, ragged, max_context, order)
        return self._choices[key]

    def requirement(self, rows: int, max_context: int) -> tuple[int, int]:
        """Most fp32 partials and counters that any call of up to ``rows`` rows can need."""
        floats = counters = 0
        for config, batch, splits in self._possible(rows, max_context):
            need = decode_scratch(config, batch=batch, kv_heads=self.kv_heads, splits=splits)
            floats, counters = max(floats, need.partial_floats), max(counters, need.counters)
        return floats, counters

    def _load(self) -> str | None:
        name, arch = self.target.device_name, self.target.arch
        try:
            path = find(self.problem, name)
            if path is not None:
                self.table, self._kernels = load_table(path, self.problem, arch, self._ready)
            self._load_defaults(arch)
        except Exception as error:  # whatever a file or the driver may do, vLLM must go on with its own kernel
            self.table, self.defaults = None, ()
            reason = str(error) if isinstance(error, TunerError) else f"{type(error).__name__}: {error}"
            log.warn(f"{self.problem.cache_format} at head dim {self.problem.head_dim}: vLLM's kernel runs: {reason}")
            return reason
        if not self.usable:
            return f"no table for {name}, no default kernel for {arch} (python tune.py --model ..., then install)"
        return None

    def _load_defaults(self, arch: str) -> None:
        path = defaults.find(self.problem, arch)
        if path is None:
            return
        try:
            found = defaults.read(path, self.problem, arch)
            self.defaults = tuple(
                _Default(self._ready(found.cubins[k.id], k.config(self.problem)), k.registers) for k in found.kernels
            )
        except Exception as error:  # a good table must not suffer from it
            if self.table is None:
                raise
            log.warn(f"default kernels are left out: {type(error).__name__}: {error}")

    def _choose(
        self, batch: int, context: int | None, ragged: bool, max_context: int, order: CacheOrder
    ) -> Chosen | str:
        choice = None
        if self.table is not None:
            choice = lookup(self.table, batch, context, kv_heads=self.kv_heads, ragged=ragged)
        if choice is None:
            why = f"the table's batches are more than {CUT_OFF:g} x away" if self.table else "there is no table"
            ladder = (self._default, self._substitute)
        else:
            kernel = self._kernels[choice.kernel]
            reason = refusal(kernel.config, order)
            if reason is None:
                return Chosen(kernel, choice.splits, f"table, kernel {choice.kernel}")
            why = f"kernel {choice.kernel} of the table cannot read this cache: {reason}"
            ladder = (self._substitute, self._default)
        found = (step(batch, context or max_context, order) for step in ladder)
        return next((chosen for chosen in found if chosen is not None), f"{why}, and no other kernel serves")

    def _substitute(self, batch: int, context: int, order: CacheOrder) -> Chosen | None:
        if self.table is None:
            return None
        choice = substitute(self.table, batch, order, self.target, context=context)
        if choice is None:
            return None
        return Chosen(self._kernels[choice.kernel], choice.splits, f"table, kernel {choice.kernel} in another's place")

    def _default(self, batch: int, context: int, order: CacheOrder) -> Chosen | None:
        for default in self.defaults:
            if refusal(default.kernel.config, order) is None:
                return Chosen(default.kernel, self._default_splits(default, batch, context), "default kernel")
        return None

    def _default_splits(self, default: _Default, batch: int, context: int) -> int:
        return split_candidates(
            default.kernel.config,
            registers=default.registers,
            batch=batch,
            kv_heads=self.kv_heads,
            max_context=context,
            target=self.target,
        )[0]

    def _possible(self, rows: int, max_context: int) -> Iterable[tuple[Config, int, int]]:
        """Every (configuration, batch, splits) that ``choose`` may answer with, but for fewer splits by rule."""
        table = self.table
        calls = {(e.longest, e.timing.ragged) for e in table.by_batch_and_context} if table else set()
        for batch in range(1, rows + 1):
            for default in self.defaults:
                yield default.kernel.config, batch, self._default_splits(default, batch, max_context)
            if table is None:
                continue
            for kernel in table.kernels:
                splits = splits_by_rule(kernel, table, batch, self.kv_heads, self.target, context=max_context)
                yield self._kernels[kernel.id].config, batch, splits
            for context, ragged in ((None, False), *calls):
                choice = lookup(table, batch, context, kv_heads=self.kv_heads, ragged=ragged)
                if choice is not None:
                    yield self._kernels[choice.kernel].config, batch, choice.splits


def coverage(table: Table, kv_heads: int) -> str:
    """Where a model's ``kv_heads`` are other than the tuned ones: for how many batch sizes the table's choice holds."""
    if kv_heads == table.kv_heads:
        return ""
    configs = {k.id: k.config(table.problem) for k in table.kernels}
    sizes = sorted({e.batch for e in table.by_batch})
    held = 0
    for batch in sizes:
        choice = lookup(table, batch, kv_heads=kv_heads)
        if choice is not None:
            config = configs[choice.kernel]
            held += refusal(config, CacheOrder.standard(config, kv_heads=kv_heads)) is None
    heads = f"{kv_heads} KV head{'s' * (kv_heads > 1)} where {table.kv_heads} were tuned"
    return f", {heads}: {held} of {len(sizes)} batch sizes run as chosen, others another of its kernels or the default"


def load_table(path: Path, problem: Problem, arch: str, load: Loader) -> tuple[Table, dict[str, LoadedKernel]]:
    """The table at ``path`` and its kernels by id, verified and loaded. Raises TableError, and what ``load`` does."""
    table = read(path, arch=arch)
    if table.problem != problem:
        raise TableError(f"{path} is a table of {table.problem}: expected one of {problem}")
    return table, {k.id: load(read_cubin(path, table, k.id), k.config(problem)) for k in table.kernels}


def loading_on(device: int) -> tuple[Target, Loader]:
    """The facts of CUDA device ``device``, and what loads kernels there. Raises UsageError on a GPU without facts."""
    target = attached(device)
    if target is None:
        raise UsageError(f"there is no CUDA device {device}")

    def load(image: bytes, config: Config) -> LoadedKernel:
        kernel = LoadedKernel.load(image, config, device)
        kernel.reserve_shared(entry_points(config)[0], dynamic_shared_bytes(config))
        return kernel

    return target, load


@cache
def dispatch_for(problem: Problem, kv_heads: int, device: int) -> Dispatch:
    """One per process, shared by all layers with that problem. Raises UsageError on a GPU without facts."""
    return Dispatch(problem, kv_heads, *loading_on(device))
