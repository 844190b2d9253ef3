"""Compare the clocks of the ranks through the store."""

import time

from dengine.tools.doctor.exchange import Exchange
from dengine.tools.doctor.report import Finding, Verdict, ranks_text

__all__ = ["answer_clock", "ask_clock", "judge_clock"]

_NUM_ROUNDS = 4  # the first includes the wait for this rank's turn; the fastest of the others is used
_WARN_S, _FAIL_S = 1.0, 300.0
_ROUND_S = 10.0


def answer_clock(exchange: Exchange, ranks: list[int]) -> None:
    """Answer the requests of `ranks` for the time, on the coordinator. Raises: TimeoutError; StoreLostError."""
    for rank in ranks:
        for turn in range(_NUM_ROUNDS):
            exchange.wait(f"clock/ask/{rank}/{turn}", _ROUND_S)
            exchange.answer(f"clock/answer/{rank}/{turn}", repr(time.time()))


def ask_clock(exchange: Exchange, turn_s: float) -> dict[str, float]:
    """The seconds by which this rank's clock is ahead of the coordinator's, and the uncertainty of that.

    Raises: TimeoutError: this rank had no turn within `turn_s`; StoreLostError.
    """
    rounds = []
    for turn in range(_NUM_ROUNDS):
        began, began_at = time.time(), time.monotonic()
        exchange.ping(f"clock/ask/{exchange.rank}/{turn}")
        theirs = float(exchange.wait(f"clock/answer/{exchange.rank}/{turn}", _ROUND_S if turn else turn_s))
        took = time.monotonic() - began_at
        rounds.append((took, began + took / 2 - theirs))
    took, ahead = min(rounds[1:])
    return {"ahead_s": ahead, "uncertain_s": took / 2}


def judge_clock(facts: dict[int, dict[str, float]], coordinator: int, hosts: dict[int, str]) -> Finding:
    """Whether the clocks agree. `facts` are those of all ranks but the coordinator, with which they are compared."""
    if not facts:
        return Finding("clock", Verdict.SKIP, "one rank has no other to compare with")
    worst = max(facts, key=lambda rank: abs(facts[rank]["ahead_s"]))
    ahead, uncertain = facts[worst]["ahead_s"], facts[worst]["uncertain_s"]
    verdict = Verdict.FAIL if abs(ahead) >= _FAIL_S else Verdict.WARN if abs(ahead) >= _WARN_S else Verdict.OK
    if verdict is Verdict.OK:
        figure = f"{1000 * max(abs(ahead), uncertain):.1f} ms apart at most"
        return Finding(
            "clock", verdict, figure, data={"ahead_s": {rank: each["ahead_s"] for rank, each in facts.items()}}
        )
    off = sorted(rank for rank in facts if abs(facts[rank]["ahead_s"]) >= _WARN_S)
    return Finding(
        "clock",
        verdict,
        f"{ranks_text([worst], hosts)} is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} "
        f"rank {coordinator}",
        "set the clocks by NTP (`chronyc makestep`, `timedatectl set-ntp true`): times in logs and metrics do not fit "
        "together, and SLURM's munge and Kerberos refuse hosts that are 5 minutes apart.",
        tuple(off),
        {"ahead_s": {rank: each["ahead_s"] for rank, each in facts.items()}},
    )
