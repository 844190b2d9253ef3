"""Check that a mesh (`--mesh dp_shard=2,tp=2`) fits the ranks, and that `tp` stays within hosts."""

from collections.abc import Mapping

from dengine.launch.mesh import MODEL_NAMES, SEQUENCE_NAMES, filled_sizes, groups_along
from dengine.tools.doctor.report import Finding, Verdict, ranks_text

__all__ = ["judge_mesh"]

_MOST_SHOWN = 8


def judge_mesh(asked: Mapping[str, int], num_ranks: int, hosts: Mapping[int, str]) -> Finding:
    """Whether the mesh fits the ranks, and which ranks share their data. Pure."""
    try:
        sizes = filled_sizes(asked, num_ranks)
    except ValueError as error:
        return Finding("mesh", Verdict.FAIL, str(error), "choose sizes whose product is the number of ranks.")
    shared = groups_along(sizes, (*SEQUENCE_NAMES, *MODEL_NAMES))
    text = " x ".join(f"{name}={size}" for name, size in sizes.items())
    figure = f"{text}: {len(shared)} part{'s' * (len(shared) > 1)} of the data"
    if len(shared) < num_ranks:
        figure += ", for " + "; ".join(ranks_text(group) for group in shared[:_MOST_SHOWN])
        figure += "; ..." * (len(shared) > _MOST_SHOWN)
    torn = [
        group for group in groups_along(sizes, ("tp",)) if len({hosts[rank] for rank in group if rank in hosts}) > 1
    ]
    if not torn:
        return Finding("mesh", Verdict.OK, figure, data={"sizes": sizes})
    span = "spans" if len(torn) == 1 else "span"
    return Finding(
        "mesh",
        Verdict.WARN,
        f"{figure}; {len(torn)} of the groups along tp {span} hosts: {ranks_text(torn[0], hosts)}",
        "every layer waits for tp twice: name it last, with a size that divides the ranks of each host, so that its "
        "ranks are neighbours.",
        tuple(rank for group in torn for rank in group),
        data={"sizes": sizes},
    )
