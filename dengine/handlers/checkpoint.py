"""The policy of checkpoints: when to save and what to keep. dengine/checkpoint/ writes and loads them."""

import os
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from dengine.checkpoint import resuming, tiers
from dengine.checkpoint.catalogue.entry import Entry
from dengine.checkpoint.catalogue.retention import is_kept
from dengine.checkpoint.formats.base import Background, Format, SaveOutcome, SaveRequest
from dengine.checkpoint.formats.file import FileFormat
from dengine.checkpoint.formats.folder import FolderFormat
from dengine.checkpoint.formats.nodes import Nodes
from dengine.checkpoint.planning import Planner
from dengine.checkpoint.states.snapshot import check_objects, collect
from dengine.checks import path_of, whole_number
from dengine.comm.outcome import from_rank_zero
from dengine.engine import Engine, Events
from dengine.engine.phases import Phase
from dengine.errors import CheckpointError, ConsistencyError
from dengine.handlers.priorities import Priority
from dengine.handlers.score import check_score_function, score_of
from dengine.handlers.step import StepTransform, check_step_transform, step_of
from dengine.launch.world import needs_all_ranks
from dengine.naming import other_keywords, other_names, shown
from dengine.types import MetricValue

__all__ = ["Checkpoint", "Saved"]

Placement: TypeAlias = Literal["shared", "node"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
_PATIENCE_S = 1.0  # after this time, the user is told why an interrupted run does not end


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete. `score` is None if the newest are kept rather than the best."""

    path: Path
    step: int
    score: float | None = None


@other_names(
    attach="it takes one event, so write trainer.on(Events.EPOCH_COMPLETED, handler)",
    load_objects="write Checkpoint.resume(save_dir, objects), or dengine.checkpoint.load(path, objects)",
    last_checkpoint="it is last_path",
)
class Checkpoint:
    """Saves objects with a `state_dict` to `{save_dir}/{filename_prefix}_{step}.pt`, or with a score to
    `{filename_prefix}_{step}_{score_name}={score:.4f}.pt`. `torch.load(path, weights_only=True)` gives
    `{name: state_dict}`, and one entry `"dengine"`. If something is sharded (FSDP2), or ranks have different parts
    of a model (`parts=` of `prepare_model`) or states of their own (`PerRank`), all ranks write what they have into a
    folder of that name without the `.pt`; nothing is gathered, and any number of ranks can load it (as many ranks as
    before, of `PerRank`).

    Attach it on every rank: `trainer.on(Events.EPOCH_COMPLETED, checkpoint)`. Rank 0 writes a file; every rank gets the
    outcome. A file with its final name is complete, and is verified when it is loaded; `manifest.json` beside it lists
    all checkpoints. Older ones are removed only after the new one is safe; they are counted from the manifest, so that
    a restarted run goes on pruning, and with the best score. Several `Checkpoint`s may share a folder, and also a
    prefix if their `score_name` differs: each prunes only its own files.

    Collective. Cost: two small broadcasts and one small gather a call, five more if something is sharded (three, if
    asynchronous; two more at the first save); one broadcast if the score is not good enough.

    Args:
        to_save: what to save, by name; a model wrapped in DDP is saved without the wrapper. If there is
            an engine in it, the random number generators of every rank are saved, too. The optimizer of a sharded model
            is saved by the names of its parameters, so it needs that model in here.
        save_dir: the folder; it is made at the first save.
        n_saved: how many of its own files are kept: the last or, with a score, the best (higher is better); None: all.
        score_function: `score_function(engine) -> float`, called on rank 0. NaN is never best.
        score_name: the name of the score in the file's name; "score" by default.
        global_step_transform: `(engine, event) -> int`, the step in the file's name; by default the engine's iteration,
            or that of the trainer whose handler runs the engine, an evaluator.
        asynchronous: stop the loop only for a copy of the states to host memory, and write in a thread. The copy is as
            large as the file (on rank 0) or as each rank's part of a folder, and its memory is used again. Only one
            write runs at a time: the next save waits for it. A failed write is raised on every rank at the next save
            or at the end of the run, which waits for the last write. If a run ends by an exception, each rank waits
            for its own write, and a failed write is a warning.
        placement: "shared": `save_dir` is one folder that all nodes see. "node": `save_dir` is a folder of each node's
            own, such as `/dev/shm/run7` in its memory, and each node keeps a copy there, which its first rank writes:
            cheap enough to save every few steps, beside another `Checkpoint` on a disk that outlives the nodes.
            `resume([fast_dir, safe_dir], ...)` takes the newest. Of the model and the optimizer nothing is sent.
            Before the first save, the room in the folder is checked. One job owns a folder at a time.

    Attributes:
        last_path: the file or folder of the last save that is safe on the disk, on every rank; None before it.
        saved: the kept checkpoints, in the order of saving, on every rank; with `asynchronous`, as of the last call.

    Raises (when called):
        TypeError: `score_function` gave no number, or `global_step_transform` no whole number.
        CheckpointError: on every rank, if it cannot be written; older checkpoints are untouched.
        ConsistencyError: the engine has a `ConsistencyCheck(before_saving=True)`, which has found a difference.

    Example:
        >>> import tempfile, torch
        >>> from dengine import Engine, Events
        >>> model, folder = torch.nn.Linear(1, 1), tempfile.mkdtemp()
        >>> trainer = Engine(lambda engine, batch: None)
        >>> checkpoint = Checkpoint({"model": model, "trainer": trainer}, folder, n_saved=2)
        >>> handle = trainer.on(Events.EPOCH_COMPLETED, checkpoint)
        >>> state = trainer.run([0, 1, 2], max_epochs=3)
        >>> [saved.path.name for saved in checkpoint.saved]
        ['checkpoint_6.pt', 'checkpoint_9.pt']
        >>> Checkpoint.resume(folder, {"model": model, "trainer": trainer}).name
        'checkpoint_9.pt'
    """

    is_collective = True
    phase = Phase.SAVE

    @other_keywords(
        dirname="it is called save_dir=",
        dirpath="it is called save_dir=",
        save_handler="give save_dir=, the folder",
        save_top_k="it is called n_saved=",
        monitor="give score_function=, such as lambda engine: evaluator.state.metrics['acc']",
        require_empty="a folder may hold other files, and other checkpoints are left alone",
        filename_pattern="give filename_prefix=, score_name= and global_step_transform=",
    )
    def __init__(
        self,
        to_save: Mapping[str, object],
        save_dir: str | Path,
        filename_prefix: str = "checkpoint",
        n_saved: int | None = 1,
        score_function: Callable[[Engine], MetricValue] | None = None,
        score_name: str | None = None,
        global_step_transform: StepTransform | None = None,
        asynchronous: bool = False,
        placement: Placement = "shared",
    ) -> None:
        if placement not in PLACEMENTS:
            raise ValueError(
                f"placement={placement!r} must be one of {', '.join(map(repr, PLACEMENTS))}: one copy in a folder that "
                "all nodes share, or one copy on each node."
            )
        if score_function is not None:
            check_score_function(score_function)
        elif score_name is not None:
            raise ValueError(f"score_name={score_name!r} names a score, but there is no score_function=.")
        check_step_transform("global_step_transform", global_step_transform)
        self._objects = check_objects(to_save)
        self._save_dir = path_of("save_dir", save_dir)
        self._prefix = filename_prefix
        self._n_saved = sys.maxsize if n_saved is None else whole_number("n_saved", n_saved, least=1)
        self._score_function = score_function
        self._score_name = None if score_function is None else score_name or "score"
        self._step_transform = global_step_transform
        self._is_asynchronous = bool(asynchronous)
        self.last_path: Path | None = None
        self._kept: list[Entry] = []
        is_nodes_own = placement == "node"
        self._nodes = Nodes(self._save_dir, self._n_saved) if is_nodes_own else None
        self._planner = Planner(
            self._save_dir, self._prefix, self._score_name, self._n_saved, is_nodes_own=is_nodes_own
        )
        self._has_looked = False  # into the folder, so that it holds what is kept
        self._watched: weakref.WeakSet[Engine] = weakref.WeakSet()
        self._folder_format = FolderFormat()  # remembers who writes what
        self._background = Background()  # ranks other than 0 use it for folders only

    def __repr__(self) -> str:
        return shown(
            self,
            list(self._objects),
            str(self._save_dir),
            filename_prefix=self._prefix,
            n_saved="all" if self._n_saved == sys.maxsize else self._n_saved,
            score_name=self._score_name,
            asynchronous=self._is_asynchronous or None,
            placement=None if self._nodes is None else "node",
        )

    @property
    def saved(self) -> list[Saved]:
        return [Saved(self._save_dir / each.name, each.step or 0, each.score) for each in self._kept]

    @staticmethod
    def resume(
        save_dir: str | Path | Sequence[str | Path | tuple[str | Path, str]],
        to_load: Mapping[str, object],
        filename_prefix: str = "checkpoint",
    ) -> Path | None:
        """Load the newest intact checkpoint of `filename_prefix`, and give its path; None if there is none yet.

        `save_dir` may be a list of folders, such as `[fast_dir, safe_dir]`, each with a prefix of its own if it is a
        pair `(folder, prefix)`. Then the newest in any of them counts, which is that with the highest step; a node that
        lacks it, or has a damaged copy, gets it over the network from one that has it.

        Call it on every rank, before `run()`. If an engine is in `to_load`, the next `run()` goes on from there, with
        each rank's random number generators as they were. Checks and costs are those of `dengine.checkpoint.load`.

        Raises:
            CorruptCheckpointError: there are checkpoints, but none is intact.
            CheckpointError: on every rank, if `save_dir` is a checkpoint rather than its folder, a rank does not find
                the file, or an object refuses its state; every object is then as it was. Or a folder of the list is
                in use by another job.
        """
        if isinstance(save_dir, (str, os.PathLike)):
            return resuming.resume(save_dir, to_load, filename_prefix)
        return tiers.resume_newest(save_dir, to_load, filename_prefix)

    def __call__(self, engine: Engine) -> None:
        if not engine.distributed:
            needs_all_ranks(
                "This engine is one rank's own (distributed=False), but saving takes all ranks: attach the Checkpoint "
                "to an engine that runs on all of them."
            )
        if engine.save_phase.is_put_off:
            engine.save_phase.waiting.append(self._save_if_due)
        else:
            self._save_if_due(engine)

    def _save_if_due(self, engine: Engine) -> None:
        self._watch(engine)
        outcome, request = from_rank_zero(lambda: self._request(engine), "plan a checkpoint")
        self._take(outcome)
        if request is None:
            return
        self._call_checks(engine, request)
        try:
            self._save(request)
        except BaseException:
            self._has_looked = False  # an interrupt may have come before the file had its name, or after
            raise
        finally:
            if (job := self._background.job) is not None:
                # Last, and without a reference to the states: from here on the thread competes for the interpreter.
                job.writing.go()
        if engine.firing in (Events.COMPLETED, Events.EXCEPTION_RAISED):
            self.wait()  # there is no later call that could raise it

    def wait(self) -> None:
        """Wait for the last write, and raise on every rank if it failed. The end of a run does this by itself.

        Collective: one small broadcast; nothing at all if saving is not asynchronous.

        Raises:
            CheckpointError: on every rank, if it failed.
        """
        if self._is_asynchronous:
            self._take(from_rank_zero(self._resolve, "wait for a checkpoint to be written"))
            self._resolve()

    # -- on every rank -------------------------------------------------------------------------------------------

    def _call_checks(self, engine: Engine, request: SaveRequest) -> None:
        try:
            engine.before_save()
        except ConsistencyError as error:
            refusal = f"{self._path(request, '')} was not saved, and older ones are as they were."
            raise ConsistencyError(f"{refusal} {error}") from None

    def _save(self, request: SaveRequest) -> None:
        collected = collect(self._objects)
        format: Format = self._folder_format if collected.needs_folder else FileFormat()
        path = self._path(request, format.ending)
        if self._is_asynchronous:
            self._resolve()  # this rank's part of the previous save, which rank 0 has resolved
        background = self._background if self._is_asynchronous else None
        plan = partial(self._planner.plan, path, request, self._kept, self._objects, collected.num_ranks)
        if (outcome := format.save(path, collected, self._objects, plan, background, self._nodes)) is not None:
            self._take(outcome)

    def _path(self, request: SaveRequest, ending: str) -> Path:
        score = "" if request.score is None else f"_{self._score_name}={request.score:.4f}"
        return self._save_dir / f"{self._prefix}_{request.step}{score}{ending}"

    def _take(self, outcome: SaveOutcome) -> None:
        if self._noted(outcome).failure is not None:
            raise CheckpointError(outcome.failure)

    def _watch(self, engine: Engine) -> None:
        """Wait at the end of the run, the last point that all ranks reach."""
        if self._is_asynchronous and engine not in self._watched:
            self._watched.add(engine)
            engine.on(Events.COMPLETED, lambda engine: self.wait(), priority=Priority.FINISHED)
            engine.on(Events.TERMINATED, self._wait_if_preempted, priority=Priority.FINISHED)
            engine.on(Events.EXCEPTION_RAISED, self._wait_alone, priority=Priority.FINISHED)

    def _wait_if_preempted(self, engine: Engine) -> None:
        """Wait at `TERMINATED` if the run was preempted, since `COMPLETED` does not fire then."""
        if engine.state.preempted:
            self.wait()

    def _wait_alone(self, engine: Engine) -> None:
        """Wait without a collective: other ranks may not come here after an exception. An error becomes a warning."""
        self._background.is_leaving.set()
        if (job := self._background.job) is not None and not job.writing.is_done_within(_PATIENCE_S):
            warnings.warn(f"{job.plan.path} is still being written: the run ends once it is safe.", stacklevel=2)
        self._take(self._resolve())

    # -- on rank 0 -----------------------------------------------------------------------------------------------

    def _request(self, engine: Engine) -> tuple[SaveOutcome, SaveRequest | None]:
        """The outcome of the last write, and the request for this save: None if the score is not among the best."""
        if (job := self._background.job) is not None and job.writing.is_done and (outcome := self._resolve()).failure:
            return outcome, None
        found = None
        if not self._has_looked:
            found = self._kept = self._planner.first_look()
            self._has_looked = True
        score = None if self._score_function is None else score_of(engine, self._score_function, "a Checkpoint")
        # A checkpoint that is still being written counts as saved: if that fails, the run ends.
        if score is not None and not is_kept(score, self._background.expected(self._kept), self._n_saved):
            return self._known(), None
        step = step_of(engine, self._step_transform, self._objects.values())
        if self._background.job is not None:
            self._background.warn_of_waiting()
            if (outcome := self._resolve()).failure is not None:
                return outcome, None
        if found is not None:
            self._planner.warn_of_later(found, step)
        return self._known(), SaveRequest(step, score)

    def _resolve(self) -> SaveOutcome:
        """Wait for the current write, and note its outcome."""
        return self._noted(self._background.resolve(self._known()))

    def _noted(self, outcome: SaveOutcome) -> SaveOutcome:
        # The folder of this node may have another path than rank 0's.
        self._kept, self.last_path = outcome.kept, None if outcome.last is None else self._save_dir / outcome.last.name
        return outcome

    def _known(self) -> SaveOutcome:
        return SaveOutcome(self._kept, self.last_path)
