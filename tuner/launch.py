"""A cubin on the GPU: load it, keep its scratch, launch it on torch's current stream.

Kernels go through CuPy's binding of the driver, which takes the address of the parameter block as it is. A launch
allocates nothing, reads nothing back and waits for nothing, so it can be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from cupy_backends.cuda.api import driver, runtime
from torch import Tensor

from tuner.arguments import decode_params, dequant_params, group, store_params
from tuner.errors import TunerError, UsageError
from tuner.geometry import (
    DIRTY_RUN_TOKENS,
    GRID_YZ_MAX,
    Geometry,
    decode_geometry,
    decode_scratch,
    dequant_geometry,
    entry_points,
    reduce_geometry,
    store_geometry,
)
from tuner.space import Config
from tuner.space.plan import DecodePlan
from tuner.suits import CacheOrder, refusal, suited

if TYPE_CHECKING:
    from tuner.reference import Codec

_RESERVED_SHARED_PER_BLOCK = 111  # cudaDevAttrReservedSharedMemoryPerBlock
_FREE_SHARED_BYTES = 48 * 1024
"""Dynamic shared memory that a kernel may use without asking for it."""


class ResourceError(TunerError):
    """The device cannot hold one CTA of the kernel: too many registers or too much shared memory."""


class LoadedKernel:
    """The entry points of one configuration's cubin, loaded into the primary context of ``device``."""

    def __init__(self, config: Config, device: int, context: int, module: int) -> None:
        self.config = config
        self.device = device
        self._context = context
        self._module = module
        self._functions = {name: driver.moduleGetFunction(module, name) for name in entry_points(config)}
        self._shared_bytes = dict.fromkeys(self._functions, _FREE_SHARED_BYTES)

    @classmethod
    def load(cls, cubin: bytes | Path, config: Config, device: int | None = None) -> LoadedKernel:
        """Loads ``cubin``; ``device`` None is torch's current one. Raises TunerError if the driver refuses it."""
        if not torch.cuda.is_available():
            raise TunerError("no NVIDIA GPU: torch sees none, so no kernel can be loaded (the emulator runs without)")
        index = torch.cuda.current_device() if device is None else device
        image = cubin if isinstance(cubin, bytes) else cubin.read_bytes()
        _expect_shared_start(config, index)
        with torch.cuda.device(index):
            torch.cuda.synchronize()  # makes the primary context current, whatever this thread did before
            try:
                return cls(config, index, driver.ctxGetCurrent(), driver.moduleLoadData(image))
            except driver.CUDADriverError as e:
                name = torch.cuda.get_device_name(index)
                raise TunerError(f"the driver refuses the kernel on {name}: {e} (built for another GPU?)") from e

    def reserve_shared(self, entry: str, shared_bytes: int) -> None:
        """Asks for more than 48 KiB of dynamic shared memory, once. Raises ResourceError."""
        if shared_bytes <= self._shared_bytes[entry]:
            return
        attribute = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        try:
            driver.funcSetAttribute(self._functions[entry], attribute, shared_bytes)
        except driver.CUDADriverError as e:
            raise ResourceError(f"{entry} needs {shared_bytes} bytes of shared memory: {e}") from e
        self._shared_bytes[entry] = shared_bytes

    def launch(self, entry: str, geometry: Geometry, parameters: int) -> None:
        """Enqueues ``entry`` on torch's current stream; ``parameters`` is the address of an array of one pointer."""
        stream = torch.cuda.current_stream(self.device).cuda_stream
        previous = driver.ctxGetCurrent()
        if previous != self._context:
            driver.ctxSetCurrent(self._context)
        try:
            driver.launchKernel(
                self._functions[entry],
                *geometry.grid,
                geometry.block,
                1,
                1,
                geometry.shared_bytes,
                stream,
                parameters,
                0,
            )
        except driver.CUDADriverError as e:
            kind = ResourceError if "OUT_OF_RESOURCES" in str(e) else TunerError
            raise kind(f"launch of {entry} failed: {e} ({self.config.describe()})") from e
        finally:
            if previous not in (0, self._context):
                driver.ctxSetCurrent(previous)

    def unload(self) -> None:
        """Frees the module. No launch, and no replay of a graph that holds one, may follow."""
        driver.moduleUnload(self._module)
        self._functions = {}


class Workspace:
    """Scratch of one device: partial results, and counters that every launch leaves zero.

    Grows by reallocation; what it outgrew stays allocated, because a captured graph may still use it. Growing
    doubles, so that is at most as much again. Launches that share a workspace must not overlap: calls on concurrent
    streams need one each.
    """

    def __init__(self, device: torch.device | int | str) -> None:
        self.device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        self._partials: list[Tensor] = []
        self._counters: list[Tensor] = []

    def partials(self, floats: int) -> Tensor:
        """fp32 scratch of at least ``floats`` elements."""
        return self._at_least(self._partials, floats, torch.float32)

    def counters(self, count: int) -> Tensor:
        """int32 scratch of at least ``count`` elements, zero."""
        return self._at_least(self._counters, count, torch.int32)

    def _at_least(self, buffers: list[Tensor], count: int, dtype: torch.dtype) -> Tensor:
        if not buffers or buffers[-1].numel() < count:
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise TunerError(
                    f"scratch of {count} {dtype} elements is missing while a CUDA graph is captured: "
                    "run the call once with these sizes, and without max_context, before capturing it"
                )
            size = max(count, 2 * buffers[-1].numel() if buffers else 1024)
            buffers.append(torch.zeros(size, dtype=dtype, device=self.device))
        return buffers[-1]


_workspaces: dict[torch.device, Workspace] = {}


def shared_workspace(device: torch.device) -> Workspace:
    """The workspace of ``device`` that calls use where they are given none."""
    if device not in _workspaces:
        _workspaces[device] = Workspace(device)
    return _workspaces[device]


class _Call:
    """Launches with fixed arguments, any number of times. Keeps the tensors behind its pointers alive."""

    def __init__(
        self,
        kernel: LoadedKernel,
        launches: list[tuple[str, Geometry]],
        params: ctypes.Structure,
        tensors: dict[str, Tensor],
    ) -> None:
        home = tensors["kv_cache"].device
        if home != torch.device("cuda", kernel.device):
            raise UsageError(f"kv_cache is on {home} but the kernel on cuda:{kernel.device}: expected one device")
        for entry, geometry in launches:
            kernel.reserve_shared(entry, geometry.shared_bytes)
        self.kernel = kernel
        self._launches = launches
        self._tensors = tensors
        self._params = params
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))

    def __call__(self) -> None:
        """Launches on torch's current stream of the kernel's device."""
        for entry, geometry in self._launches:
            self.kernel.launch(entry, geometry, ctypes.addressof(self._pointers))


class DecodeCall(_Call):
    """One prepared decode: fixed tensors, any number of launches, none of which allocates, reads or waits."""

    def __init__(
        self,
        kernel: LoadedKernel,
        query: Tensor,
        kv_cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        out: Tensor,
        *,
        scale: float,
        codec: Codec,
        splits: int,
        workspace: Workspace | None = None,
    ) -> None:
        config = kernel.config
        require_layout(config, codec)
        scratch = decode_scratch(config, batch=query.shape[0], kv_heads=kv_cache.shape[-2], splits=splits)
        space = workspace or shared_workspace(kv_cache.device)
        params, tensors = decode_params(
            query,
            kv_cache,
            block_table,
            seq_lens,
            out,
            cache_format=config.problem.cache_format,
            scale=scale,
            splits=splits,
            partials=space.partials(scratch.partial_floats),
            counters=space.counters(scratch.counters),
            centroids=codec.centroids,
            signs=codec.signs,
            channels=codec.channels,
        )
        order = cache_order(kv_cache)
        reason = refusal(config, order)
        if reason:
            able = "dequantize()" if refusal(suited(config, order), order) else "a kernel with load=direct"
            raise UsageError(f"this kernel cannot read this kv_cache: {reason}; {able} can")
        super().__init__(kernel, decode_launches(config, query, kv_cache, splits), params, tensors)


class DequantCall(_Call):
    """One prepared dequantisation; see DecodeCall."""

    def __init__(
        self,
        kernel: LoadedKernel,
        kv_cache: Tensor,
        block_table: Tensor | None,
        seq_lens: Tensor | None,
        key_out: Tensor | None,
        value_out: Tensor | None,
        *,
        codec: Codec,
        by_block_id: bool = False,
        dirty: Tensor | None = None,
    ) -> None:
        config = kernel.config
        require_layout(config, codec)
        params, tensors = dequant_params(
            kv_cache,
            block_table,
            seq_lens,
            key_out,
            value_out,
            cache_format=config.problem.cache_format,
            head_dim=config.problem.head_dim,
            centroids=codec.centroids,
            signs=codec.signs,
            channels=codec.channels,
            by_block_id=by_block_id,
            dirty=dirty,
        )
        super().__init__(kernel, dequant_launches(config, kv_cache, block_table, dirty), params, tensors)


class StoreCall(_Call):
    """One prepared store of new rows; see DecodeCall."""

    def __init__(
        self,
        kernel: LoadedKernel,
        kv_cache: Tensor,
        key: Tensor,
        value: Tensor,
        slot_mapping: Tensor,
        *,
        codec: Codec,
    ) -> None:
        config = kernel.config
        require_layout(config, codec)
        if key.dim() != 3 or key.shape[2] != config.problem.head_dim:
            raise UsageError(f"key has shape {list(key.shape)}: expected [N, Hk, {config.problem.head_dim}]")
        params, tensors = store_params(
            kv_cache,
            key,
            value,
            slot_mapping,
            cache_format=config.problem.cache_format,
            centroids=codec.centroids,
            signs=codec.signs,
            channels=codec.channels,
        )
        super().__init__(kernel, store_launches(config, kv_cache, slot_mapping), params, tensors)


def cache_order(kv_cache: Tensor) -> CacheOrder:
    """Address and strides of a cache with 4 or, with separate planes, 5 dimensions."""
    strides = kv_cache.stride()
    plane = strides[1] if kv_cache.dim() == 5 else 0
    block_size, kv_heads = kv_cache.shape[-3:-1]
    return CacheOrder(kv_cache.data_ptr(), strides[0], plane, strides[-3], strides[-2], block_size, kv_heads)


def require_layout(config: Config, codec: Codec) -> None:
    """Raises UsageError where ``codec`` is of another format or head dim than the kernel."""
    if codec.layout != config.problem.layout:
        got = f"{codec.layout.format.name} at head dim {codec.layout.head_dim}"
        expected = f"{config.problem.cache_format} at head dim {config.problem.head_dim}"
        raise UsageError(f"constants of {got} for a kernel of {expected}: expected the same")


def _expect_shared_start(config: Config, device: int) -> None:
    """Raises TunerError where dynamic shared memory starts elsewhere than the kernel's lookup table was placed for.

    The kernel would trap, which ends the whole CUDA context.
    """
    if config.problem.op != "decode" or not DecodePlan(config).lookup_bytes:
        return
    try:
        reserved = runtime.deviceGetAttribute(_RESERVED_SHARED_PER_BLOCK, device)
    except runtime.CUDARuntimeError:  # one that does not say; the kernel looks for itself
        return
    if reserved != DecodePlan.shared_start:
        raise TunerError(
            f"the driver keeps {reserved} bytes of shared memory per CTA: expected {DecodePlan.shared_start}, as with "
            "all drivers so far; kernels with lookup=shuffle or prmt do not mind"
        )


def decode_launches(config: Config, query: Tensor, kv_cache: Tensor, splits: int) -> list[tuple[str, Geometry]]:
    """Entry points of a decode with their geometries, in launch order; none for an empty batch.

    Raises UsageError where the kernel was compiled for another head dim or group size.
    """
    batch, q_heads, head_dim = query.shape
    kv_heads = kv_cache.shape[-2]
    gqa = group(q_heads, kv_heads)
    problem = config.problem
    if (head_dim, gqa) != (problem.head_dim, problem.gqa):
        raise UsageError(
            f"query has head dim {head_dim} and {gqa} heads per KV head: "
            f"expected {problem.head_dim} and {problem.gqa} for this kernel"
        )
    if batch == 0:
        return []
    if batch > GRID_YZ_MAX and (config["schedule"] == "grid" or config["reduction"] == "kernel"):
        raise UsageError(f"{batch} requests in one call: expected at most {GRID_YZ_MAX}, so split the call")
    launches = [("wph_decode", decode_geometry(config, batch=batch, kv_heads=kv_heads, splits=splits))]
    if "wph_decode_reduce" in entry_points(config):
        launches.append(("wph_decode_reduce", reduce_geometry(config, batch=batch, kv_heads=kv_heads)))
    return launches


def dequant_launches(
    config: Config, kv_cache: Tensor, block_table: Tensor | None, dirty: Tensor | None = None
) -> list[tuple[str, Geometry]]:
    """Entry points of a dequantisation with their geometries; none where there are no blocks or dirty slots."""
    block_size, kv_heads = kv_cache.shape[-3:-1]
    if dirty is not None:
        entries, tokens = dirty.numel(), min(DIRTY_RUN_TOKENS, block_size)
    else:
        assert block_table is not None
        entries, tokens = block_table.numel(), block_size
    if entries == 0:
        return []
    return [("wph_dequant", dequant_geometry(config, entries=entries, block_size=tokens, kv_heads=kv_heads))]


def store_launches(config: Config, kv_cache: Tensor, slot_mapping: Tensor) -> list[tuple[str, Geometry]]:
    """Entry points of a store with their geometries; none where there are no tokens."""
    tokens, kv_heads = slot_mapping.shape[0], kv_cache.shape[-2]
    if tokens * kv_heads == 0:
        return []
    return [("wph_store", store_geometry(config, tokens=tokens, kv_heads=kv_heads))]
