"""A description of the data of a run, with which a resumed run checks that its data are the same."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dengine.data.loader import data_state
from dengine.data.parts import members_of
from dengine.data.sampler import changed_order, refuse_changes
from dengine.distributed import world

__all__ = ["PassPosition", "changes_of", "check_unchanged", "described", "length_of", "saved_pass"]


@dataclass(frozen=True)
class PassPosition:
    """A pass over data that go on from epoch to epoch: its number, and the iterations done before it started."""

    number: int
    start: int


def saved_pass(saved: Mapping[str, Any] | None) -> PassPosition | None:
    """The pass in a saved description; None if each epoch of that run began the data anew."""
    return PassPosition(**saved["pass"]) if saved is not None and "pass" in saved else None


def length_of(data: Iterable[object]) -> int | None:
    """The number of batches, or samples, of the data; None if they do not know it, or not yet.

    Raises:
        OSError: the data could not read their length.
    """
    try:
        return len(data)  # type: ignore[arg-type]
    except OSError:
        raise
    except Exception:  # no length (TypeError), or none before iter() (Lightning's CombinedLoader: RuntimeError)
        return None


def described(data: Iterable[object], epoch: int, position: PassPosition | None = None) -> dict[str, object] | None:
    """The values on which the order of samples depends, for a prepared loader; the length of other data.

    They are plain values; None if nothing is known. `position`: of data that go on from epoch to epoch.
    """
    if position is not None:
        return {**(_described(data, position.number) or {"epoch": position.number}), "pass": asdict(position)}
    return _described(data, epoch)


def _described(data: Iterable[object], epoch: int) -> dict[str, object] | None:
    state = data_state(data)
    if state is not None:
        return {**state, "epoch": epoch}
    if members := members_of(data):
        loaders = {name: _described(each, epoch) for name, each in members.items()}
        return {"epoch": epoch, "mode": getattr(data, "mode", None), "loaders": loaders}
    num_batches = length_of(data)
    dataset = getattr(data, "dataset", None)
    num_samples = None if dataset is None else length_of(dataset)
    if num_batches is None and num_samples is None:
        return None
    here = world()
    return {
        "epoch": epoch,
        "num_batches": num_batches,
        "num_samples": num_samples,
        "rank": here.rank,
        "world_size": here.size,
    }


def check_unchanged(saved: Mapping[str, object], current: Mapping[str, object] | None) -> None:
    """Refuse data whose description differs from that of the data that the run was started with.

    Raises:
        ValueError: they differ; the message has both values, and what to do.
    """
    refuse_changes(changes_of(saved, current))


def changes_of(saved: Mapping[str, Any], current: Mapping[str, Any] | None) -> list[str]:
    """The differences between two descriptions, as lines of text with both values and what to do."""
    if current is None:
        return []
    if "loaders" in saved and "loaders" in current:
        return _changes_of_loaders(saved, current)
    if "shuffle" in saved and "shuffle" in current:
        return changed_order(saved, current)
    # The user may have given each rank its own part of the data.
    if any(key in saved and key in current and saved[key] != current[key] for key in ("rank", "world_size")):
        return []
    found = [("batches", saved.get("num_batches"), current.get("num_batches"))]
    found.append(("samples", _samples(saved), _samples(current)))
    return [
        f"the number of {what} was {was} and is {now}: continue with the data that the run was started with"
        for what, was, now in found
        if was is not None and now is not None and was != now
    ]


def _changes_of_loaders(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """The differences between what two data are made of: their mode, and each loader by its name."""
    if saved["mode"] != current["mode"]:
        return [f"the mode was {saved['mode']!r} and is {current['mode']!r}: zip them as before"]
    was, now = saved["loaders"], current["loaders"]
    if sorted(was) != sorted(now):
        return [f"the loaders were {', '.join(was)} and are {', '.join(now)}: zip the same ones"]
    found = [(name, changes_of(each, now[name])) for name, each in was.items() if each is not None]
    return [f"of {name}, {change}" for name, changes in found for change in changes]


def _samples(state: Mapping[str, Any]) -> int | None:
    number: int | None = state.get("num_samples", state.get("length"))
    return number
