"""The dimensions of a mesh of ranks: names, sizes, and which ranks get the same data. Pure."""

from collections.abc import Collection, Mapping, Sequence
from itertools import product
from math import prod

from dengine.checks import whole_number

__all__ = [
    "DATA_NAMES",
    "MODEL_NAMES",
    "NAMES",
    "SEQUENCE_NAMES",
    "checked_sizes",
    "filled_sizes",
    "groups_along",
    "mesh_sizes",
    "other_meshes_text",
    "shown_ranks",
    "shown_sizes",
]

# Ranks along a dimension of data have samples of their own; along one of sequence, the same samples, of which each has
# its own tokens; along one of the model, the same samples whole.
DATA_NAMES = ("dp", "dp_replicate", "dp_shard", "ep")
SEQUENCE_NAMES = ("cp",)
MODEL_NAMES = ("tp", "pp")
NAMES = (*DATA_NAMES, *SEQUENCE_NAMES, *MODEL_NAMES)

_NUM_SHOWN = 8
_REST = -1  # stands for the size that uses up all ranks
_ROLES = f"data: {', '.join(DATA_NAMES)}; sequence: {', '.join(SEQUENCE_NAMES)}; model: {', '.join(MODEL_NAMES)}"


def checked_sizes(mesh: Mapping[str, int]) -> dict[str, int]:
    """The sizes in `mesh`, checked as far as they can be without the number of ranks.

    Raises:
        TypeError: a size is not a whole number. ValueError: an unknown name, a size below 1 that is not -1, two sizes
            of -1, or no dimension at all.
    """
    if not mesh:
        raise ValueError(f"mesh={{}} has no dimension: name at least one of these ({_ROLES}), or leave mesh= out.")
    for name, size in mesh.items():
        if name not in NAMES:
            raise ValueError(f"mesh={shown_sizes(mesh)} has a dimension {name!r}, but the names are {_ROLES}.")
        if size != _REST:
            whole_number(f"mesh[{name!r}]", size, least=1)
    rest = [name for name, size in mesh.items() if size == _REST]
    if len(rest) > 1:
        raise ValueError(
            f"mesh={shown_sizes(mesh)} leaves {len(rest)} sizes open ({', '.join(rest)}), but only one can be -1, "
            "which takes what the others leave."
        )
    return {name: int(size) for name, size in mesh.items()}


def mesh_sizes(text: str) -> dict[str, int]:
    """The sizes for `process_group(mesh=)` in the text of a command line.

    Raises: ValueError: it has another form, or an unknown name, or a size that is none.

    Example:
        >>> mesh_sizes("dp_shard=-1,tp=2")
        {'dp_shard': -1, 'tp': 2}
    """
    sizes: dict[str, int] = {}
    for each in text.split(","):
        name, _, size = (part.strip() for part in each.partition("="))
        if not size.removeprefix("-").isdecimal() or name in sizes:
            raise ValueError(f"mesh={text} must be sizes by name, such as dp_shard=2,tp=2, with each name once.")
        sizes[name] = int(size)
    return checked_sizes(sizes)


def filled_sizes(sizes: Mapping[str, int], num_ranks: int) -> dict[str, int]:
    """The checked `sizes` for `num_ranks` ranks, with -1 replaced by the size that it stands for.

    Raises:
        ValueError: their product is not `num_ranks`; names both, and the sizes that fit.

    Example:
        >>> filled_sizes({"dp_shard": -1, "tp": 2}, 8)
        {'dp_shard': 4, 'tp': 2}
    """
    given = prod(size for size in sizes.values() if size != _REST)
    rest = next((name for name, size in sizes.items() if size == _REST), None)
    if rest is None:
        if given == num_ranks:
            return dict(sizes)
        raise ValueError(
            f"mesh={shown_sizes(sizes)} is a mesh of {_product(sizes)} ranks, but there are {num_ranks}. "
            f"{_fitting(sizes, num_ranks)}"
        )
    if num_ranks % given == 0:
        return {name: num_ranks // given if name == rest else size for name, size in sizes.items()}
    others = {name: size for name, size in sizes.items() if name != rest}
    raise ValueError(
        f"mesh={shown_sizes(sizes)} gives {_product(others)} ranks to each place along {rest}, which does not divide "
        f"the {num_ranks} there are. {_fitting(others, num_ranks, is_divisor=True)}"
    )


def shown_sizes(sizes: Mapping[str, int]) -> str:
    """`sizes` as a script writes them."""
    return "{" + ", ".join(f'"{name}": {size}' for name, size in sizes.items()) + "}"


def groups_along(sizes: Mapping[str, int], names: Collection[str]) -> list[list[int]]:
    """The ranks of a mesh in groups, within which ranks differ only in the dimensions `names`.

    Example:
        >>> groups_along({"dp": 2, "tp": 2}, ["tp"])
        [[0, 1], [2, 3]]
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank, place in enumerate(product(*map(range, sizes.values()))):
        others = tuple(each for name, each in zip(sizes, place, strict=True) if name not in names)
        groups.setdefault(others, []).append(rank)
    return list(groups.values())


def shown_ranks(ranks: Sequence[int], most: int = _NUM_SHOWN) -> str:
    """The ranks as an error message names them: "rank 3", "ranks 0, 1, ..."."""
    shown = ", ".join(map(str, ranks[:most])) + (", ..." if len(ranks) > most else "")
    return f"{'ranks' if len(ranks) > 1 else 'rank'} {shown}"


def other_meshes_text(meshes: Sequence[str]) -> str:
    """The error message if ranks ask for different meshes; "" if all ask for the same.

    `meshes` has a text for each rank: its mesh, or what is wrong with it, which begins with "mesh" itself.
    """
    if len(set(meshes)) == 1:
        return ""
    by_mesh = {text: [rank for rank, each in enumerate(meshes) if each == text] for text in meshes}
    shown = {text: text if text.startswith("mesh") else f"mesh={text}" if text else "none" for text in by_mesh}
    given = "; ".join(f"{shown_ranks(ranks)}: {shown[text].removesuffix('.')}" for text, ranks in by_mesh.items())
    return f"The ranks ask for different meshes ({given}): pass the same mesh= to process_group() on every rank."


def _product(sizes: Mapping[str, int]) -> str:
    text = " x ".join(map(str, sizes.values()))
    return f"{text} = {prod(sizes.values())}" if len(sizes) > 1 else text


def _fitting(sizes: Mapping[str, int], num_ranks: int, *, is_divisor: bool = False) -> str:
    """A sentence that says which sizes would fit if one dimension is changed."""
    found = []
    for name, size in sizes.items():
        others = prod(sizes.values()) // size
        if num_ranks % others == 0:
            left = num_ranks // others
            fitting = [each for each in range(1, left + 1) if left % each == 0] if is_divisor else [left]
            found.append(f"{name}={' or '.join(map(str, fitting))}")
    if found:
        return f"What fits, with the other sizes as they are: {', '.join(found)}."
    return f"Start another number of ranks, or change more than one size: their product must be {num_ranks}."
