"""One edge of the build graph: compile one source, publish the result atomically. Runs as a script, stdlib only.

    python -I -S nvcc_job.py job.json

A result is a folder that appears at its final place by one rename, complete or not at all. Per key a file lock
makes concurrent builders wait for each other instead of compiling twice; the kernel drops it when a holder dies.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULT = "result.json"
_MACHINE = re.compile(r"No space left|Killed|out of memory|nvcc fatal|host compiler|cc1plus")
"""In a compiler's output: the machine is at fault, not the source."""
_RESOURCE = re.compile(r"uses too much \w+ data|too many resources|[Rr]egister allocation failed")


def parse_ptxas(text: str) -> dict[str, dict[str, int]]:
    """Resources per entry function out of ``ptxas -v``: registers, spills (stores + loads), shared, stack; bytes."""
    entries: dict[str, dict[str, int]] = {}
    # Properties of device functions that were not inlined stand between those of entries: only the entry's count.
    blocks = re.split(r"Compiling entry function '([^']+)'", text)[1:]
    for name, block in zip(blocks[::2], blocks[1::2], strict=True):
        frame = re.search(
            rf"Function properties for {re.escape(name)}\s+(\d+) bytes stack frame, "
            r"(\d+) bytes spill stores, (\d+) bytes spill loads",
            block,
        )
        stack, stores, loads = map(int, frame.groups()) if frame else (0, 0, 0)
        used = re.search(r"Used (\d+) registers(.*)", block)
        shared = re.search(r"(\d+) bytes smem", used[2]) if used else None
        entries[name] = {
            "registers": int(used[1]) if used else 0,
            "spill_bytes": stores + loads,
            "shared_bytes": int(shared[1]) if shared else 0,
            "stack_bytes": stack,
        }
    return entries


def first_error(log: str) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for line in lines:
        if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE):
            return line
    return lines[0] if lines else "the compiler failed without a message"


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result in ``folder``; None where there is none, or none that counts: damaged, or a failure to try again."""
    try:
        result: dict[str, Any] = json.loads((folder / RESULT).read_text())
        if "message" in result:
            return None if result.get("retry") or "kind" not in result else result
        cubin = (folder / "kernel.cubin").read_bytes()
        whole = result["entries"] and hashlib.sha256(cubin).hexdigest() == result["cubin_sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return result if whole else None


def _run(command: list[str], folder: Path, timeout_s: float) -> tuple[int | None, str]:
    """Exit status (None: out of time) and output of a compiler started in ``folder``, with all its children."""
    env = {**os.environ, "TMPDIR": str(folder)}
    with (folder / "ptxas.txt").open("w+") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=env, start_new_session=True)
        try:
            status: int | None = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        return status, log.read()


def _publish(staging: Path, final: Path, result: dict[str, Any]) -> None:
    (staging / RESULT).write_text(json.dumps(result, indent=1, sort_keys=True))
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():  # left by an attempt that does not count
        shutil.rmtree(final)
    os.rename(staging, final)


def compile_one(job: dict[str, Any]) -> bool:
    """Compiles ``job`` in a folder of its own and publishes cubin or failure; true for a cubin."""
    final, failed = Path(job["final"]), Path(job["failed"])
    staging = Path(tempfile.mkdtemp(prefix="nvcc-", dir=job["staging"]))
    try:
        shutil.copyfile(job["source"], staging / "kernel.cu")
        text = (staging / "kernel.cu").read_bytes()
        start = time.monotonic()
        status, log = _run([*job["command"], "-o", "kernel.cubin", "kernel.cu"], staging, job["timeout_s"])
        result: dict[str, Any] = {"seconds": round(time.monotonic() - start, 3)}
        cubin = staging / "kernel.cubin"
        entries = parse_ptxas(log)
        if status == 0 and cubin.is_file() and job["entry"] in entries:
            result |= {"entries": entries, "cubin_sha256": hashlib.sha256(cubin.read_bytes()).hexdigest()}
            _publish(staging, final, result)
            return True
        if not (staging / "kernel.cu").is_file() or (staging / "kernel.cu").read_bytes() != text:
            return False  # somebody removed the folder under the compiler: that says nothing about the source
        if status is None:
            result |= {"kind": "compile", "message": f"nvcc took longer than {job['timeout_s']:g} s", "retry": True}
        elif status == 0:
            result |= {"kind": "compile", "message": f"the source has no kernel named {job['entry']}"}
        else:
            # Killed, out of memory or disk, without a host compiler: the source may be fine, so it is tried again.
            killed = status < 0 or status - 128 in signal.valid_signals()
            retry = killed or bool(_MACHINE.search(log))
            kind = "resource" if _RESOURCE.search(log) else "compile"
            result |= {"kind": kind, "message": first_error(log), "retry": retry}
        _publish(staging, failed, result)
        return False
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def main(path: str) -> int:
    job = json.loads(Path(path).read_text())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the compiler's process group goes, too
    with open(job["lock"], "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if read_result(Path(job["final"])) or read_result(Path(job["failed"])):
            return 0  # another builder was faster
        return 0 if compile_one(job) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
