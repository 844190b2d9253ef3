"""`python -m dengine COMMAND`: see `python -m dengine --help`."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

__all__ = ["COMMANDS", "main"]

# The name of a command -> what it shows. `python -m dengine NAME` runs dengine.tools.NAME, or what _MODULES says.
COMMANDS = {
    "doctor": "whether a training would work here: launcher, ranks, devices, network, checkpoint folder",
    "export": "a model of a checkpoint for other tools: safetensors, torch.distributed.checkpoint, or torch.save's",
    "import": "what other tools have saved, as a checkpoint",
    "inspect": "what is in a checkpoint, or in a folder of them, verified",
    "plot": "the learning curves of runs, as a picture",
}
_MODULES = {"import": "import_state"}  # a module cannot be called as a statement is


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that `arguments` (by default, those of the process) name, and give its exit code."""
    parser = argparse.ArgumentParser(prog="python -m dengine", description="Tools of dengine.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, purpose in COMMANDS.items():
        commands.add_parser(name, help=purpose, add_help=False)
    chosen, rest = parser.parse_known_args(arguments)
    module = import_module(f"dengine.tools.{_MODULES.get(chosen.command, chosen.command)}")
    own = argparse.ArgumentParser(prog=f"python -m dengine {chosen.command}", description=COMMANDS[chosen.command])
    module.configure(own)
    return int(module.run(own.parse_args(rest)))


if __name__ == "__main__":
    sys.exit(main())
