"""Prebuilt default kernels: what runs where no table was tuned for a device, found without a compiler.

One JSON file per (head dim, group size, cache format, arch) beside the tables, cubins in the same ``kernels/`` folder
and trusted on the same terms: plain files, SHA-256, axes known to the space.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tuner.errors import UsageError
from tuner.geometry import dynamic_shared_bytes
from tuner.space.core import Problem
from tuner.table import Kernel, TableError, kernel_id
from tuner.table.files import MAX_CUBIN_BYTES, MAX_TABLE_BYTES, parse_json, read_beside, read_bounded, write_whole
from tuner.table.store import check_kernel, find_file

_VERSION = 1


@dataclass(frozen=True)
class Defaults:
    """The default kernels of one problem on one arch, the one to prefer first, with the bytes of their cubins."""

    problem: Problem
    arch: str
    kernels: tuple[Kernel, ...]
    cubins: Mapping[str, bytes]


def file_name(problem: Problem, arch: str) -> str:
    p = problem
    return f"wph_default_{p.op},head_dim={p.head_dim},gqa={p.gqa},arch={arch},cache_dtype={p.cache_format}.json"


def find(problem: Problem, arch: str) -> Path | None:
    """Path of the file: where tables are found, in the same order."""
    return find_file(file_name(problem, arch))


def read(path: Path, problem: Problem | None = None, arch: str | None = None) -> Defaults:
    """The defaults at ``path``, every cubin verified; ``problem`` and ``arch`` None: whatever the file says it is for.

    Raises TableError, one line, for anything else.
    """
    data = parse_json(read_bounded(path, MAX_TABLE_BYTES), path)
    try:
        if data["schema_version"] != _VERSION:
            raise TableError(f"{path} has schema version {data['schema_version']!r}: expected {_VERSION}")
        found = Problem(**data["problem"]), str(data["arch"])
        kernels = tuple(_kernel(k) for k in data["kernels"])
    except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
        raise TableError(f"{path} is not a file of default kernels: {type(error).__name__} {error}") from None
    expected = problem or found[0], arch or found[1]
    if found != expected or not kernels:
        raise TableError(f"{path} holds {found[0]} for {found[1]}: expected {expected[0]} for {expected[1]}")
    problem, arch = found
    cubins = {}
    for kernel in kernels:
        try:
            check_kernel(kernel, problem)
        except (TableError, UsageError) as error:
            raise TableError(f"{path}: {error}") from None
        image = read_beside(path, f"{kernel.id}.cubin", MAX_CUBIN_BYTES)
        if hashlib.sha256(image).hexdigest() != kernel.cubin_sha256 or kernel.arch != arch:
            raise TableError(f"kernels/{kernel.id}.cubin is not what {path.name} names: install again")
        cubins[kernel.id] = image
    return Defaults(problem, arch, kernels, cubins)


def write(defaults: Defaults, folder: Path) -> Path:
    """Writes cubins, then the file that names them, each whole. Raises TableError."""
    for kernel in defaults.kernels:
        write_whole(folder / "kernels" / f"{kernel.id}.cubin", defaults.cubins[kernel.id])
    kernels = [asdict(k) | {"params": dict(k.params)} for k in defaults.kernels]
    data = {"schema_version": _VERSION, "problem": asdict(defaults.problem), "arch": defaults.arch, "kernels": kernels}
    path = folder / file_name(defaults.problem, defaults.arch)
    write_whole(path, (json.dumps(data, indent=1) + "\n").encode())
    return path


def build_defaults(problems: Sequence[Problem], arch: str, root: Path = Path("build")) -> list[Defaults]:
    """Compiles the default configuration of each problem and its variant with plain loads; needs nvcc.

    Raises TunerError where one does not compile.
    """
    from tuner.build import BuildFailure, build
    from tuner.errors import TunerError
    from tuner.render import render
    from tuner.space import default_config
    from tuner.space.decode_landmarks import direct_variant

    wanted = [(p, [render(default_config(p)), render(direct_variant(default_config(p)))]) for p in problems]
    results = build([s for _, sources in wanted for s in sources], [arch], root=root)
    made = []
    for problem, sources in wanted:
        kernels, cubins = [], {}
        for source in sources:
            built = results[source.digest, arch]
            if isinstance(built, BuildFailure):
                raise TunerError(f"the default kernel does not compile for {arch}: {built.message} (see {built.log})")
            name = kernel_id(arch, built.cubin_sha256)
            kernels.append(
                Kernel(
                    name,
                    source.config.params,
                    source.digest,
                    built.cubin_sha256,
                    arch,
                    built.registers,
                    built.shared_bytes + dynamic_shared_bytes(source.config),
                    built.spill_bytes,
                )
            )
            cubins[name] = built.cubin.read_bytes()
        made.append(Defaults(problem, arch, tuple(kernels), cubins))
    return made


def _kernel(data: Mapping[str, Any]) -> Kernel:
    kernel = Kernel(**{**data, "params": tuple(data["params"].items())})
    if kernel.id != kernel_id(kernel.arch, kernel.cubin_sha256) or type(kernel.registers) is not int:
        raise ValueError(f"kernel {kernel.id} is not named by its arch and hash")
    return kernel
