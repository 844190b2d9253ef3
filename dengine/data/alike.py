"""Descriptions of each rank's loader, which are compared at the start of a run.

A shard is one part of an order that every rank computes by itself. If one rank has another seed, batch size or
shuffling, samples are missed or come twice without any sign of it.
"""

import os
import types
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    Subset,
    TensorDataset,
)

from dengine.data.loader import collate_of_user, data_state
from dengine.data.parts import members_of
from dengine.data.sampler import ElasticSampler
from dengine.data.self_sharding import settings_of
from dengine.data.stream import StreamShard
from dengine.launch.world import world

__all__ = ["doubtful_part", "empties_together", "is_in_doubt", "is_whole_on_every_rank", "samples_of", "shard_entries"]

_REMEMBERED = "_dengine_entries"  # on a loader: kept, as its objects may count what they did and change by that
_MAX_DEPTH, _MAX_PARTS, _MAX_ENTRIES = 5, 16, 256
# Parts of the names of attributes in which ranks may well differ.
_OWN = (
    *("rank", "seed", "rng", "generator", "device", "epoch", "worker", "count", "num_", "calls", "seen", "step"),
    *("cache", "time", "path", "dir", "root", "file", "local", "node", "host", "pid", "index", "offset", "log"),
)
# Parts of the names of attributes that change samples.
_CHANGING = ("transform", "augment", "train", "random", "noise", "flip", "crop", "jitter", "mixup", "cutmix")
_SHARDING = ("rank", "world_size", "num_replicas", "num_shards", "shard", "distributed", "split")
_STREAM_PACKAGES = ("datasets", "webdataset", "streaming", "torchdata", "torch_geometric", "litdata", "ray", "nvidia")
_PLAIN = (bool, int, float, str, type(None))


def shard_entries(data: object) -> list[str]:
    """The settings that must be the same on every rank if `data` is one shard of several; empty if none is known."""
    if members := members_of(data):
        return [f"{name}: {entry}" for name, each in members.items() for entry in ("a loader", *shard_entries(each))]
    if not isinstance(data, DataLoader):
        return []
    if (transforms := vars(data).get(_REMEMBERED)) is None:
        transforms = vars(data)[_REMEMBERED] = _transforms(data)
    state = _shard_state(data)
    if state is None:
        return ["no preparation by prepare_data_loader()"] if is_whole_on_every_rank(data) else []
    return [*(f"{name}={value}" for name, value in state.items()), *transforms]


def empties_together(data: object) -> bool:
    """Whether the shards of all ranks have the same length, so that if one is empty all are."""
    state = _shard_state(data)
    return state is not None and (not state.get("exact", False) or state.get("length") == 0)


def is_whole_on_every_rank(data: object) -> bool:
    """Whether `data` is a loader that nobody has cut into shards: not `prepare_data_loader` and, as far as can be seen,
    not the user.
    """
    if not isinstance(data, DataLoader) or _shard_state(data) is not None:
        return False
    dataset: Any = data.dataset
    if isinstance(dataset, IterableDataset):
        is_known = type(dataset).__module__.partition(".")[0] in _STREAM_PACKAGES
        return not is_known and not any(word in name for name in _names(dataset) for word in _SHARDING)
    is_cut_by_batch = type(data.batch_sampler).__name__ != BatchSampler.__name__ and data.batch_sampler is not None
    return type(data.sampler).__module__ == "torch.utils.data.sampler" and not is_cut_by_batch


def is_in_doubt(data: object) -> bool:
    """Whether each rank should have samples of its own, and nobody here has made sure of it: in a loader that was not
    prepared, and data that shard themselves.
    """
    if members := members_of(data):
        return any(map(is_in_doubt, members.values()))
    if isinstance(data, DataLoader):
        if isinstance(data.dataset, StreamShard):
            return data.dataset.shards_itself
        return _shard_state(data) is None
    return isinstance(data, IterableDataset) or type(data).__module__.partition(".")[0] in _STREAM_PACKAGES


def doubtful_part(data: object, batch: object) -> object:
    """The batches of those loaders in `data` that are in doubt."""
    members = members_of(data)
    if not members or not isinstance(batch, Mapping):
        return batch
    return {name: batch[name] for name in members if name in batch and is_in_doubt(members[name])}


def samples_of(data: object) -> str:
    """A description of the samples that a loader goes through. Ranks whose descriptions differ have shards."""
    if not isinstance(data, DataLoader):
        return ""
    return "\n".join((*_samples(data.dataset), *_head(getattr(data.sampler, "indices", None))))


def _shard_state(data: object) -> Mapping[str, Any] | None:
    """The values on which the order of a shard depends, if there are as many shards as ranks."""
    sampler: Any = getattr(data, "sampler", None)
    if isinstance(sampler, DistributedSampler) and sampler.num_replicas != world().data_size:
        return None  # shards of a part of the ranks only, or all samples on each
    if isinstance(sampler, DistributedSampler) and not isinstance(sampler, ElasticSampler):
        return settings_of(sampler)
    return data_state(data)


# -- what is done to samples -----------------------------------------------------------------------------------------


def _transforms(loader: "DataLoader[Any]") -> list[str]:
    entries: list[str] = []
    collate: Any = loader.collate_fn
    for entry in (
        *_of_dataset("data set", loader.dataset, _MAX_DEPTH),
        *_described("collate_fn", collate_of_user(collate), _MAX_DEPTH),
    ):
        entries.append(entry)
        if len(entries) == _MAX_ENTRIES:
            break
    return entries


def _of_dataset(path: str, dataset: Any, depth: int) -> Iterator[str]:
    if depth == 0:
        return
    inside = vars(dataset).get("_dataset") if hasattr(dataset, "__dict__") else None
    if inside is not None:  # as prepare_data_loader() wraps it
        yield from _of_dataset(path, inside, depth)
        return
    yield f"{path} {type(dataset).__qualname__}"
    for name, value in _public(dataset):
        if any(word in name.lower() for word in _CHANGING):
            yield from _described(f"{path}.{name}", value, depth)
    formatting = getattr(dataset, "_format_kwargs", None)  # as Hugging Face's data sets keep theirs
    if isinstance(formatting, Mapping) and "transform" in formatting:
        yield from _described(f"{path}.transform", formatting["transform"], depth)
    parts = [dataset.dataset] if isinstance(dataset, Subset) else []
    parts += dataset.datasets[:_MAX_PARTS] if isinstance(dataset, ConcatDataset) else []
    for part in parts:
        yield from _of_dataset(path, part, depth - 1)


def _described(path: str, value: Any, depth: int) -> Iterator[str]:
    """`value` and its parts, one line each: classes, functions, and the plain numbers that they hold."""
    if isinstance(value, _PLAIN):
        yield f"{path}={value!r}"
    elif depth == 0 or isinstance(value, Tensor):
        yield f"{path} {type(value).__qualname__}"
    elif isinstance(value, partial):
        yield from _described(path, value.func, depth)
        yield from _parts(path, [*enumerate(value.args), *value.keywords.items()], depth)
    elif isinstance(value, types.FunctionType):
        code = value.__code__
        yield f"{path} {value.__qualname__} ({os.path.basename(code.co_filename)}:{code.co_firstlineno})"
        cells = zip(code.co_freevars, value.__closure__ or (), strict=True)
        yield from _parts(path, [(name, cell.cell_contents) for name, cell in cells if _has_contents(cell)], depth)
    elif isinstance(value, types.MethodType):
        yield from _described(path, value.__func__, depth)
        yield from _described(path, value.__self__, depth - 1)
    elif isinstance(value, Mapping):
        yield from _parts(path, list(value.items())[:_MAX_PARTS], depth)
    elif isinstance(value, list | tuple):
        yield f"{path} {type(value).__qualname__} of {len(value)}"
        yield from _parts(path, list(enumerate(value[:_MAX_PARTS])), depth)
    else:
        yield f"{path} {getattr(value, '__qualname__', type(value).__qualname__)}"
        if not isinstance(value, type | types.ModuleType):
            inside = dict(value.named_children()) if isinstance(value, nn.Module) else {}
            yield from _parts(path, [*_public(value), *inside.items()], depth)


def _parts(path: str, parts: list[tuple[Any, Any]], depth: int) -> Iterator[str]:
    for name, part in parts:
        if not any(word in str(name) for word in _OWN):
            yield from _described(f"{path}.{name}", part, depth - 1)


def _has_contents(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _public(value: Any) -> list[tuple[str, Any]]:
    return [(name, part) for name, part in sorted(getattr(value, "__dict__", {}).items()) if name[:1] != "_"]


def _names(value: Any) -> list[str]:
    return [name.lower() for name in getattr(value, "__dict__", {})]


# -- which samples ---------------------------------------------------------------------------------------------------


def _samples(dataset: Any, depth: int = _MAX_DEPTH) -> Iterator[str]:
    yield type(dataset).__qualname__
    if isinstance(dataset, Subset):
        yield from _head(dataset.indices)
        yield from _samples(dataset.dataset, depth - 1) if depth else ()
    elif isinstance(dataset, TensorDataset):
        for tensor in dataset.tensors:
            yield f"{tuple(tensor.shape)} {tensor[:1].tolist() if tensor.device.type == 'cpu' else ''}"
    elif isinstance(dataset, list | tuple):
        yield from _head(dataset)
    else:
        for name, value in sorted(getattr(dataset, "__dict__", {}).items()):
            yield from (f"{name} {line}" for line in _head(value))


def _head(value: Any) -> Iterator[str]:
    """The beginning of a list or tensor, or a plain value; nothing for other objects, whose texts hold addresses."""
    if isinstance(value, _PLAIN):
        yield repr(value)
    elif isinstance(value, Tensor):
        yield f"{tuple(value.shape)} {value.reshape(-1)[:4].tolist() if value.device.type == 'cpu' else ''}"
    elif isinstance(value, list | tuple | range):
        yield str(len(value))
        for part in (*value[:4], *value[-1:]):
            yield from _head(part)
