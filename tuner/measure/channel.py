"""Requests to a child process and its answers, one JSON object per line, with a deadline."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from tuner.errors import TunerError
from tuner.measure.samples import Failure, FailureKind

_KINDS = get_args(FailureKind)


class Channel:
    """Owns the process that ``command`` starts; starts it when first asked and again after it died.

    The child answers a request ``{"id": n, "op": ..., ...}`` with ``{"id": n, "result": ...}`` or
    ``{"id": n, "failure": {"kind": ..., "message": ...}}``. Its standard error goes to ``log``;
    ``environment`` None is this process's own.
    """

    def __init__(
        self, command: Sequence[str], log: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        self.command = tuple(command)
        self.log = log
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""
        self._count = 0

    @property
    def pid(self) -> int | None:
        """Process id of the living child, None where there is none."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def start(self) -> None:
        """Starts the child where there is none, ahead of a request that would wait for it. Raises TunerError."""
        if self.pid is None:
            self._start()

    def request(self, op: str, payload: Mapping[str, Any], timeout_s: float) -> Any | Failure:
        """The child's result, or why there is none. After a crash, a time-out or nonsense the child is gone."""
        self.start()
        process = self._process
        assert process is not None and process.stdin is not None
        self._count += 1
        line = json.dumps({"id": self._count, "op": op, **payload}).encode() + b"\n"
        deadline = time.monotonic() + timeout_s
        try:
            process.stdin.write(line)
            process.stdin.flush()
        except OSError:
            return self._crashed(op)
        answer = self._read_line(deadline)
        if answer is None:
            self.close()
            return Failure("timeout", f"{op}: no answer within {timeout_s:g} s")
        if not answer:
            return self._crashed(op)
        return self._parse(op, answer)

    def close(self) -> None:
        """Ends the child, at once; harmless when there is none."""
        process, self._process, self._rest = self._process, None, b""
        if process is None:
            return
        if process.poll() is None:
            process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        process.wait()

    def _start(self) -> None:
        self.close()
        try:
            with contextlib.ExitStack() as stack:
                errors: Any = subprocess.DEVNULL
                if self.log is not None:
                    self.log.parent.mkdir(parents=True, exist_ok=True)
                    errors = stack.enter_context(self.log.open("ab"))
                self._process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=self._environment,
                    start_new_session=True,
                )
        except OSError as e:
            raise TunerError(f"cannot start the measuring process {self.command[0]}: {e}") from e

    def _read_line(self, deadline: float) -> bytes | None:
        """One line without its end; empty where the child closed its output; None past ``deadline``."""
        assert self._process is not None and self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                return None
            data = os.read(descriptor, 1 << 16)
            if not data:
                return b""
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line or b" "

    def _parse(self, op: str, line: bytes) -> Any | Failure:
        try:
            answer = json.loads(line)
            if answer["id"] != self._count:
                raise ValueError(f"answer {answer['id']} to request {self._count}")
            if "failure" not in answer:
                return answer["result"]
            failure = Failure(answer["failure"]["kind"], str(answer["failure"]["message"]))
            if failure.kind not in _KINDS:
                raise ValueError(f"failure kind {failure.kind!r}")
            return failure
        except (ValueError, KeyError, TypeError) as e:
            self.close()
            return Failure("crash", f"{op}: the measuring process answered nonsense ({e})")

    def _crashed(self, op: str) -> Failure:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2)  # it closed its output: its exit status follows
        status = self._process.poll()
        self.close()
        where = f" (see {self.log})" if self.log else ""
        return Failure("crash", f"{op}: the measuring process ended {_reason(status)}{where}")


def _reason(status: int | None) -> str:
    if status is None:
        return "its answers"
    if status < 0:
        return f"by signal {signal.Signals(-status).name}"
    return f"with status {status}"
