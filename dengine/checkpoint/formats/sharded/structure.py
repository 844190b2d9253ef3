"""Describe this rank's tensors for the other ranks, before a folder is written. No collective."""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from dengine.checkpoint.formats.sharded.parts import Parts
from dengine.checkpoint.formats.sharded.report import Entry, Layout, Report, Structure, digest_of
from dengine.checkpoint.formats.sharded.tree import dtype_name
from dengine.dtensor import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["structure_of"]


def structure_of(tensors: Mapping[str, torch.Tensor], parts: Parts) -> tuple[Structure, Report]:
    """The structure of `tensors`, by their names in a folder; `parts` is of the names in the states.

    Cost: some microseconds for each tensor.
    """
    of_names = {"/".join(path): part for path, part in parts.items() if part}
    grids = _Grids()
    entries = tuple(
        Entry(name, tuple(tensor.shape), dtype_name(tensor.dtype), _part_of(name, of_names), grids.layout_of(tensor))
        for name, tensor in tensors.items()
    )
    structure = Structure(entries, tuple(grids.layouts), tuple((path, part) for path, part in parts.items() if part))
    return structure, Report(digest_of(structure), tuple(grids.positions))


def _part_of(name: str, parts: Mapping[str, str]) -> str:
    """The part to which a tensor belongs: by its own name in a model's state, by its parameter's in an optimizer's."""
    while parts and name:
        if name in parts:
            return parts[name]
        name = name.rpartition("/")[0]
    return ""


class _Grids:
    """The meshes of a rank's tensors, and the layouts over them."""

    def __init__(self) -> None:
        self.layouts: list[Layout] = []
        self.positions: list[tuple[bytes, int]] = []
        self._meshes: dict[int, tuple[DeviceMesh, int]] = {}  # by id; kept, so that the id stays its own
        self._known: dict[tuple[int, Any], int] = {}

    def layout_of(self, tensor: torch.Tensor) -> int:
        if not is_dtensor(tensor):
            return -1
        mesh, placements = tensor.device_mesh, tensor.placements
        grid = self._grid_of(mesh)
        place = self._known.setdefault((grid, placements), len(self.layouts))
        if place == len(self.layouts):
            cut = tuple(getattr(each, "dim", None) for each in placements)
            last = tuple(axis for axis, each in enumerate(placements) if hasattr(each, "split_factor"))
            self.layouts.append(Layout(grid, tuple(mesh.shape), cut, last, str(placements)))
        return place

    def _grid_of(self, mesh: "DeviceMesh") -> int:
        if id(mesh) not in self._meshes:
            self._meshes[id(mesh)] = mesh, len(self.positions)
            here, place = mesh.get_coordinate(), -1
            if here is not None:
                place = 0
                for index, size in zip(here, mesh.shape, strict=True):
                    place = place * size + index
            ranks = mesh.mesh.numpy()
            self.positions.append((hashlib.sha256(f"{ranks.shape}".encode() + ranks.tobytes()).digest()[:8], place))
        return self._meshes[id(mesh)][1]
