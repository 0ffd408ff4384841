"""Where studies live: opening an Optuna storage without ever hanging, naming studies, taking over from the dead."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.errors import TunerError, UsageError
from tuner.search.request import TuneRequest
from tuner.space import get_space

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from optuna.study import Study

ANSWER_S = 10.0
"""How long a storage may take to answer before it counts as absent."""
_CONNECT_S = 5.0
_FOREIGN_STALE = timedelta(hours=1)
"""A running trial of another host whose process cannot be looked up is taken for dead after this long."""
_RECORD_VERSION = 1


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
    connect_args: dict[str, Any] = {"timeout": 60} if backend == "sqlite" else {"connect_timeout": int(_CONNECT_S)}
    if backend == "sqlite" and parsed.database:
        _make_folder(Path(parsed.database), shown)
    if parsed.host:
        _probe(parsed.host, parsed.port or {"postgresql": 5432, "mysql": 3306}.get(backend), shown)

    outcome: list[RDBStorage | Exception] = []

    def connect() -> None:
        try:
            outcome.append(
                optuna.storages.RDBStorage(
                    url, engine_kwargs={"connect_args": connect_args, "pool_pre_ping": backend != "sqlite"}
                )
            )
        except Exception as error:  # drivers raise what they like; the caller's thread sorts it out
            outcome.append(error)

    # A server that accepts and then says nothing would block a driver without a time-out of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    if not outcome:
        raise TunerError(f"storage {shown} did not answer within {ANSWER_S:.0f} s; check --storage")
    if isinstance(outcome[0], Exception):
        raise _storage_error(outcome[0], shown)
    return outcome[0]


def study_name(request: TuneRequest, fingerprint: str) -> str:
    """Problem, device, evidence, and a hash of all that makes timings comparable.

    ``fingerprint``: version of templates, compiler and (predicted) model, from the evaluator.
    """
    p = request.problem
    space = get_space(p.op)
    inputs = [
        _RECORD_VERSION,
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


def worker_id() -> dict[str, Any]:
    """Who works on a trial: enough to tell later whether that process still lives."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _process_start(os.getpid())}


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
    if worker.get("host") != socket.gethostname():
        return age < _FOREIGN_STALE
    return _process_start(int(worker["pid"])) == worker.get("started")


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


def _storage_error(error: Exception, shown: str) -> TunerError:
    reason = " ".join(str(getattr(error, "orig", None) or error).split())[:160]
    if isinstance(error, ImportError):
        return UsageError(f"storage {shown} needs a driver that is not installed: {reason}")
    return TunerError(f"storage {shown} cannot be used: {reason or type(error).__name__}; check --storage")
