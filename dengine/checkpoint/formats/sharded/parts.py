"""Keep names of different parts of a model apart in a folder, and find them again. Pure.

If several parts have different tensors with one name, it is kept once for each: `pp=0/weight`, `pp=1/weight`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from dengine.checkpoint.formats.sharded.tree import Apart, Names, Node, Path, path_text

__all__ = ["Parts", "Selection", "apart", "keeps_apart", "merged"]

# The path of a name -> the part of it on this rank, "pp=1"; "" if all ranks have the same. If one name of a dict is in
# a part, all of its names are here.
Parts: TypeAlias = Mapping[tuple[str, ...], str]

_PART = re.compile(r"(\w+=\d+(?:,\w+=\d+)*)/(.+)", re.DOTALL)


def _split(key: str) -> tuple[str, str]:
    """The part and the name in a key; the part is "" if there is none."""
    found = _PART.fullmatch(key)
    return ("", key) if found is None else (found[1], found[2])


def _whole(key: str) -> tuple[str, str]:
    return "", key


# -- saving ------------------------------------------------------------------------------------------------------


def apart(states: Any, parts: Parts, colliding: Iterable[tuple[str, ...]]) -> Any:
    """`states`, in which names at the `colliding` paths have the name of this rank's part in front. Containers are
    new.
    """
    new = {path: f"{part}/{path[-1]}" for path in colliding if (part := parts.get(path))}
    return _renamed(states, new, ()) if new else states


def _renamed(value: Any, new: Mapping[tuple[str, ...], str], path: tuple[Any, ...]) -> Any:
    if isinstance(value, Names):
        # The names of an optimizer's parameters, whose states are beside their group.
        start = (*path[:-3], "state")
        return Names(new.get((*start, name), name) for name in value)
    if isinstance(value, Mapping):
        inner = {new.get((*path, key), key): _renamed(part, new, (*path, key)) for key, part in value.items()}
        return inner if inner.keys() == value.keys() else Apart(inner)
    if type(value) is list:
        return [_renamed(part, new, (*path, index)) for index, part in enumerate(value)]
    return value


def keeps_apart(node: Node) -> bool:
    """Whether a name in it is in several parts."""
    if not isinstance(node, dict) or node["type"] != "dict":
        return False
    return bool(node.get("apart")) or any(keeps_apart(value) for _, value in node["items"])


def merged(trees: Iterable[Node]) -> Node:
    """Merge `trees` into one: each adds the names that those before it lack.

    Groups of an optimizer's parameters with the same options become one.
    """
    first, *others = trees
    for other in others:
        first = _merged(first, other)
    return first


def _merged(one: Node, other: Node) -> Node:
    if isinstance(one, dict) and isinstance(other, dict) and one["type"] == other["type"] == "dict":
        theirs = {repr(key): value for key, value in other["items"]}
        items = [[key, _merged(value, theirs.pop(repr(key), value))] for key, value in one["items"]]
        both = {**one, **other}  # one of them may mark its names as kept apart
        return {**both, "items": items + [[key, value] for key, value in other["items"] if repr(key) in theirs]}
    if isinstance(one, list) and isinstance(other, list) and any(_names_in(each) is not None for each in one):
        return _merged_groups(one, other)
    return one


def _merged_groups(groups: list[Node], others: list[Node]) -> list[Node]:
    kept = [*groups]
    free = {_options(group): place for place, group in reversed([*enumerate(groups)])}
    for other in others:
        place = free.pop(_options(other), None)
        if place is None:
            kept.append(other)
            continue
        names = _names_in(kept[place]) or []
        more = [name for name in _names_in(other) or [] if name not in set(names)]
        node = {"type": "names", "value": names + more}
        items = [[key, node if key == "params" else value] for key, value in kept[place]["items"]]
        kept[place] = {**kept[place], "items": items}
    return kept


def _names_in(group: Node) -> list[str] | None:
    """The parameters of a group in the state of an optimizer; None if it is no such group."""
    if not isinstance(group, dict) or group["type"] != "dict":
        return None
    node = next((value for key, value in group["items"] if key == "params"), None)
    return node["value"] if isinstance(node, dict) and node["type"] == "names" else None


def _options(group: Node) -> str:
    return repr(sorted((repr(key), value) for key, value in group["items"] if key != "params"))


# -- loading -----------------------------------------------------------------------------------------------------


class Selection:
    """Selects this rank's names from saved states of which several ranks had parts.

    Args:
        parts: the parts of this rank; {} to take all: then names of several parts stay apart, unless their contents are
            equal.
        is_same: whether the contents at two paths are equal, byte for byte.
        sizes: of the dimensions of the mesh here. If there were more or fewer parts along one, none of them is one of
            now.
        saved_sizes: those of the mesh that has saved; None if the folder does not say it.
    """

    def __init__(
        self,
        parts: Parts,
        is_same: Callable[[Path, Node, Path, Node], bool],
        sizes: Mapping[str, int],
        saved_sizes: Mapping[str, int] | None = None,
    ) -> None:
        self._parts, self._is_same, self._sizes, self._saved_sizes = parts, is_same, sizes, saved_sizes
        self._levels = {path[:-1] for path in parts}
        self._saved: dict[Path, Path] = {}  # the path here -> the one in the folder, if they differ
        self._refused: set[Path] = set()  # of which several parts have their own, and none is this rank's
        self._grouped: dict[Path, dict[str, str]] = {}  # parameters -> the part and the key of each in saved groups

    def saved_path(self, path: Path) -> Path:
        """The path in the folder of the value that has `path` in the selection."""
        for end in range(len(path), 0, -1):
            if (start := self._saved.get(path[:end])) is not None:
                return (*start, *path[end:])
        return path

    def of(self, node: Node, path: Path = ()) -> Node:
        """`node` without the parts that only other ranks have."""
        if isinstance(node, list) and path[-1:] == ("params",) and (*path[:-3], "state") in self._levels:
            node = {"type": "names", "value": node}  # all names, as one process has saved them
        if isinstance(node, list):
            for key in (key for group in node for key in _names_in(group) or ()):
                part, name = _split(key)
                self._grouped.setdefault((*path[:-1], "state", name), {})[part] = key
            return [self.of(each, (*path, index)) for index, each in enumerate(node)]
        if not isinstance(node, dict):
            return node
        if node["type"] == "names":
            return {**node, "value": self._names(node["value"], (*path[:-3], "state"))}
        if node["type"] != "dict":
            return node
        items = node["items"]
        if node.get("apart") or path in self._levels:
            items = self._chosen(items, path, _split if node.get("apart") else _whole)
        return {
            **node,
            "items": [[key, self.of(value, (*path, key)) if isinstance(key, str) else value] for key, value in items],
        }

    def _chosen(self, items: list[Any], path: Path, split: Callable[[str], tuple[str, str]]) -> list[Any]:
        found: dict[str, list[tuple[str, str, Node]]] = {}
        for key, value in items:
            if isinstance(key, str):
                part, name = split(key)
                found.setdefault(name, []).append((part, key, value))
        chosen = [item for item in items if not isinstance(item[0], str)]
        for name, saved in found.items():
            here = (*path, name)
            if path in self._levels and here not in self._parts:
                continue
            taken = self._taken(here, saved)
            if taken is not None:
                if taken[0]:
                    self._saved[here] = (*self.saved_path(path), taken[1])
                chosen.append([name, taken[2]])
                continue
            self._refused.add(here)
            if path not in self._levels:
                chosen.extend([key, value] for _, key, value in saved)
        return chosen

    def _taken(self, here: Path, saved: list[tuple[str, str, Node]]) -> tuple[str, str, Node] | None:
        """What this rank takes of several parts: its own, that of all, or any if they are equal.

        Raises:
            ValueError: the folder does not tell whether one of them is this rank's.
        """
        by_part = {each[0]: each for each in saved}
        own = by_part.get(self._own(here, by_part)) or by_part.get("")
        if own is None and self._are_same(here[:-1], saved):
            return saved[0]
        if own is None and self._is_alike(by_part) is None and here in self._parts:
            raise ValueError(
                f"{path_text(here)!r} was saved as {', '.join(by_part)} by an earlier version, which does not say how "
                f"many parts there were, so that they may not be the parts of now: load it on a mesh like the one that "
                "saved it, and save it again."
            )
        return own

    def _are_same(self, path: Path, saved: list[tuple[str, str, Node]]) -> bool:
        start = self.saved_path(path)
        paths = [((*start, key), value) for _, key, value in saved]
        # A name is kept apart if several have it: of a lone one, the others have not been read.
        return len(paths) > 1 and all(self._is_same(*paths[0], *other) for other in paths[1:])

    def _names(self, names: Iterable[Any], level: Path) -> list[str]:
        kept: dict[str, None] = {}
        for key in names:
            here = (*level, _split(key)[1])
            if here in self._refused and level not in self._levels:
                kept[key] = None
            elif key == self._key_of(here) and (level not in self._levels or here in self._parts):
                kept[here[-1]] = None
        return list(kept)

    def _key_of(self, here: Path) -> str | None:
        """Under which name the parameter is in a saved group: that of its state, if it has one."""
        if here in self._saved:
            return self._saved[here][-1]  # type: ignore[no-any-return]
        if here in self._refused:
            return None
        keys = self._grouped.get(here) or {"": here[-1]}
        return keys.get(self._own(here, keys)) or keys.get("") or next(iter(keys.values()))

    def _own(self, here: Path, saved: Iterable[str]) -> str:
        """The part of `here` that this rank has, if `saved` are of a mesh like this: stage 1 of 4 is not that of 2."""
        return self._parts.get(here, "") if self._is_alike(saved) else ""

    def _is_alike(self, saved: Iterable[str]) -> bool | None:
        """Whether `saved` are parts of a mesh with the sizes of this one; None if the folder does not tell."""
        most: dict[str, int] = {}
        for each in (each for part in saved if part for each in part.split(",")):
            name, index = each.split("=")
            most[name] = max(most.get(name, 0), int(index) + 1)
        here = {name: self._sizes.get(name, 0) for name in most}
        if self._saved_sizes is not None:
            return all(self._saved_sizes.get(name) == size for name, size in here.items())
        if any(most[name] > size for name, size in here.items()):
            return False
        return True if most == here else None
