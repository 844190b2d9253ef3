"""Find deadlocks: ranks that wait for each other in different calls, and the mistake in the script.

Pure: it reads the answers of all ranks to one or two liveness probes.
"""

from collections.abc import Mapping
from types import FrameType
from typing import Any

from dengine import torch_internals
from dengine.control.failure import Level, where_text

__all__ = ["END_OF_GROUP", "START_OF_RUN", "cause", "is_certain", "waits_in"]

START_OF_RUN = "the comparison at the start of a run"  # the collective with which every shared run begins
END_OF_GROUP = "the end of process_group()"

# A rank that computes uses far more of a processor, even on a shared machine.
_MAX_CPU_SHARE = 0.02
_NUM_SHOWN = 64
_Answers = Mapping[int, Mapping[str, Any]]


def waits_in(frame: FrameType | None) -> str:
    """The call of torch in which this innermost frame waits for other ranks; "" if it does not."""
    return "" if frame is None else torch_internals.wait_in(frame)


def is_certain(before: _Answers, now: _Answers) -> bool:
    """Whether no rank can ever go on, from two liveness probes some seconds apart.

    That is so if some ranks wait in a collective of this package, which all must join, and all others wait, without
    using their processor, in one of torch's, which the first ones have not joined; or at the end of the process group,
    after the last collective. A rank that is merely slow does work, or is somewhere else.
    """
    if not _is_crossed(before) or not _is_crossed(now) or before.keys() != now.keys():
        return False
    return all(_stands_still(before[rank], now[rank]) for rank in now)


def cause(answers: _Answers, slowest: int) -> tuple[int, str] | None:
    """The culprit of a deadlock, and a text with the reason and what to do.

    None if the ranks do not wait for each other. `slowest`: the rank with the least progress.
    """
    if _waits_in_torch(answers):
        return slowest, (
            "The ranks wait for each other in different collectives of torch, so that none of them can go on:"
            f"{_all_shown(answers)}\n"
            "Call the same ones in the same order on every rank, none of them under `if world.rank == 0:` or in a "
            "branch of a step that only some ranks take. If these lines do belong together, as send() and recv() do, "
            "it is the network that hangs."
        )
    if not _is_crossed(answers):
        return None
    first, other = _pair(answers)
    culprit = _alone(answers, first, other) if len(_inside(answers)) == len(answers) else slowest
    return culprit, (
        f"Rank {culprit} has come to another place than the others, and they wait for each other, so that none of them "
        f"can go on:{_all_shown(answers)}\n{_advice(first, other, answers)}"
    )


def _waits_in_torch(answers: _Answers) -> bool:
    """Whether all ranks wait in collectives of torch, and not in the same line of the script."""
    are_waiting = all(each["waits_in"] and not each["collective"] for each in answers.values())
    return are_waiting and len({(each["site"], each["waits_in"]) for each in answers.values()}) > 1


def _is_crossed(answers: _Answers) -> bool:
    inside, outside = _inside(answers), [rank for rank in answers if not answers[rank]["collective"]]
    if not inside:
        return False
    if not outside:
        at_end = [rank for rank in inside if answers[rank]["collective"] == END_OF_GROUP]
        # The end is a position in the order of calls, too: a rank there has made all earlier calls.
        ended = min((answers[rank]["calls"] for rank in at_end), default=0)
        return any(rank not in at_end and answers[rank]["calls"] >= ended > 0 for rank in inside)
    if not all(answers[rank]["waits_in"] or answers[rank].get("is_ahead") for rank in outside):
        return False
    return max(_joined(answers[rank]) for rank in inside) < min(_joined(answers[rank]) for rank in outside)


def _inside(answers: _Answers) -> list[int]:
    return [rank for rank in answers if answers[rank]["collective"]]


def _joined(answer: Mapping[str, Any]) -> int:
    return int(answer["joined"])


def _stands_still(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    for name in ("collective", "joined", "calls", "where", "waits_in"):
        if before[name] != now[name]:
            return False
    if now["collective"]:
        return True
    work_s, time_s = now["cpu_s"] - before["cpu_s"], now["time_s"] - before["time_s"]
    return bool(now["waits_in"]) and work_s <= _MAX_CPU_SHARE * time_s


def _pair(answers: _Answers) -> tuple[int, int]:
    """A rank that waits in a collective, and a rank that does not join it."""
    inside = _inside(answers)
    calling = [rank for rank in inside if answers[rank]["collective"] != END_OF_GROUP]
    first = min(calling or inside)
    others = [rank for rank in answers if answers[rank]["collective"] != answers[first]["collective"]]
    return first, min(others)


def _alone(answers: _Answers, first: int, other: int) -> int:
    """A rank of the smaller group: the ranks in a collective, or the ranks at the end of the process group."""
    num_first = sum(answers[rank]["collective"] == answers[first]["collective"] for rank in answers)
    num_other = len(answers) - num_first
    if num_first == num_other:
        return first if answers[first]["collective"].startswith(START_OF_RUN) else other
    return first if num_first < num_other else other


def _levels(answer: Mapping[str, Any]) -> list[Level]:
    return [Level(**level) for level in answer["where"]]


def _all_shown(answers: _Answers) -> str:
    return "".join(f"\n  rank {rank}: {_shown(answers[rank])}" for rank in sorted(answers)[:_NUM_SHOWN])


def _shown(answer: Mapping[str, Any]) -> str:
    waits = answer["collective"] or answer["waits_in"]
    site = f" ({answer['site']})" if answer["site"] else ""
    return f"{where_text(_levels(answer))}{f', in {waits}' if waits else ''}{site}"


def _advice(first: int, other: int, answers: _Answers) -> str:
    one, two = answers[first], answers[other]
    mine, theirs = _levels(one), _levels(two)
    handler = next((level.handler for level in mine if level.handler), None)
    has_fewer_calls = _joined(one) < _joined(two)
    if one["collective"].startswith(START_OF_RUN):
        return (
            f"Rank {first} runs an Engine that rank {other} does not run: call run() on every rank, not under "
            "`if world.rank == 0:`. If it is to be one rank's own, make it Engine(..., distributed=False), and give it "
            "distributed.unwrap_model(model)."
        )
    if handler is not None and not (theirs and theirs[0].handler == handler):
        return (
            f"Handler {handler} is called on rank {first}, and not on rank {other}, but what it does takes all ranks: "
            "attach it on every rank, not under `if world.rank == 0:`."
        )
    if (
        has_fewer_calls
        and mine
        and theirs
        and mine[0].epoch == theirs[0].epoch
        and mine[0].iteration < theirs[0].iteration
    ):
        return (
            f"The data of rank {first} have ended after iteration {mine[0].iteration}, but rank {other} is in "
            f"iteration {theirs[0].iteration}, where DistributedDataParallel needs all ranks: give all ranks the same "
            "number of batches, by distributed.prepare_data_loader() with the same batch_size on every rank."
        )
    if has_fewer_calls:
        is_same_step = mine == theirs and one["collective"] != END_OF_GROUP
        only_here = (
            f" Or rank {other} does not call {one['collective']}: call it on every rank." if is_same_step else ""
        )
        return _advice_on_fewer_calls(first, other, _joined(one), _joined(two)) + only_here
    return (
        f"Rank {first} calls a collective that rank {other} does not call: call it on every rank, not under "
        "`if world.rank == 0:`, and in the same order."
    )


def _advice_on_fewer_calls(first: int, other: int, fewer: int, more: int) -> str:
    return (
        f"Rank {first} has taken part in fewer of torch's collectives than rank {other} ({fewer}, not {more}). Either "
        "it skipped backward() in a step, or its loss did not touch the model: call backward() in every step on every "
        "rank, with a loss times 0 rather than without one. Or it had fewer batches: prepare the data by "
        "distributed.prepare_data_loader(), with the same batch_size on every rank, and give run() the same limits. "
        f"Or rank {other} calls a collective of torch.distributed that rank {first} does not call."
    )
