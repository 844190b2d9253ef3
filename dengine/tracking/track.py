"""`Track`, which opens runs. Only this module of the subpackage asks for the rank."""

import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from dengine.checks import path_of
from dengine.distributed import world
from dengine.launch.env import find_launch
from dengine.tracking.artifacts import Artifact
from dengine.tracking.backend import BACKENDS, RunInfo, open_backend
from dengine.tracking.file_run import FileRun
from dengine.tracking.files import TrackingError, path_part, read_json, refuse_outside, write_json
from dengine.tracking.rows import ROWS, RowFile
from dengine.tracking.run import NullRun, Run
from dengine.tracking.values import plain

__all__ = ["Mode", "Track"]

Mode = Literal["online", "offline", "disabled"]
_MODES = ("online", "offline", "disabled")


class Track:
    """Records runs as plain files, without a server, an account, or a package.

    Example:
        >>> import json, tempfile
        >>> from dengine.tracking import Track
        >>> with Track.run(project="digits", config={"lr": 0.1}, dir=tempfile.mkdtemp()) as run:
        ...     run.log({"train": {"loss": 0.5}}, step=0)
        >>> row = json.loads((run.dir / "metrics.jsonl").read_text())
        >>> row["step"], row["train/loss"]
        (0, 0.5)
    """

    Artifact = Artifact
    _mode: Mode = "online"

    @staticmethod
    def run(
        project: str,
        name: str | None = None,
        config: object = None,
        tags: Sequence[str] | None = (),
        dir: str | Path | None = None,
        resume: str | None = None,
        backend: str | Sequence[str] = (),
    ) -> Run:
        """Open a run; use it in a `with`, so that it ends with the block, marked as failed if the block raises.

        Call it on every rank: rank 0 records, and on other ranks the same calls do nothing. It is not a collective.
        Under a launcher it may also be called before `process_group()`.

        Args:
            project: the name of the project, a folder in `dir`. Artifacts are shared within a project.
            config: a mapping, a dataclass or an `argparse.Namespace`; values without JSON are kept as their `repr`.
            tags: words with which the run can be found.
            dir: the folder of the projects; "runs" in the current folder by default. The run's own folder is
                `dir/project/id`.
            resume: the id of a run to continue: rows are added to it, and `config` is merged into its own. An
            incomplete line that a killed process left is removed. backend: "trackio", "tensorboard", "wandb",
            "mlflow", or several of them, to report to as well.

        Raises:
            TypeError, ValueError: an argument is wrong, or there is no run with that id; the message lists the known
            ones. TrackingError: the folder cannot be written, or that run is being recorded already.
            ModuleNotFoundError: the package of a backend is missing; the message names the extra to install.
        """
        root = Path(os.path.abspath(path_of("dir", "runs" if dir is None else dir)))
        path_part("project", project)
        names = _checked_backends(backend)
        settings = {} if config is None else plain(config)
        if not isinstance(settings, dict):
            raise TypeError(f"config={config!r} must be a dict of settings: Conf.to_dict(cfg) gives one.")
        if isinstance(tags, str):
            raise TypeError(f"tags={tags!r} must be a list of words: [{tags!r}].")
        tags = () if tags is None else tags
        if Track._mode == "disabled" or _rank() != 0:
            return NullRun(name, project, root, settings)
        identity = _identity(project, name, tags) if resume is None else _resumed(root / project, resume, name, tags)
        return _opened(root, identity, settings, names, is_resumed=resume is not None)

    @staticmethod
    def set_mode(mode: Mode) -> None:
        """Set the mode of runs that are opened from now on.

        "online" lets backends reach their configured servers; "offline" keeps them on this machine; "disabled" records
        nothing.

        Raises: ValueError: there is no such mode.
        """
        if mode not in _MODES:
            raise ValueError(f"There is no mode {mode!r}; there is {', '.join(map(repr, _MODES))}.")
        Track._mode = mode


def _rank() -> int:
    """The rank of this process; before the process group is opened, the rank in the launcher's variables."""
    here = world()
    launch = find_launch(os.environ) if here.launcher == "single" else None
    return here.rank if launch is None else launch.rank


def _checked_backends(backend: str | Sequence[str]) -> list[str]:
    names = [backend] if isinstance(backend, str) else list(backend)
    for name in names:
        if name not in BACKENDS:
            open_backend(name, None)  # type: ignore[arg-type]  # raises, and says what there is
    return list(dict.fromkeys(names))


def _identity(project: str, name: str | None, tags: Sequence[str]) -> dict[str, Any]:
    # Sorts by time; the letters do not come from a random number generator that training uses.
    run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    return {
        "id": run_id,
        "name": name or run_id,
        "project": project,
        "tags": [str(tag) for tag in tags],
        "created": time.time(),
        "command": sys.argv,
    }


def _resumed(project_dir: Path, run_id: str, name: str | None, tags: Sequence[str]) -> dict[str, Any]:
    path = project_dir / path_part("resume", run_id) / "run.json"
    if not path.is_file():
        have = sorted(each.parent.name for each in project_dir.glob("*/run.json"))
        close = get_close_matches(run_id, have, n=1)
        raise ValueError(
            f"There is no run {run_id!r} in {project_dir}; there is {', '.join(map(repr, have[-10:])) or 'none'}"
            f"{f' (closest: {close[0]!r})' if close else ''}."
        )
    identity = read_json(path)
    old_name, old_tags = identity.get("name", run_id), identity.get("tags", [])
    if not isinstance(old_name, str) or not isinstance(old_tags, list):
        raise TrackingError(f"{path} is damaged: it needs a name, which is text, and a list of tags.")
    all_tags = dict.fromkeys(map(str, [*old_tags, *tags]))
    # The folder decides which run it is: a file from somebody else must not lead to another folder.
    return {
        **identity,
        "id": run_id,
        "project": project_dir.name,
        "name": name or old_name,
        "tags": list(all_tags),
    }


def _opened(
    root: Path, identity: dict[str, Any], config: dict[str, Any], backends: Sequence[str], *, is_resumed: bool
) -> FileRun:
    directory = root / identity["project"] / identity["id"]
    refuse_outside(directory, root / identity["project"])
    try:
        directory.mkdir(parents=True, exist_ok=is_resumed)
        rows = RowFile(directory / ROWS)
        write_json(directory / "run.json", identity)
        config = _laid_over(read_json(directory / "config.json"), config)
        run = FileRun(identity, directory, config, rows)
    except OSError as error:
        raise TrackingError(
            f"The run cannot be recorded in {directory}: {error}. Pass a folder that can be written as dir=, or call "
            'Track.set_mode("disabled").'
        ) from error
    info = RunInfo(
        run.id, run.name, run.project, directory, config, identity["tags"], is_resumed, Track._mode == "offline"
    )
    for name in backends:
        try:
            run.add_backend(name, open_backend(name, info))
        except BaseException as error:
            run.__exit__(type(error), error, error.__traceback__)
            raise
    return run


def _laid_over(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    laid = dict(old)
    for key, value in new.items():
        below = laid.get(key)
        laid[key] = _laid_over(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return laid
