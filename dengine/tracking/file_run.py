"""Record a run as plain files: rows while it goes on, and its status at the end."""

import atexit
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from dengine.checks import whole_number
from dengine.tracking.artifact_store import ArtifactStore
from dengine.tracking.artifacts import Artifact
from dengine.tracking.backend import Backend, StoredFiles
from dengine.tracking.files import TrackingError, read_json, write_json
from dengine.tracking.rows import ROWS, RowFile, read_rows
from dengine.tracking.run import Run
from dengine.tracking.values import Plain, RowMaker, plain

__all__ = ["FileRun"]

_OWN = ("step", "time")


class FileRun(Run):
    """Writes plain files into `dir`, which exists and has its `run.json`, and then reports to the backends.

    Files: `run.json`, `config.json`, `metrics.jsonl`, `summary.json`, `status.json`, `artifacts.json`, `artifacts/`.
    """

    def __init__(
        self,
        identity: Mapping[str, object],
        directory: Path,
        config: dict[str, Plain],
        rows: RowFile,
    ) -> None:
        self.id, self.name, self.project = (str(identity[key]) for key in ("id", "name", "project"))
        self.dir = directory
        self.config = config
        self.summary = {}
        self._next_step = 0
        self._row_maker = RowMaker()
        self._rows = rows
        self._backends: dict[str, Backend] = {}
        self._is_finished = False
        self._lock = threading.RLock()  # handlers may log from their own threads, and signal handlers within log()
        self._store = ArtifactStore(directory.parent)
        self._has_handler = False  # whether it handles SIGTERM
        self._pid = os.getpid()
        self._read_summary()
        write_json(self.dir / "config.json", self.config)
        self._write_status("running")
        atexit.register(self._leave_at_exit)
        self._catch_sigterm()

    def add_backend(self, name: str, backend: Backend) -> None:
        self._backends[name] = backend

    # -- what is logged --------------------------------------------------------------------------------------------

    def log(self, values: Mapping[str, object], step: int | None = None) -> None:
        self._refuse_when_finished("log()")
        row = self._row_maker.row(values)
        for own in _OWN:
            if own in row:
                raise ValueError(
                    f"Each row has a {own!r} of its own: pass step=, or log this value under another name."
                )
        if step is not None and type(step) is not int:
            step = whole_number("step", step, least=None)
        with self._lock:
            if step is None:
                step = self._next_step
            self._next_step = step + 1
            time_s = time.time()
            self._rows.append({"step": step, "time": time_s, **row})
            self.summary.update(row)
            for name in self._backends:
                self._report(name, lambda backend: backend.log(row, step, time_s))

    def log_artifact(self, artifact: Artifact, aliases: Sequence[str] = ()) -> Artifact:
        self._refuse_when_finished("log_artifact()")
        if not isinstance(artifact, Artifact):
            raise TypeError(
                f"log_artifact() takes an Artifact, but got {artifact!r}: Track.Artifact(name).add_file(path)."
            )
        with self._lock:
            self._store.put(artifact, aliases, self.dir)
            folder = artifact.download()
            self._note(artifact, "logged", aliases)
            stored = StoredFiles(
                artifact.name,
                artifact.type,
                str(artifact.version),
                str(artifact.digest),
                folder,
                artifact.files,
                [*aliases, "latest"],
            )
            for name in self._backends:
                self._report(name, lambda backend: backend.log_artifact(stored))
        return artifact

    def use_artifact(self, reference: str) -> Artifact:
        artifact = self._store.get(reference)
        if not self._is_finished:
            with self._lock:
                self._note(artifact, "used", [])
        return artifact

    def _note(self, artifact: Artifact, how: str, aliases: Sequence[str]) -> None:
        path = self.dir / "artifacts.json"
        noted = read_json(path)
        if not isinstance(noted.get(how, []), list):
            raise TrackingError(f"{path} is damaged: {how!r} must be a list of artifacts.")
        entry: dict[str, Any] = {
            "name": artifact.name,
            "version": artifact.version,
            "type": artifact.type,
            "digest": artifact.digest,
        }
        entry |= {"aliases": list(aliases), "files": artifact.digests, "time": time.time()}
        write_json(path, {**noted, how: [*noted.get(how, []), entry]})

    def _report(self, name: str, call: Callable[[Backend], None]) -> None:
        """Call a backend. A failure is only a warning: it must not end the training or the record."""
        try:
            call(self._backends[name])
        except Exception as error:
            warnings.warn(
                f"The backend {name!r} failed ({type(error).__qualname__}: {error}); the files in {self.dir} are "
                "complete without it.",
                RuntimeWarning,
                stacklevel=4,
            )

    # -- how it ends -----------------------------------------------------------------------------------------------

    def finish(self) -> None:
        self._end("finished", None)

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
            self._end("finished", None)
            return
        try:
            self._end("failed", error)
        except Exception as failure:  # must not hide the error that ended the run
            warnings.warn(
                f"The record of the failed run {self.dir} is incomplete: {failure}", RuntimeWarning, stacklevel=2
            )

    def _end(self, status: str, error: BaseException | None) -> None:
        with self._lock:
            if self._is_finished or os.getpid() != self._pid:  # a forked child does not own the record
                return
            self._is_finished = True
        atexit.unregister(self._leave_at_exit)
        with ExitStack() as last:  # from the bottom up, each even if others fail: the end of a run must be recorded
            last.callback(self._restore_sigterm)
            last.callback(self._write_status, status, error)
            last.callback(self._rows.close)
            summary, config, problems = _recordable(self.summary, self.config)
            last.callback(write_json, self.dir / "summary.json", summary)
            last.callback(write_json, self.dir / "config.json", config)
            for name in self._backends:
                self._report(name, lambda backend: backend.finish(status == "failed", summary))
        if problems:
            raise ValueError(f"The run {self.id} has ended, and its record lacks something: {' '.join(problems)}")

    def _leave_at_exit(self) -> None:
        """Finish the run of a script that ends without `finish()`, normally or by an exception."""
        error = getattr(sys, "last_value", None)
        self._end("finished" if error is None else "failed", error)

    def _catch_sigterm(self) -> None:
        """Make SIGTERM raise SystemExit, so that the run is marked, unless the signal is handled already."""
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _exit_by_signal)
            self._has_handler = True

    def _restore_sigterm(self) -> None:
        is_main = threading.current_thread() is threading.main_thread()
        if self._has_handler and is_main and signal.getsignal(signal.SIGTERM) in (_exit_by_signal, signal.SIG_IGN):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _write_status(self, status: str, error: BaseException | None = None) -> None:
        entry: dict[str, Any] = {
            "status": status,
            "time": time.time(),
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }
        if error is not None:
            entry["error"] = f"{type(error).__qualname__}: {error}"
            entry["traceback"] = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        write_json(self.dir / "status.json", entry)

    def _read_summary(self) -> None:
        """Read the summary from the rows of a resumed run: a killed run has rows, but no summary."""
        rows, _ = read_rows(self.dir / ROWS)
        if not rows:
            return
        self.summary.update(read_json(self.dir / "summary.json"))
        for row in rows:
            self.summary.update({name: value for name, value in row.items() if name not in _OWN})
        step = rows[-1].get("step")
        self._next_step = (step if type(step) is int else len(rows) - 1) + 1

    def _refuse_when_finished(self, call: str) -> None:
        if self._is_finished:
            raise RuntimeError(
                f"{call}: the run {self.id} is finished; Track.run(..., resume={self.id!r}) goes on with it."
            )


def _recordable(*settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """The recordable part of each of `settings`, and, as the last item, the list of problems with the rest."""
    recordable: list[dict[str, Any]] = []
    problems: list[str] = []
    for values in settings:
        recordable.append({})
        for key, value in values.items():
            try:
                recordable[-1][str(key)] = plain(value, (key,))
            except Exception as error:  # a user's `repr` may raise anything
                problems.append(str(error) if isinstance(error, ValueError) else f"{key!r}: {error!r}")
    return *recordable, problems


def _exit_by_signal(number: int, frame: FrameType | None) -> None:
    # Schedulers may send it twice: the second one must not cut short the writing of the record.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(128 + number)
