"""Building candidates for real: render, compile, collect; shared by the evaluators with and without a GPU."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from tuner.build import Built, build
from tuner.errors import TunerError
from tuner.geometry import dynamic_shared_bytes
from tuner.render import Source, render, templates_digest
from tuner.search.evaluate import Candidate
from tuner.search.request import Failure
from tuner.space.core import Config


class Compiler:
    """Configurations to cubins of one arch; remembers what it built by source digest."""

    def __init__(self, arch: str, root: Path, jobs: int | None) -> None:
        self.arch, self.root, self.jobs = arch, root, jobs
        self.built: dict[str, Built] = {}
        self._cancel = threading.Event()

    def close(self) -> None:
        """Ends compilers that run, and begins no others."""
        self._cancel.set()

    def build(self, configs: Sequence[Config]) -> list[Candidate | Failure]:
        """One result per configuration; one that does not render or compile is a Failure (compile, resource, error)."""
        rendered: list[Source | Failure] = []
        for config in configs:
            try:
                rendered.append(render(config))
            except TunerError as error:
                rendered.append(Failure("compile", str(error)))
        sources = {s.digest: s for s in rendered if isinstance(s, Source)}
        results = (
            build(sources.values(), [self.arch], root=self.root, jobs=self.jobs, cancel=self._cancel) if sources else {}
        )
        answer: list[Candidate | Failure] = []
        for source in rendered:
            if isinstance(source, Failure):
                answer.append(source)
                continue
            result = results[source.digest, self.arch]
            if isinstance(result, Built):
                self.built[source.digest] = result
                answer.append(_candidate(source, result))
            else:
                # What may go better next time says nothing about the configuration.
                answer.append(Failure("error" if result.retry else result.kind, result.message))
        return answer


def fingerprint(arch: str) -> str:
    """Version of templates and compiler."""
    from tuner import toolchain

    return f"{templates_digest()[:16]}-nvcc{toolchain.find((arch,)).version}"


def _candidate(source: Source, built: Built) -> Candidate:
    shared = built.shared_bytes + dynamic_shared_bytes(source.config)
    return Candidate(
        source.config, source.digest, built.cubin_sha256, str(built.cubin), built.registers, shared, built.spill_bytes
    )
