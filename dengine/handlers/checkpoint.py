"""Saves what a user lists, so that a file under its final name is complete and the older ones go only after it."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from dengine.checkpoint.retention import Saved, is_kept, to_drop
from dengine.checkpoint.snapshot import check_objects, collect
from dengine.checkpoint.storage import commit, remove, write_beside
from dengine.checks import whole_number
from dengine.distributed.collectives import from_rank_zero
from dengine.engine import Engine
from dengine.errors import CheckpointError

__all__ = ["Checkpoint"]


class Checkpoint:
    """Saves objects with a `state_dict` to `{save_dir}/{filename_prefix}_{step}.pt`, or with a score to
    `{filename_prefix}_{step}_{score_name}={score:.4f}.pt`. `torch.load(path, weights_only=True)` gives
    `{name: state_dict}`, and one entry `"dengine"`.

    Attach it on every rank: `trainer.on(Events.EPOCH_COMPLETED, checkpoint)`. Rank 0 writes; every rank learns the
    outcome. Collective. Cost: two small object broadcasts a call, one where the score is not good enough.

    Args:
        to_save: what to save, by name; a model wrapped in DDP is saved without the wrapper.
        save_dir: the folder; it is made at the first save.
        n_saved: how many of its own files are kept: the newest or, with a score, the best (higher is better).
        score_function: `score_function(engine) -> float`, asked on rank 0. NaN is never best.
        score_name: how the score is called in the file's name; "score" by default.
        global_step_transform: `(engine, event) -> int`, the step in the file's name; the engine's iteration by default.

    Attributes:
        last_path: the file of the last save, on every rank; None before it.
        saved: what is kept, oldest first, on every rank.

    Raises (when called):
        CheckpointError: on every rank, where the file cannot be written; what was there before is untouched.

    Example:
        >>> import tempfile, torch
        >>> from dengine import Engine, Events
        >>> model = torch.nn.Linear(1, 1)
        >>> trainer = Engine(lambda engine, batch: None)
        >>> checkpoint = Checkpoint({"model": model, "trainer": trainer}, tempfile.mkdtemp(), n_saved=2)
        >>> handle = trainer.on(Events.EPOCH_COMPLETED, checkpoint)
        >>> state = trainer.run([0, 1, 2], max_epochs=3)
        >>> [saved.path.name for saved in checkpoint.saved]
        ['checkpoint_6.pt', 'checkpoint_9.pt']
    """

    def __init__(
        self,
        to_save: Mapping[str, Any],
        save_dir: str | Path,
        filename_prefix: str = "checkpoint",
        n_saved: int = 1,
        score_function: Callable[[Engine], float] | None = None,
        score_name: str | None = None,
        global_step_transform: Callable[[Engine, Any], int] | None = None,
    ) -> None:
        if score_name is not None and score_function is None:
            raise ValueError(f"score_name={score_name!r} names a score, but there is no score_function=.")
        for part in (filename_prefix, score_name or ""):
            if "/" in part or "\0" in part:
                raise ValueError(f"{part!r} becomes part of a file's name, so it cannot hold a slash.")
        self._objects = check_objects(to_save)
        self._save_dir = Path(save_dir)
        self._prefix = filename_prefix
        self._n_saved = whole_number("n_saved", n_saved, least=1)
        self._score_function = score_function
        self._score_name = score_name or "score"
        self._step_transform = global_step_transform
        self.last_path: Path | None = None
        self.saved: list[Saved] = []

    def __call__(self, engine: Engine) -> None:
        planned = from_rank_zero(lambda: self._plan(engine), "plan a checkpoint")
        if planned is None:
            return
        # A step saved twice is one file.
        saved = [one for one in self.saved if one.path != planned.path] + [planned]
        dropped = to_drop(saved, self._n_saved)
        states = collect(self._objects)  # on all ranks: a sharded model's takes a collective
        failure = from_rank_zero(lambda: _save(states, planned.path, dropped), f"save {planned.path}")
        if failure is not None:
            raise CheckpointError(f"{planned.path} could not be saved, and nothing was changed: {failure}")
        self.last_path = planned.path
        self.saved = [one for one in saved if one not in dropped]

    def _plan(self, engine: Engine) -> Saved | None:
        """What to save now, or None where the score is not among the best. Decided once, on rank 0."""
        score = None if self._score_function is None else float(self._score_function(engine))
        if not is_kept(score, self.saved, self._n_saved):
            return None
        step = engine.state.iteration
        if self._step_transform is not None:
            step = whole_number("The step", self._step_transform(engine, engine.firing), least=0)
        suffix = "" if score is None else f"_{self._score_name}={score:.4f}"
        return Saved(self._save_dir / f"{self._prefix}_{step}{suffix}.pt", step, score)


def _save(states: dict[str, Any], path: Path, dropped: list[Saved]) -> str | None:
    """Write, commit, and only then prune. What went wrong, or None."""
    try:
        temporary = write_beside(path, lambda file: torch.save(states, file))
        commit(temporary, path)
    except Exception as error:
        return f"{type(error).__qualname__}: {error}"
    for one in dropped:
        try:
            remove(one.path)
        except OSError as error:
            warnings.warn(f"The superfluous checkpoint {one.path} could not be removed: {error}", stacklevel=2)
    return None
