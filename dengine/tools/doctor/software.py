"""Check that every rank has the same versions and the same code."""

import hashlib
import platform
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from dengine.tools.doctor.facts import Facts
from dengine.tools.doctor.report import Finding, Verdict, ranks_text
from dengine.version import __version__

__all__ = ["code_facts", "judge_code", "judge_versions", "version_facts"]

_MUST_BE_EQUAL = ("dengine", "torch", "cuda", "nccl")  # else ranks cannot communicate, or compute differently
_SKIPPED = {"__pycache__", "node_modules", "site-packages"}
_MOST_FILES = 5000


def version_facts() -> dict[str, str]:
    return {
        "dengine": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "nccl": _nccl(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def code_facts(paths: Iterable[Path]) -> dict[str, str]:
    """A digest of each source file of this package, and of `paths` (files, and folders with their content).

    The names do not depend on the folder of the code on a host.
    """
    package = Path(__file__).parents[2]
    found = {f"dengine/{name}": digest for name, digest in _digests(package).items()}
    for index, path in enumerate(paths):
        found |= {f"{path.name or index}/{name}": digest for name, digest in _digests(path).items()}
    return found


def judge_versions(facts: Facts, hosts: dict[int, str]) -> Finding:
    reported = {rank: each["versions"] for rank, each in facts.items()}
    first = reported[min(reported)]
    for name in first:
        values = {rank: each[name] for rank, each in reported.items()}
        odd, common = _odd(values)
        if odd:
            return Finding(
                "versions",
                Verdict.FAIL if name in _MUST_BE_EQUAL else Verdict.WARN,
                f"{name} is {values[odd[0]]} on {ranks_text(odd, hosts)}, and {common} on the others",
                "install the same environment on every host, or use one on a shared file system.",
                tuple(odd),
            )
    figure = ", ".join(f"{name} {value}" for name, value in first.items() if value != "none")
    return Finding("versions", Verdict.OK, figure, data=first)


def judge_code(facts: Facts, hosts: dict[int, str]) -> Finding:
    reported = {rank: each["code"] for rank, each in facts.items()}
    odd, _ = _odd({rank: _digest_of_all(each) for rank, each in reported.items()})
    reference = reported[next(rank for rank in sorted(reported) if rank not in odd)]
    if odd:
        theirs = reported[odd[0]]
        changed = [name for name in sorted({*reference, *theirs}) if reference.get(name) != theirs.get(name)]
        first = f"{changed[0]} {'is missing' if changed[0] not in theirs else 'differs'}"
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        return Finding(
            "code",
            Verdict.FAIL,
            f"other code on {ranks_text(odd, hosts)} than on the others: {first}{more}",
            "bring the code of that host up to date: an old copy, another installation on its PYTHONPATH, or a file "
            "system that has not caught up.",
            tuple(odd),
            {"files": changed},
        )
    return Finding("code", Verdict.OK, f"{len(reference)} source files, SHA-256 {_digest_of_all(reference)[:12]}")


def _digests(path: Path) -> dict[str, str]:
    if not path.exists():
        raise FileNotFoundError(f"--code {path} does not exist.")
    if path.is_file():
        return {path.name: _digest(path)}
    files = []
    for each in sorted(path.rglob("*.py")):
        parts = each.relative_to(path).parts
        if not any(part in _SKIPPED or part.startswith(".") for part in parts):
            files.append(each)
    if len(files) > _MOST_FILES:
        raise ValueError(f"{path} holds {len(files)} source files: pass the folder of your own code by --code.")
    return {each.relative_to(path).as_posix(): _digest(each) for each in files}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _digest_of_all(files: dict[str, str]) -> str:
    return hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()


def _odd(values: dict[int, str]) -> tuple[list[int], str]:
    """The ranks that differ from the most frequent value (in a tie, that of the lowest rank), and that value."""
    counts = Counter(values[rank] for rank in sorted(values))
    common = counts.most_common(1)[0][0]
    return [rank for rank in sorted(values) if values[rank] != common], common


def _nccl() -> str:
    if not torch.cuda.is_available():
        return "none"
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
