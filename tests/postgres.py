"""A PostgreSQL server of a test's own, from the programs that the machine has."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_DEBIAN = "/usr/lib/postgresql/*/bin"  # not on the PATH there


def programs() -> Path | None:
    """The folder with initdb and pg_ctl; None where PostgreSQL is not installed."""
    on_path = shutil.which("initdb")
    if on_path:
        return Path(on_path).resolve().parent
    found = sorted(Path("/").glob(f"{_DEBIAN[1:]}/initdb"))
    return found[-1].parent if found else None


@contextmanager
def server(bin_folder: Path) -> Iterator[str]:
    """Runs a server on a free port of the loopback device; yields the URL of an empty database, and removes it all."""
    account = None
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        account = pwd.getpwnam("postgres")
    folder = Path(tempfile.mkdtemp(prefix="wph-postgres-"))
    if account:
        os.chown(folder, account.pw_uid, account.pw_gid)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(program: str, *args: str) -> None:
        command = [str(bin_folder / program), "-D", str(folder / "data"), *args]
        subprocess.run(
            command, check=True, user=account and account.pw_uid, group=account and account.pw_gid, cwd=folder,
            stdout=subprocess.DEVNULL, timeout=120,
        )  # fmt: skip

    try:
        run("initdb", "--auth=trust", "--username=tuner", "--encoding=UTF8", "--no-sync")
        options = f"-h 127.0.0.1 -p {port} -k {folder} -c fsync=off"
        run("pg_ctl", "start", "--wait", "--log", str(folder / "log"), "--options", options)
        try:
            yield f"postgresql+psycopg://tuner@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "stop", "--wait", "--mode=immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
