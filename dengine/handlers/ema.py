"""Keep an exponential moving average of a model's weights."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dengine.checks import is_number, whole_number
from dengine.compiled_names import aligned
from dengine.distributed import unwrap_model
from dengine.dtensor import any_dtensor, cut_like, is_dtensor, laid_out_like, local_part
from dengine.engine import Engine
from dengine.engine.repeats import follows_left_out_step
from dengine.naming import a_type, other_keywords, other_names, shown
from dengine.parallel.copying import copy_of, reshard

__all__ = ["EMA"]


@other_names(
    attach="it takes one event, so write trainer.on(Events.ITERATION_COMPLETED, handler)",
    ema_model="it is model",
    momentum="it is 1 - decay",
)
class EMA:
    """Keeps `ema.model`, a copy of the model without its wrapper, with averaged weights.

    Call it after each step of the optimizer, on every rank: `trainer.on(Events.ITERATION_COMPLETED, ema)`, or, for a
    supervised trainer that accumulates, on `SupervisedEvents.OPTIMIZER_STEP_COMPLETED`. The first call takes the
    model's weights as they are, each further call computes `average = decay * average + (1 - decay) * weights`. So the
    weights of all calls in the average add up to 1, there is no bias towards zero, and weights before the first call
    do not count, nor does an iteration whose step a `Guard` left out. Before the first call the copy has the weights
    that the model had when it was made. With `Events.ITERATION_COMPLETED(after=1000)` the average begins there.

    Parameters and floating-point buffers are averaged, other buffers (counts) are copied. The copy is in eval mode and
    takes no gradients; evaluate `ema.model` as any other model. Make it after `prepare_model`: a model in DDP is
    averaged without its wrapper; one that FSDP2 has sharded is averaged shard by shard, and its copy is sharded in the
    same way. Each rank has its own buffers, as in the model: `evaluating(ema.model)` takes rank 0's.

    For weights in bfloat16 or float16, which are too coarse for a decay near 1, the average is kept in float32:
    `ema.model` has it rounded to the model's dtype, and the state has it in float32. To change such an average, load a
    state: the next call overwrites what is written into `ema.model`.

    Args:
        model: a model that is on its device already, wrapped or not.
        decay: from 0 (no average) to 1, exclusive. The average spans about 1 / (1 - decay) calls.

    Attributes:
        model: the averaged copy.
        num_updates: calls so far.

    Raises:
        TypeError: `model` is no module. ValueError: `decay` is outside of its range, or DeepSpeed has cut up the
            weights.

    Cost: memory for one more copy of the weights; a call reads and writes it once, with one operation per dtype and
    device, no wait for the device, and no collective.

    Example:
        >>> import torch
        >>> from dengine import Engine, Events
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> ema = EMA(model, decay=0.5)
        >>> trainer = Engine(lambda engine, batch: torch.nn.init.constant_(model.weight, batch))
        >>> handle = trainer.on(Events.ITERATION_COMPLETED, ema)
        >>> state = trainer.run([1.0, 2.0, 4.0])
        >>> ema.model.weight.item()  # ((1 + 2) / 2 + 4) / 2
        2.75
    """

    @other_keywords(
        momentum="give decay=, which is 1 - momentum",
    )
    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"EMA() takes a torch.nn.Module, but got {type(model).__qualname__}.")
        if not is_number(decay) or not 0 <= decay < 1:
            raise ValueError(f"decay={decay!r} must be a number from 0 to below 1, such as 0.999.")
        if any(hasattr(each, "ds_id") for each in model.parameters()):
            raise ValueError(
                "DeepSpeed's stage 3 has a part of each weight on each rank, and shows none of it: average a model "
                'that prepare_model(model, strategy="fsdp") has sharded, or take a lower stage.'
            )
        self._decay = float(decay)
        self._source = unwrap_model(model)
        reshard(self._source)
        self.model = copy_of(self._source).eval().requires_grad_(False)
        self.num_updates = 0
        self._is_sharded = any_dtensor(self.model.parameters())
        own, source = _slots(self.model), _slots(self._source)
        self._pairs = [(name, *own[name], *source[name]) for name in own]
        self._wide: dict[str, Tensor] = {}  # by name, the averages in float32 of weights with a coarser dtype

    def __repr__(self) -> str:
        return shown(self, self.model, decay=self._decay, num_updates=self.num_updates)

    @torch.no_grad()
    def __call__(self, engine: Engine) -> None:
        if follows_left_out_step(engine):
            return
        if self._is_sharded:
            reshard(self.model)  # else the next evaluation would use what this one has gathered
        averaged: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
        for name, own, own_key, others, key in self._pairs:
            target, source = local_part(own[own_key]), local_part(others[key])
            if _is_coarse(target):
                self._average_wide(name, target, source)
            elif source.is_floating_point() or source.is_complex():
                targets, sources = averaged.setdefault((target.dtype, target.device), ([], []))
                targets.append(target)
                sources.append(source if source.dtype == target.dtype else source.to(target.dtype))
            else:
                target.copy_(source, non_blocking=True)
        for targets, sources in averaged.values():
            if self.num_updates == 0:
                torch._foreach_copy_(targets, sources)
            else:
                torch._foreach_lerp_(targets, sources, 1 - self._decay)
        self.num_updates += 1

    def _average_wide(self, name: str, target: Tensor, source: Tensor) -> None:
        # One by one, so that only one tensor has a temporary copy in float32.
        if self.num_updates == 0 or name not in self._wide:
            self._wide[name] = (source if self.num_updates == 0 else target).to(target.device, torch.float32)
        wide = self._wide[name]
        if wide.device != target.device:  # the copy was moved
            wide = self._wide[name] = wide.to(target.device)
        if self.num_updates:
            wide.lerp_(source.to(wide.dtype), 1 - self._decay)
        target.copy_(wide)

    # -- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The number of calls, and the state of `ema.model` by the names of the uncompiled model.

        Averages of weights in 16 bits are in float32.
        """
        if self._is_sharded:
            reshard(self.model)
        state: dict[str, Any] = self.model.state_dict()
        for names, value, slot in self._coarse():
            wide = self._wide.get(slot)
            kept = value.detach().float() if wide is None else laid_out_like(wide, value)
            state.update({name: kept for name in names if name in state})
        return {"num_updates": self.num_updates, "model": aligned(state, {})}

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Load a `state_dict()`; whole tensors are sharded for a sharded model. No collective.

        Raises:
            ValueError: an entry is missing, unknown, or of another shape; the message names it, and nothing is changed.
        """
        if not isinstance(state_dict, Mapping) or state_dict.keys() != {"num_updates", "model"}:
            have = list(state_dict) if isinstance(state_dict, Mapping) else type(state_dict).__qualname__
            raise ValueError(f"The state of EMA has the entries 'num_updates' and 'model', but got {have}.")
        try:
            num_updates = whole_number("num_updates", state_dict["num_updates"], least=0)
        except TypeError as error:
            raise ValueError(f"The state of EMA is wrong: {error}") from error
        if self._is_sharded:
            reshard(self.model)
        own = self.model.state_dict()
        fitting = _fitted(aligned(state_dict["model"], own), own)
        self.model.load_state_dict(fitting)
        self._wide = {}
        for names, value, slot in self._coarse():
            if (given := next((fitting[name] for name in names if name in fitting), None)) is not None:
                self._wide[slot] = local_part(given).to(local_part(value).device, torch.float32, copy=True)
        self.num_updates = num_updates

    def _coarse(self) -> Iterator[tuple[list[str], Any, str]]:
        """The tensors of `ema.model` whose average is kept in float32: their names in a state, and their slots."""
        names: dict[int, list[str]] = {}
        for named in (self.model.named_parameters, self.model.named_buffers):
            for name, value in named(remove_duplicate=False):
                names.setdefault(id(value), []).append(name)
        for slot, own, key, *_ in self._pairs:
            if _is_coarse(local_part(own[key])):
                yield names.get(id(own[key]), []), own[key], slot


def _slots(model: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """The dict and the key of each parameter and buffer, by its full name, so that another tensor can replace it.

    A shard is in a dict of its own: while the model is in use, it has whole parameters instead.
    """
    slots: dict[str, tuple[dict[str, Any], str]] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for holder in (module._parameters, module._buffers):
            for key, value in holder.items():
                if value is not None and id(value) not in seen:  # tied weights count once
                    seen.add(id(value))
                    slots[f"{prefix}.{key}"] = ({key: value}, key) if is_dtensor(value) else (holder, key)
    return slots


def _is_coarse(value: Tensor) -> bool:
    """Whether its floats are so coarse that a small change of an average would be lost."""
    return value.is_floating_point() and value.dtype.itemsize < 4


def _fitted(given: Any, own: Mapping[str, Any]) -> dict[str, Any]:
    """The state `given`, checked against `own`, and sharded as `own` is."""
    if not isinstance(given, Mapping):
        raise ValueError(f"'model' in the state of EMA must be a dict, but is {a_type(given)}.")
    if different := sorted(given.keys() ^ own.keys()):
        what = "lacks" if different[0] in own else "has the unknown entry"
        raise ValueError(f"'model' in the state of EMA {what} {different[0]!r}: it is of another model.")
    fitted = {}
    for name, value in given.items():
        mine = own[name]
        if isinstance(mine, Tensor):
            if not isinstance(value, Tensor) or value.shape != mine.shape:
                found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__qualname__
                raise ValueError(f"{name!r} in the state of EMA is {found}, but the model's is {tuple(mine.shape)}.")
            value = cut_like(value, mine)
        fitted[name] = value
    return fitted
