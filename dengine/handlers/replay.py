"""Run a step twice, and compare the gradients bit by bit: a device that computes wrongly is found."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dengine.checks import whole_number
from dengine.comm.collectives import all_gather_object
from dengine.distributed import unwrap_model
from dengine.dtensor import any_dtensor, local_part
from dengine.engine import Engine, Events
from dengine.engine.handler_checks import collective
from dengine.errors import ReplayError
from dengine.handlers.arguments import check_engine
from dengine.handlers.own_generators import OwnGenerators
from dengine.handlers.priorities import Priority
from dengine.handlers.step_states import StepStart, unsent_in
from dengine.naming import a_type, shown
from dengine.parallel.gradients import find_ddp
from dengine.torch_internals import HIDDEN_BY_COMPILE, SENDS_BUFFERS_NEXT, has_final_buckets

__all__ = ["Replay"]

_OWN, _REDUCED = "own", "reduced"


class Replay:
    """Runs a step's forward and backward pass twice, every `every` iterations, and compares the gradients bit by bit.

    The second pass starts from the same generators and buffers, and the comparison is made before the optimizer steps,
    so that nothing wrong gets into the weights. A difference is a `ReplayError` on every rank, with the parameter's
    name, and the rank whose own gradient differs before gradients are averaged. It means that a device computes
    wrongly now and then, or that the step is not deterministic: `torch.use_deterministic_algorithms(True)` names
    operations that are not.

    Attach it on every rank: `Replay(model).attach(trainer)`, after `prepare_model`. The step may be one by hand: it is
    called once more, and broken off where the optimizer steps (not caught by `except Exception`). What it does besides,
    until there, it does twice; generators other than Python's, NumPy's and torch's default ones are not set back, so a
    step that draws from one of its own is refused, with its name. With loss scaling (fp16) or DeepSpeed it cannot work.

    Args:
        model: the model as it is called, wrapped or not.
        every: iterations from one comparison to the next.

    Raises:
        TypeError, ValueError: `model` is no module, or `every` no whole number of at least 1; the trainer scales its
            loss, or trains with DeepSpeed.
        ReplayError: (in a step) the gradients differ, or the step draws from a generator of its own.

    Cost: every `every` iterations one more forward and backward pass, with its collectives, two more copies of the
        gradients meanwhile, one wait for the device, and one gather of small objects; nothing in the others.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> def train_step(engine, batch):
        ...     optimizer.zero_grad()
        ...     model(batch).sum().backward()
        ...     optimizer.step()
        >>> trainer = Engine(train_step)
        >>> Replay(model, every=2).attach(trainer)
        >>> state = trainer.run(torch.ones(4, 1, 1))
    """

    def __init__(self, model: nn.Module, every: int = 1000) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Replay() takes a torch.nn.Module, but got {a_type(model)}.")
        if any(base.__name__ == "DeepSpeedEngine" for base in type(model).__mro__):
            raise ValueError(
                "DeepSpeed makes its steps by itself, so that a Replay cannot break one off: leave it out."
            )
        self._every = whole_number("every", every, least=1)
        self._model = model
        bare = unwrap_model(model)
        named = {name.replace(f"{HIDDEN_BY_COMPILE}.", ""): each for name, each in bare.named_parameters()}
        self._parameters = named
        self._ids = {id(each) for each in named.values()}
        self._start = StepStart(model)
        self._first: dict[str, list[Tensor]] | None = None  # the gradients of the rehearsal, while its step runs
        self._own: dict[str, list[Tensor]] = {}  # this rank's gradients, in the pass that runs
        self._ends: list[Callable[[], None]] = []

    def __repr__(self) -> str:
        return shown(self, self._model, every=self._every)

    def attach(self, engine: Engine) -> None:
        """Compare steps of `engine`. Raises: TypeError, ValueError: it is no Engine, or scales its loss."""
        check_engine(self, engine)
        if hasattr(engine.state, "grad_scaler"):
            raise ValueError(
                "Replay cannot run a step twice whose loss is scaled (fp16), as the scaler counts steps: train in bf16."
            )
        engine.on(Events.ITERATION_STARTED(every=self._every), self._rehearse, priority=Priority.FINISHED)
        engine.on(Events.ITERATION_COMPLETED(every=self._every), self._finish, priority=Priority.GUARD + 1)

    # -- handlers --------------------------------------------------------------------------------------------------

    @collective
    def _rehearse(self, engine: Engine) -> None:
        """Run the step up to the optimizer, and put everything back."""
        ddp, repeats = find_ddp(self._model), engine.repeats
        if ddp is not None and not (has_final_buckets(ddp) or ddp.find_unused_parameters):
            return  # the order of its sums changes after the first backward pass
        if engine.state.batch is None:
            return  # the step is not called
        generators = OwnGenerators(repeats.step, unwrap_model(self._model))
        self._start.find_buffers()
        self._start.take()
        grads = [
            (*place, grad, None if grad is None else grad.clone())
            for place in self._slots()
            for grad in [getattr(*place)]
        ]
        sends_buffers = getattr(ddp, SENDS_BUFFERS_NEXT, True)
        set_back = [remember() for remember in repeats.remember]
        self._watch(_leave_step)
        repeats.is_rehearsal = True
        try:
            repeats.run(engine.state.iteration, engine.state.batch)
        except _StepLeft:
            pass
        finally:
            repeats.is_rehearsal = False
            self._unwatch()
        found = self._gradients()
        self._start.restore()
        for holder, name, grad, kept in grads:
            if grad is not None and kept is not None:
                local_part(grad).copy_(local_part(kept))
            setattr(holder, name, grad)
        for each in set_back:
            each()
        if ddp is not None:
            setattr(ddp, SENDS_BUFFERS_NEXT, sends_buffers)
        if (drawn := generators.drawn_from()) is not None:
            raise ReplayError(
                f"The step draws from a generator of its own, {drawn!r}, which Replay cannot set back, so that its two "
                "passes would differ: draw from torch's default generator, seeded by torch.manual_seed(), or leave "
                "Replay out.",
                parameter=None,
                rank=None,
            )
        self._first = found
        self._watch(lambda: self._compare(engine))

    def _finish(self, engine: Engine) -> None:
        """Compare after an iteration in which no optimizer has stepped: within an accumulation."""
        if self._first is not None and engine.repeats.is_left_out:
            self._first = None  # the guard has changed gradients to tell other ranks
        if self._first is not None:
            self._compare(engine)
        self._unwatch()

    # -- the two passes --------------------------------------------------------------------------------------------

    def _slots(self) -> list[tuple[Any, str]]:
        """Where there are gradients: objects and the names of their attributes."""
        unsent = unsent_in(self._model)
        return [*((each, "grad") for each in self._parameters.values()), *unsent]

    def _watch(self, at_step: Callable[[], None]) -> None:
        """Keep this rank's gradients before they are averaged, and call `at_step` before the optimizer steps."""
        self._own = {}

        def before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            if any(id(each) in self._ids for group in optimizer.param_groups for each in group["params"]):
                at_step()

        self._ends = [register_optimizer_step_pre_hook(before_step).remove]
        for name, parameter in self._parameters.items():
            if parameter.requires_grad:
                self._ends.append(parameter.register_hook(self._keeper(name)).remove)  # type: ignore[no-untyped-call]

    def _keeper(self, name: str) -> Callable[[Tensor], None]:
        def keep(gradient: Tensor) -> None:
            self._own.setdefault(name, []).append(_values(gradient).clone())

        return keep

    def _unwatch(self) -> None:
        for end in self._ends:
            end()
        self._ends = []

    def _gradients(self) -> dict[str, list[Tensor]]:
        """The gradients that are there now: each parameter's own ones, and last the reduced one."""
        found = {}
        for name, parameter in self._parameters.items():
            reduced = [] if parameter.grad is None else [_values(parameter.grad).clone()]
            found[name] = self._own.get(name, []) + reduced
        return found

    def _compare(self, engine: Engine) -> None:
        """Compare the two passes on all ranks. Collective. Raises: ReplayError: they differ."""
        first, self._first = self._first, None
        if first is None:
            return
        second, own = self._gradients(), self._own
        self._unwatch()
        mine = _first_difference(first, second, own)
        found = all_gather_object(mine) if engine.distributed else [mine]
        if any(each is not None for each in found):
            self._raise(engine, found)

    def _raise(self, engine: Engine, found: list[tuple[str, str] | None]) -> NoReturn:
        """Raise what was found, for each rank: a parameter, and whether its own or the reduced gradient differs."""
        known = [(rank, *each) for rank, each in enumerate(found) if each is not None]
        own = [(rank, name) for rank, name, kind in known if kind == _OWN]
        alone = len(known) < len(found) or len(found) == 1
        is_known = bool(own) or (alone and not any_dtensor(self._parameters.values()))
        rank, name = own[0] if own else known[0][:2]
        at = f"on rank {rank}" if is_known else "in the reduction over the ranks, or in a part that was reduced"
        raise ReplayError(
            f"The gradient of {name!r} differs between two runs of the step of iteration {engine.state.iteration}, "
            f"{at}: a device computes wrongly, or the step is not deterministic. The optimizer has not stepped. "
            "torch.use_deterministic_algorithms(True) names operations that are not deterministic; a step that draws "
            "from a generator of its own differs, too. Otherwise have that rank's device tested.",
            parameter=name,
            rank=rank if is_known else None,
        )


class _StepLeft(BaseException):
    """Leaves a step where its optimizer would step."""


def _leave_step() -> NoReturn:
    raise _StepLeft


def _first_difference(
    first: dict[str, list[Tensor]], second: dict[str, list[Tensor]], own: dict[str, list[Tensor]]
) -> tuple[str, str] | None:
    """The first parameter whose gradients differ, and whether it is this rank's own or the reduced one."""
    found: list[tuple[str, str, bool | Tensor]] = []
    for name, theirs in second.items():
        if len(first[name]) != len(theirs):
            found.append((name, _OWN, True))
        for index, (one, other) in enumerate(zip(first[name], theirs, strict=False)):
            found.append((name, _OWN if index < len(own.get(name, [])) else _REDUCED, _differ(one, other)))
    flags = [each for _, _, each in found if isinstance(each, Tensor)]
    read = iter(torch.stack([each.to(flags[0].device) for each in flags]).tolist() if flags else [])
    wrong = [(name, kind) for name, kind, each in found if (next(read) if isinstance(each, Tensor) else each)]
    return min(wrong, key=lambda each: each[1] != _OWN, default=None)


def _differ(one: Tensor, other: Tensor) -> bool | Tensor:
    """Whether a bit differs, on the device of the tensors."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return True
    return (_bits(one) != _bits(other)).any()


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _values(gradient: Tensor) -> Tensor:
    part = local_part(gradient.detach())
    return part.coalesce().values() if part.is_sparse else part
