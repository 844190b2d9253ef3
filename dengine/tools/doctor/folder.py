"""Check the checkpoint folder: all ranks can write there, they share it, and renamed files are complete."""

import errno
import os
import statistics
import time
from contextlib import suppress
from pathlib import Path

from dengine.tools.doctor.facts import FolderFacts
from dengine.tools.doctor.report import Finding, Verdict, ranks_text

__all__ = ["judge_folder", "judge_shared", "leave_folder", "probe_folder", "sees_file_of"]

_NUM_FLUSHES = 5
_PROBE_BYTES = 1 << 20
_FEW_BYTES, _SLOW_FLUSH_S = 5 << 30, 0.25
_APPEARS_S = 5.0  # on NFS, files of another host may appear late
_ADVICE = {
    errno.EROFS: "it is mounted read-only: pass a folder that ranks may write to by --folder, or remount it "
    "(docker run -v without :ro).",
    errno.EACCES: "this user may not write there: pass another folder by --folder, or change its owner or mode.",
    errno.ENOSPC: "it is full: remove what is not needed, or pass a folder on another disk by --folder.",
    errno.ENOTDIR: "pass a folder, or one that does not exist yet, by --folder, or move away what is there.",
    errno.EDQUOT: "this user's quota is used up: remove what is not needed, or pass another folder by --folder.",
}
_ADVICE[errno.EPERM] = _ADVICE[errno.EACCES]


def probe_folder(folder: Path, session_id: str, rank: int) -> FolderFacts:
    """Write, flush, rename and read a file of this rank's own in a new sub-folder of `folder`, named after the session.

    If `folder` does not exist yet, the nearest existing folder above it is tried; only the sub-folder is made.
    """
    around = (folder.absolute(), *folder.absolute().parents)
    base = next(each for each in around if each.is_dir())
    part = base / f".dengine-doctor-{session_id}"
    results: FolderFacts = {"folder": str(folder.absolute()), "base": str(base), "part": str(part)}
    if (in_the_way := next((each for each in around if os.path.lexists(each)), base)) != base:
        return results | {"base": str(in_the_way), "error": "it is not a folder", "errno": errno.ENOTDIR}
    try:
        found = os.statvfs(base)
        results["free"] = found.f_bavail * found.f_frsize
        # Some file systems count no inodes, and say 0 of 0.
        results["has_inodes"] = found.f_favail > 0 or found.f_files == 0
        part.mkdir(exist_ok=True)
        results["flush_s"] = _flushes(part / f"{rank}.tmp")
        results["is_whole"] = _renames(part / f"{rank}.tmp", part / f"rank_{rank}", f"{session_id} {rank}".encode())
    except OSError as error:
        results |= {"error": error.strerror or str(error), "errno": error.errno}
    return results


def sees_file_of(probe: FolderFacts, session_id: str, coordinator: int) -> bool:
    """Whether this rank finds the coordinator's file in the folder, with its content."""
    path, expected = Path(probe["part"], f"rank_{coordinator}"), f"{session_id} {coordinator}".encode()
    end = time.monotonic() + _APPEARS_S
    while True:
        with suppress(OSError):
            if path.read_bytes()[: len(expected)] == expected:
                return True
        if time.monotonic() >= end or not Path(probe["part"]).is_dir():
            return False
        time.sleep(0.1)


def leave_folder(probe: FolderFacts, rank: int) -> None:
    """Remove the files of this rank, and the sub-folder once it is empty."""
    part = Path(probe["part"])
    for path in (part / f"{rank}.tmp", part / f"rank_{rank}"):
        with suppress(OSError):
            path.unlink()
    with suppress(OSError):
        part.rmdir()


def judge_folder(facts: dict[int, FolderFacts], hosts: dict[int, str]) -> Finding:
    failed = [rank for rank, each in facts.items() if "error" in each]
    if failed:
        first = facts[failed[0]]
        return Finding(
            "folder",
            Verdict.FAIL,
            f"{first['base']} cannot be written by {ranks_text(failed, hosts)}: {first['error']}",
            _ADVICE.get(first["errno"] or 0, "pass another folder by --folder."),
            tuple(failed),
        )
    torn = [rank for rank, each in facts.items() if not each["is_whole"]]
    first = facts[min(facts)]
    if torn:
        return Finding(
            "folder",
            Verdict.FAIL,
            f"in {facts[torn[0]]['base']} a renamed file is not what was written ({ranks_text(torn, hosts)})",
            "checkpoints need atomic renames: pass a folder on a POSIX file system by --folder, not on object storage.",
            tuple(torn),
        )
    flush = {rank: statistics.median(each["flush_s"]) for rank, each in facts.items()}
    slowest = max(flush, key=lambda rank: flush[rank])
    least = min(facts, key=lambda rank: (facts[rank]["has_inodes"], facts[rank]["free"]))
    free = facts[least]["free"]
    named = (
        first["base"]
        if first["base"] == first["folder"]
        else f"{first['folder']} (does not exist yet), in {first['base']}"
    )
    figure = f"{named}: {free / 1e9:.1f} GB free, renames are whole, fsync {1000 * flush[slowest]:.1f} ms"
    figure += f" at most ({ranks_text([slowest], hosts)})" if len(facts) > 1 else ""
    data = {"free_bytes": free, "flush_s": flush}
    if free < _FEW_BYTES or not facts[least]["has_inodes"]:
        what = figure if facts[least]["has_inodes"] else f"{named}: no more files can be made"
        advice = "a new checkpoint is written before the oldest one is removed: keep space for n_saved + 1 of them."
        return Finding("folder", Verdict.WARN, what, advice, (least,), data)
    if flush[slowest] > _SLOW_FLUSH_S:
        advice = "saving waits for the disk: save less often, or with Checkpoint(asynchronous=True)."
        return Finding("folder", Verdict.WARN, figure, advice, (slowest,), data)
    return Finding("folder", Verdict.OK, figure, data=data)


def judge_shared(
    seen: dict[int, bool], probes: dict[int, FolderFacts], coordinator: int, hosts: dict[int, str]
) -> Finding:
    """Whether all ranks share the folder. `seen`: for each other rank, whether it sees the coordinator's file."""
    if "error" in probes[coordinator] or not seen:
        why = f"rank {coordinator} cannot write there" if seen else "one rank has no other to share with"
        return Finding("shared", Verdict.SKIP, why)
    blind = sorted(rank for rank, is_seen in seen.items() if not is_seen)
    if not blind:
        return Finding("shared", Verdict.OK, f"all ranks see what rank {coordinator} wrote in the folder")
    theirs = {probes[rank]["folder"] for rank in blind}
    other = (
        ""
        if theirs == {probes[coordinator]["folder"]}
        else f" (theirs is {min(theirs)}, not {probes[coordinator]['folder']})"
    )
    verb = "does" if len(blind) == 1 else "do"
    return Finding(
        "shared",
        Verdict.FAIL,
        f"{ranks_text(blind, hosts)} {verb} not see what rank {coordinator} ({hosts[coordinator]}) wrote in the "
        f"folder{other}",
        "no run could resume: pass one folder on a file system that all hosts share (NFS, Lustre, a common volume), by "
        "its absolute path.",
        tuple(blind),
    )


def _flushes(path: Path) -> list[float]:
    """The seconds of each fsync. The first one writes 1 MB, to notice a full disk."""
    took = []
    for turn in range(_NUM_FLUSHES):
        with path.open("wb") as file:
            file.write(bytes(_PROBE_BYTES if turn == 0 else 4096))
            file.flush()
            began = time.monotonic()
            os.fsync(file.fileno())
            took.append(time.monotonic() - began)
    return took


def _renames(temporary: Path, path: Path, content: bytes) -> bool:
    """Whether a file that is renamed over another one replaces it completely, and its old name is gone."""
    path.write_bytes(b"what was there before, and is longer" * 100)
    temporary.write_bytes(content)
    os.replace(temporary, path)
    return path.read_bytes() == content and not temporary.exists()
