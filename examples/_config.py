"""What the examples share around their work: a configuration that is checked before anything is built, and which run it
is that goes on; and the end."""

import json
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dengine import ConfigError, distributed
from dengine.config import Conf, Config
from dengine.distributed import World

__all__ = ["PREEMPTED", "folders", "mesh_sizes", "read_arguments", "refuse", "settings", "start", "unfinished_run"]

PREEMPTED = 75  # the exit code of a job that has saved and wants to be started again


def read_arguments(path: Path, about: str | None, *, fractions: Collection[str] = ()) -> Config:
    """The configuration in `path`, and over it the command line's `key=value` or `--key value`; `--help` shows it and
    ends.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{about}\n{path.read_text()}", end="")
        raise SystemExit(0)
    return settings(Conf.load(path), _entries_of(sys.argv[1:]), fractions=fractions)


def _entries_of(arguments: Sequence[str]) -> list[str]:
    """`arguments`, with `key=value` for each `--key=value` and each `--key value`."""
    entries, rest = [], iter(arguments)
    for argument in rest:
        key, is_given, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and not is_given:
            value = next(rest, "") or refuse(f"{argument} needs a value")
            argument = f"{key}={value}"
        entries.append(argument.removeprefix("--"))
    return entries


def folders(cfg: Config, safe: str | Path) -> list[str]:
    """Where checkpoints are: in memory, if `fast_dir` or the launcher (`--fast-dir`) names a folder, and in `safe`."""
    fast = cfg.fast_dir or os.environ.get("DENGINE_FAST_DIR")
    return [*([str(fast)] if fast else []), str(safe)]


def mesh_sizes(text: object) -> dict[str, int] | None:
    """The mesh that "dp_shard=2,tp=2" says; None says none."""
    if text is None:
        return None
    try:
        return distributed.mesh_sizes(str(text))
    except ValueError as error:
        refuse(str(error))


def settings(base: Config, arguments: Sequence[str], *, fractions: Collection[str] = ()) -> Config:
    """`base` with `arguments` over it, frozen; the script is ended where one of them is no value for its entry.

    A number takes the place of a number, and a whole one that of a whole one: above 0, but for `seed` and those of
    `fractions`, which are from 0 to below 1. What is null in `base` takes anything.
    """
    try:
        cfg = Conf.freeze(Conf.merge(base, Conf.from_cli_dotlist(arguments, known=base)))
    except ConfigError as error:
        refuse(str(error))
    given = dict(_entries(Conf.to_dict(cfg)))
    for name, default in _entries(Conf.to_dict(base)):
        wanted = _wanted(default, may_be_zero=name == "seed", is_fraction=name in fractions)
        if wanted is not None and not wanted[1](given[name]):
            refuse(f"{name}={given[name]} must be {wanted[0]}")
    return cfg


def refuse(message: str) -> NoReturn:
    print("error:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)


def unfinished_run(project: str, cfg: Config) -> str | None:
    """What `Track.run(resume=)` takes: the newest run in `cfg.output` with these very settings, if it was cut short."""
    for status in sorted(Path(str(cfg.output), project).glob("*/status.json"), reverse=True):  # ids sort by time
        if json.loads(status.with_name("config.json").read_text()) == Conf.to_dict(cfg):
            is_over = json.loads(status.read_text())["status"] == "finished"
            return None if is_over else status.parent.name
    return None


def start(run: Callable[[World], object], mesh: Mapping[str, int] | None = None) -> None:
    """`run(world)` in the group of processes that this one is of; Ctrl-C ends all of them with one line."""
    is_preempted = False
    with distributed.process_group(mesh=mesh) as world:
        try:
            run(world)
        except KeyboardInterrupt:
            distributed.rank_zero_only(print)("Interrupted.", flush=True)
            raise SystemExit(130) from None
        except SystemExit as leaving:  # an exit inside of the group is a failure, for which the other ranks are ended
            is_preempted = leaving.code == PREEMPTED
            if not is_preempted:
                raise
    if is_preempted:  # all ranks have left together
        raise SystemExit(PREEMPTED)


def _entries(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """What is in `tree`, and in the mappings in it, by full name."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _entries(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _wanted(default: Any, *, may_be_zero: bool, is_fraction: bool) -> tuple[str, Callable[[Any], bool]] | None:
    """What must stand in the place of `default`, in words and as a check."""
    if isinstance(default, str):
        return "a text", lambda value: isinstance(value, str | int) and not isinstance(value, bool) and value != ""
    if is_fraction:
        return "a number from 0 to below 1", lambda value: _is_number(value) and 0 <= value < 1
    if isinstance(default, bool):
        return "true or false", lambda value: isinstance(value, bool)
    if isinstance(default, int):
        least, words = (0, "of at least 0") if may_be_zero else (1, "above 0")
        return f"a whole number {words}", lambda value: _is_number(value) and isinstance(value, int) and value >= least
    if isinstance(default, float):
        return "a number above 0", lambda value: _is_number(value) and 0 < value < float("inf")
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
