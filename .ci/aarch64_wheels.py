"""Does every dependency have a wheel for Linux on aarch64 (DGX Spark)? Asks pip's resolver, installs nothing.

    python .ci/aarch64_wheels.py [python version, default 3.12]

Prints one line per direct dependency and exits with 1 if any has no wheel. torch and triton are resolved without
their own dependencies, which are NVIDIA's libraries; all others with them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

PLATFORMS = [f"manylinux_2_{minor}_aarch64" for minor in range(39, 16, -1)] + ["manylinux2014_aarch64"]
ALONE = ("torch", "triton")


def resolve(requirement: str, python_version: str, target: str) -> tuple[bool, str]:
    """Whether pip finds wheels for ``requirement``, and what it would install or its last words."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--report", "-"]
    command += ["--only-binary", ":all:", "--python-version", python_version, "--target", target, requirement]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    if requirement.startswith(ALONE):
        command.append("--no-deps")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        return False, (lines or ["pip failed"])[-1]
    wheels = [item["download_info"]["url"].rsplit("/", 1)[-1] for item in json.loads(done.stdout)["install"]]
    return True, f"{len(wheels)} wheels, {wheels[0]}"


def main() -> int:
    python_version = sys.argv[1] if len(sys.argv) > 1 else "3.12"
    project = tomllib.loads(Path(__file__).resolve().parents[1].joinpath("pyproject.toml").read_text())["project"]
    missing = 0
    with tempfile.TemporaryDirectory() as target:
        for requirement in project["dependencies"]:
            found, detail = resolve(requirement, python_version, target)
            missing += not found
            print(f"{'ok' if found else 'MISSING':8}{requirement}: {detail}", flush=True)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
