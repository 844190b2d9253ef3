"""Print the findings of checks, as lines of text or as JSON."""

import json
import os
import shutil
import textwrap
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TextIO

__all__ = ["Finding", "Header", "Report", "Verdict", "ranks_text"]

_COLORS = {"ok": "32", "warn": "33", "fail": "31;1", "skip": "2"}
_INDENT = " " * 8
_NAME_WIDTH = 12
_MOST_NAMED = 8


class Verdict(str, Enum):
    """The result of a check.

    `fail`: training would fail. `warn`: it may fail, or is slower than necessary. `skip`: there was nothing to check.
    """

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True)
class Finding:
    """One line of the report: the check, its verdict, the figure, and the advice if it is not ok.

    `ranks` are the ranks that differ or fail; `data` is for programs only.
    """

    check: str
    verdict: Verdict
    figure: str
    advice: str = ""
    ranks: tuple[int, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Header:
    launcher: str
    size: int
    hosts: tuple[str, ...]

    def __str__(self) -> str:
        hosts = self.hosts[0] if len(self.hosts) == 1 else f"{len(self.hosts)} hosts"
        if self.launcher in ("single", "alone"):
            return f"one process on {hosts}" + (", which finds no others" if self.launcher == "alone" else "")
        return f"{self.size} rank{'s' * (self.size > 1)} on {hosts}"


class Report:
    """Collects findings; prints each at once, or all as JSON at the end."""

    def __init__(self, out: TextIO, *, as_json: bool) -> None:
        self.findings: list[Finding] = []
        self._header: Header | None = None
        self._began_s = time.monotonic()
        self._out = out
        self._as_json = as_json
        self._has_color = out.isatty() and "NO_COLOR" not in os.environ
        self._width = max(60, min(120, shutil.get_terminal_size((100, 24)).columns))

    @property
    def verdict(self) -> Verdict:
        """The worst of all findings; ok if nothing is wrong."""
        found = {finding.verdict for finding in self.findings}
        return next((each for each in (Verdict.FAIL, Verdict.WARN) if each in found), Verdict.OK)

    def open(self, header: Header) -> None:
        self._header = header
        if not self._as_json:
            self._print(f"dengine doctor: {header}\n")

    def add(self, *findings: Finding) -> None:
        for finding in findings:
            self.findings.append(finding)
            if not self._as_json:
                self._print(self._line(finding))

    def close(self) -> None:
        """Print the verdict of all findings, and the seconds since this report was made."""
        seconds = time.monotonic() - self._began_s
        if self._as_json:
            self._print(json.dumps(self._data(seconds), indent=2))
            return
        counts = {each: sum(finding.verdict is each for finding in self.findings) for each in Verdict}
        summary = {
            Verdict.OK: "nothing stands in the way of training",
            Verdict.WARN: "training should work; see the warnings",
            Verdict.FAIL: "training would fail",
        }[self.verdict]
        counted = ", ".join(f"{count} {each.value}" for each, count in counts.items() if count)
        self._print(f"\n{self._painted(self.verdict, summary)} ({counted}; {seconds:.1f} s)")

    def _line(self, finding: Finding) -> str:
        verdict = self._painted(finding.verdict, f"{finding.verdict.value:<4}")
        text = self._wrapped(finding.figure, len(_INDENT) + _NAME_WIDTH + 2) or [""]
        margin = f"\n{_INDENT}{'':<{_NAME_WIDTH}}  "
        line = f"  {verdict}  {finding.check:<{_NAME_WIDTH}}  " + margin.join(text)
        if finding.advice:
            advice = self._wrapped(f"-> {finding.advice}", len(_INDENT), subsequent_indent="   ")
            line += "".join(f"\n{_INDENT}{each}" for each in advice)
        return line

    def _wrapped(self, text: str, margin: int, subsequent_indent: str = "") -> list[str]:
        # Options and paths are never cut, so that they can be copied.
        return textwrap.wrap(
            text,
            self._width - margin,
            subsequent_indent=subsequent_indent,
            break_on_hyphens=False,
            break_long_words=False,
        )

    def _painted(self, verdict: Verdict, text: str) -> str:
        return f"\033[{_COLORS[verdict.value]}m{text}\033[0m" if self._has_color else text

    def _print(self, text: str) -> None:
        # Under torchrun and srun this is a pipe: without the flush, lines would only show at the end.
        print(text, file=self._out, flush=True)

    def _data(self, seconds: float) -> dict[str, Any]:
        header = self._header or Header("single", 1, ())
        return {
            "verdict": self.verdict.value,
            "launcher": header.launcher,
            "size": header.size,
            "hosts": list(header.hosts),
            "seconds": round(seconds, 3),
            "checks": [
                {
                    "check": finding.check,
                    "verdict": finding.verdict.value,
                    "figure": finding.figure,
                    "advice": finding.advice,
                    "ranks": list(finding.ranks),
                    **({"data": dict(finding.data)} if finding.data else {}),
                }
                for finding in self.findings
            ],
        }


def ranks_text(ranks: Iterable[int], hosts: Mapping[int, str] | None = None) -> str:
    """The ranks as text, `rank 3 (node2)`, `ranks 0, 3 and 5`, with hosts if there are several; many are counted."""
    has_several = hosts is not None and len(set(hosts.values())) > 1
    named = [
        f"{rank} ({hosts[rank]})" if hosts is not None and has_several and rank in hosts else str(rank)
        for rank in sorted(ranks)
    ]
    if len(named) == 1:
        return f"rank {named[0]}"
    if len(named) > _MOST_NAMED:
        return f"ranks {', '.join(named[: _MOST_NAMED - 1])} and {len(named) - _MOST_NAMED + 1} more"
    return f"ranks {', '.join(named[:-1])} and {named[-1]}"
