"""Names in the package are the field's: words that were only this package's own do not come back as names."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "dengine"
FILES = sorted(ROOT.rglob("*.py"))

# Word in a name -> what it is called in the field.
REPLACED = {
    "storey": "layer",
    "roll_call": "liveness probe",
    "presence": "heartbeat",
    "standing": "group status",
    "ledger": "collective call log",
    "meeting": "rendezvous",
    "orphan": "parent-death signal",
    "wish": "stop request",
    "hear": "receive",
    "forgiven": "recovered",
    "break_off": "abort",
    "take_apart": "flatten",
    "give_back": "load_state_dict",
    "lane": "header flag",
    "survey": "scan",
    "unrecorded": "null run",
    "chair": "coordinator",
    "visitor": "session",
    "told": "set, reported",
    "tell": "set, report",
    "begun": "started",
    "held": "kept, own",
    "by_hand": "by the user",
    "elsewhere": "another place, by its name",
    "put_together": "gather, from flat",
    "put_back": "push back",
    "settle": "build early, flush",
    "settled": "built early, recovered",
    "digested": "hashed",
    "room": "disk space, subpackage",
    "rooms": "subpackage",
    "bounds": "stop target",
    "covers": "compute group",
    "behind": "late, slower",
    "places": "positions, indices",
    "forgive": "recover",
}


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of each function, class, argument, variable and attribute that the file defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def replacement(name: str) -> str | None:
    """The field's term for a word in `name`, which may be in snake case or camel case."""
    words = f"_{re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '_', name).lower()}_"
    return next((term for word, term in REPLACED.items() if f"_{word}_" in words), None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_are_the_terms_of_the_field(path: Path) -> None:
    found = [(1, path.stem), *names(ast.parse(path.read_text()))]
    foreign = [f"line {line}: {name} is a {term}" for line, name in found if (term := replacement(name)) is not None]
    assert not foreign


@pytest.mark.parametrize("name", ["_roll_call", "RollCall", "is_orphan", "_Visitor", "Ledger"])
def test_a_word_is_found_in_each_form_of_a_name(name: str) -> None:
    assert replacement(name) is not None


@pytest.mark.parametrize("name", ["outstanding", "planes", "furniture", "wished_for", "_appears"])
def test_a_part_of_another_word_is_none(name: str) -> None:
    assert replacement(name) is None
