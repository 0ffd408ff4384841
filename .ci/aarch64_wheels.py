"""Does every dependency have a wheel for Linux on aarch64 (DGX Spark)? Asks pip's resolver, installs nothing.

    python .ci/aarch64_wheels.py [python version, default 3.12]

Prints what it would install, those of the tests too, and exits with 1 if anything has no wheel. torch and triton are
resolved each without their own dependencies, which are NVIDIA's libraries; all others together, with them.
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


def resolve(requirements: list[str], python_version: str, target: str, *options: str) -> list[str] | str:
    """Names of the wheels that pip finds for ``requirements`` together, or its last words."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--report", "-"]
    command += ["--only-binary", ":all:", "--python-version", python_version, "--target", target, *options]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    done = subprocess.run([*command, *requirements], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        return (lines or ["pip failed"])[-1]
    return [item["download_info"]["url"].rsplit("/", 1)[-1] for item in json.loads(done.stdout)["install"]]


def main() -> int:
    python_version = sys.argv[1] if len(sys.argv) > 1 else "3.12"
    project = tomllib.loads(Path(__file__).resolve().parents[1].joinpath("pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    alone = [[r] for r in requirements if r.startswith(ALONE)]
    together = [r for r in requirements if not r.startswith(ALONE)]
    missing = 0
    with tempfile.TemporaryDirectory() as target:
        for group in (*alone, together):
            found = resolve(group, python_version, target, *(["--no-deps"] if group in alone else []))
            if isinstance(found, str):
                missing += 1
                print(f"MISSING {', '.join(group)}: {found}", flush=True)
            else:
                print("\n".join(f"ok      {wheel}" for wheel in sorted(found)), flush=True)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
