"""The parts of a run's data: the loaders that they are made of, and the data sets and samplers in those."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from dengine.data.failures import Failures
from dengine.data.loader import pass_counters, renew_workers
from dengine.data.passes import PassCounter
from dengine.data.seeding import set_epoch_of

__all__ = ["counters_of", "failures_of", "members_of", "parts_of", "set_epoch_of_parts"]


def members_of(data: object) -> Mapping[str, Any]:
    """The loaders that `data` iterate over side by side, by name: those of `zip_loaders` and Lightning's
    `CombinedLoader`; none for other data.
    """
    loaders = getattr(data, "loaders", None)
    if isinstance(loaders, MappingProxyType):
        return loaders
    if type(data).__name__ == "CombinedLoader" and type(data).__module__.partition(".")[0].endswith("lightning"):
        return {str(number): each for number, each in enumerate(getattr(data, "flattened", ()))}
    return {}


def counters_of(data: object) -> list[PassCounter]:
    """The counters of the parts of `data` that go on to the next epoch by themselves, unless an engine sets it."""
    own = [data.passes] if isinstance(getattr(data, "passes", None), PassCounter) else []  # type: ignore[attr-defined]
    own += [each for each in pass_counters(data) if each not in own]
    return own + [each for member in members_of(data).values() for each in counters_of(member)]


def failures_of(data: object) -> list[Failures]:
    """What loaders in `data` keep of the errors that they left out (`on_error="skip"`)."""
    found = (counter.failures for counter in counters_of(data))
    return [each for each in found if each is not None]


def parts_of(data: object) -> list[object]:
    """The parts of the data that may have a `set_epoch`: the data, the data set and the samplers, each once; those of
    the loaders that the data are made of, too.
    """
    batch_sampler = getattr(data, "batch_sampler", None)
    parts = [
        data,
        getattr(data, "dataset", None),  # an iterable data set that shuffles by epoch
        getattr(data, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    ]
    for member in members_of(data).values():
        parts += parts_of(member)
    return list({id(part): part for part in parts if part is not None}.values())


def set_epoch_of_parts(data: Iterable[object], epoch: int) -> None:
    """Call `set_epoch(epoch)` of the data, and of the data sets and the samplers in them."""
    for loader in (data, *members_of(data).values()):
        renew_workers(loader, epoch)
    for part in parts_of(data):
        set_epoch_of(part, epoch)
