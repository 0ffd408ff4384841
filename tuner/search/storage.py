"""Where studies live: opening an Optuna storage without ever hanging, naming studies, taking over from the dead."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.errors import TunerError, UsageError
from tuner.interrupts import put_off_within
from tuner.search.records import RECORDING_VERSION
from tuner.search.request import TuneRequest
from tuner.space import get_space

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from optuna.study import Study

ANSWER_S = 10.0
"""How long a storage may take to answer before it counts as absent."""
_CONNECT_S = 5.0
_FOREIGN_STALE_S = 3600.0
"""A running trial of another host whose process cannot be looked up is taken for dead after this long."""
_ATTEMPTS = 5
"""At opening a storage that other workers may be making at the same moment."""
_STATEMENT_S = 60
"""A server that takes longer over a statement counts as lost."""


def storage_url(request: TuneRequest) -> str:
    return request.storage or f"sqlite:///{(Path(request.root) / 'study.db').resolve()}"


def open_storage(url: str) -> RDBStorage:
    """The storage at ``url``. Raises UsageError for a URL that cannot be one, TunerError where it does not answer."""
    import optuna
    import sqlalchemy

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        parsed = sqlalchemy.engine.make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise UsageError(f"storage {url!r} is not a URL: expected for example sqlite:///build/study.db") from None
    shown = parsed.render_as_string(hide_password=True)
    backend = parsed.get_backend_name()
    if backend == "sqlite":
        if parsed.database in (None, "", ":memory:"):
            raise UsageError(f"storage {shown} would be gone with this process: expected a file, as sqlite:///study.db")
        _make_folder(Path(str(parsed.database)), shown)
    if parsed.host:
        _probe(parsed.host, parsed.port or {"postgresql": 5432, "mysql": 3306}.get(backend), shown)

    options = {"connect_args": _connect_args(backend, parsed.get_driver_name()), "pool_pre_ping": backend != "sqlite"}
    outcome: list[RDBStorage | Exception] = []

    def connect() -> None:
        for attempt in range(_ATTEMPTS):
            try:
                outcome.append(optuna.storages.RDBStorage(url, engine_kwargs=options))
                return
            except Exception as error:  # drivers raise what they like; the caller's thread sorts it out
                if attempt == _ATTEMPTS - 1 or not _is_being_made(error):
                    outcome.append(error)
                    return
            time.sleep(0.1 * 2**attempt)

    # A server that accepts and then says nothing would block a driver without a time-out of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    if not outcome:
        raise TunerError(f"storage {shown} did not answer within {ANSWER_S:.0f} s; check --storage")
    if isinstance(outcome[0], Exception):
        raise _storage_error(outcome[0], shown)
    put_off_within("optuna.storages")
    return outcome[0]


def study_name(request: TuneRequest, fingerprint: str) -> str:
    """Problem, device, evidence, and a hash of all that makes timings comparable.

    ``fingerprint``: version of templates, compiler and (predicted) model, from the evaluator.
    """
    p = request.problem
    space = get_space(p.op)
    inputs = [
        RECORDING_VERSION,
        fingerprint,
        [(a.name, a.values) for a in space.axes],
        [c.name for c in space.constraints],
        sorted((k, sorted(map(str, v))) for k, v in request.restrict.items()),
        [request.shape.q_heads, request.shape.kv_heads],
        sorted(b.key for b in request.buckets),
        request.seed,
    ]
    digest = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:12]
    device = request.target.device_name.replace(" ", "_")  # unlike tables, a family's timings do not mix
    return f"{p.op}-d{p.head_dim}-g{p.gqa}-{p.cache_format}-{device}-{request.evidence}-{digest}"


def open_study(request: TuneRequest, fingerprint: str, sampler: Any = None) -> Study:
    """The request's study, created if needed; without ``resume`` a new one beside those of the same name."""
    import optuna

    url = storage_url(request)
    storage = open_storage(url)
    name = study_name(request, fingerprint)
    try:
        if not request.resume:
            taken = {s.study_name for s in optuna.study.get_all_study_summaries(storage, include_best_trial=False)}
            runs = (f"{name}-run{n}" for n in range(2, len(taken) + 3))
            name = name if name not in taken else next(r for r in runs if r not in taken)
        return optuna.create_study(
            storage=storage, study_name=name, sampler=sampler, direction="minimize", load_if_exists=True
        )
    except Exception as error:  # again whatever the driver raises
        raise _storage_error(error, url) from None


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turns what a storage raises that is lost on the way into a TunerError."""
    import optuna
    import sqlalchemy

    try:
        yield
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
        shown = sqlalchemy.engine.make_url(url).render_as_string(hide_password=True)
        reason = _reason(error.__cause__ or error)
        raise TunerError(f"storage {shown} was lost: {reason}; once it answers, the same command goes on") from error


@contextmanager
def taken_over() -> Iterator[None]:
    """For what is told of one's own trial: whoever took this process for dead has ended it, and what it says counts."""
    import optuna

    try:
        yield
    except (optuna.exceptions.UpdateFinishedTrialError, ValueError) as error:
        if isinstance(error, ValueError) and "Cannot tell a" not in str(error):
            raise


def is_anyone_at_work(study: Study) -> bool:
    """Whether a worker that seems to live is at a trial."""
    from optuna.trial import TrialState

    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return any(_alive(t.user_attrs.get("worker"), t.datetime_start) for t in running)


def worker_id() -> dict[str, Any]:
    """Who works on a trial, and since when (UTC): enough to tell later whether that process still lives."""
    return {
        "host": _machine(),
        "pid": os.getpid(),
        "started": _process_start(os.getpid()),
        "since": time.time(),
    }


def recover(study: Study) -> int:
    """Fails the running trials of dead workers and enqueues them anew, once each; returns how many."""
    from optuna.trial import TrialState

    recovered = 0
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if _alive(trial.user_attrs.get("worker"), trial.datetime_start):
            continue
        if abandon(study, trial.number, trial.params, retry="retry_of" not in trial.user_attrs):
            recovered += 1
    return recovered


def abandon(study: Study, number: int, params: dict[str, Any], *, retry: bool) -> bool:
    """Fails a running trial and, with ``retry``, enqueues its parameters; False where another worker was faster."""
    from optuna.trial import TrialState

    try:
        study.tell(number, state=TrialState.FAIL)
    except (ValueError, RuntimeError):  # finished meanwhile
        return False
    if retry and params:
        study.enqueue_trial(params, user_attrs={"retry_of": number})
    return True


def _alive(worker: Any, started: datetime | None) -> bool:
    age = datetime.now() - started if started else timedelta()
    if not isinstance(worker, dict):
        return age < timedelta(seconds=10)  # between being asked for and being signed
    if worker.get("host") != _machine():
        return time.time() - float(worker.get("since", 0.0)) < _FOREIGN_STALE_S
    return _process_start(int(worker["pid"])) == worker.get("started")


def _machine() -> str:
    """Where process ids are one's own: the host, since its last boot, in this PID namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _process_start(pid: int) -> int | None:
    """Start of process ``pid`` in clock ticks since boot, to tell a reused id; None: no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def _make_folder(database: Path, shown: str) -> None:
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TunerError(f"storage {shown} cannot be created: {error.strerror}; change --storage") from None


def _probe(host: str, port: int | None, shown: str) -> None:
    if port is None:
        return
    start = time.monotonic()
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except OSError as error:
        waited = time.monotonic() - start
        raise TunerError(
            f"storage {shown} does not answer ({error.strerror or error}, after {waited:.0f} s); "
            "start it or change --storage"
        ) from None


def _connect_args(backend: str, driver: str) -> dict[str, Any]:
    if backend == "sqlite":
        return {"timeout": 60}
    arguments: dict[str, Any] = {"connect_timeout": int(_CONNECT_S)}
    if driver in ("psycopg", "psycopg2"):  # libpq's parameters, times in ms
        arguments |= {"options": f"-c statement_timeout={_STATEMENT_S}000", "tcp_user_timeout": _STATEMENT_S * 1000}
    return arguments


def _is_being_made(error: Exception) -> bool:
    """Another worker makes the same tables at this moment: one of the two comes second."""
    text = str(error)
    return any(sign in text for sign in ("already exists", "UNIQUE constraint", "duplicate key", "alembic_version"))


def _reason(error: BaseException) -> str:
    text = " ".join(str(getattr(error, "orig", None) or error).split())[:160]
    return text or type(error).__name__


def _storage_error(error: Exception, shown: str) -> TunerError:
    reason = _reason(error)
    if isinstance(error, ImportError):
        return UsageError(f"storage {shown} needs a driver that is not installed: {reason}")
    return TunerError(f"storage {shown} cannot be used: {reason}; check --storage")
