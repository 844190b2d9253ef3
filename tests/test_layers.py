"""Who imports whom: every import of the package, read from its source, lazy ones too, against the table of layers.

The table is the one of docs/architecture.md, so that what is drawn there is what is checked.
"""

import ast
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "dengine"
FILES = sorted(ROOT.rglob("*.py"))

PAGE = (ROOT.parent / "docs" / "architecture.md").read_text()
_ROW = re.compile(r"^\| (\d+) \| `([a-z0-9_.]+)` \|", re.MULTILINE)
# Sub-package, or module at the top -> its layer.
LAYERS = {name: int(layer) for layer, name in _ROW.findall(PAGE)}

HEAVY = {
    "accelerate",
    "matplotlib",
    "mlflow",
    "omegaconf",
    "tensorboard",
    "torchmetrics",
    "tqdm",
    "trackio",
    "wandb",
    "yaml",
}


def subpackage(module: str) -> str:
    """The row of the table that `module` belongs to: the longest that fits; `dengine` and its `__main__` have one."""
    parts = module.split(".")[1:]
    for length in range(len(parts), 0, -1):
        if (name := ".".join(parts[:length])) in LAYERS:
            return name
    if parts in ([], ["__init__"], ["__main__"]):
        return "dengine"
    raise LookupError(f"{module} is in no row of the table of layers in docs/architecture.md")


def module_of(path: Path) -> str:
    parts = ["dengine", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def is_for_types_only(node: ast.AST) -> bool:
    if not isinstance(node, ast.If):
        return False
    test = node.test
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of each import that may run, inside functions and `import_module` too."""
    for node in ast.iter_child_nodes(tree):
        if is_for_types_only(node):
            assert isinstance(node, ast.If)
            for other in node.orelse:
                yield from imports(ast.Module([other], []), package)
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from dengine import distributed` imports dengine.distributed.
                yield node.lineno, f"{source}.{alias.name}" if _is_module(f"{source}.{alias.name}") else source
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)
        yield from imports(node, package)


def imports_of(source: str, module: str, *, is_package: bool = False) -> list[tuple[int, str]]:
    return list(imports(ast.parse(source), module if is_package else module.rpartition(".")[0]))


def _is_module(name: str) -> bool:
    path = ROOT.parent.joinpath(*name.split("."))
    return name.startswith("dengine.") and (path.is_dir() or path.with_suffix(".py").is_file())


def is_allowed(importer: str, imported: str) -> bool:
    """Whether a file of sub-package `importer` may import from sub-package `imported`."""
    return importer == imported or LAYERS[imported] < LAYERS[importer]


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    return [
        f"{module}:{line} imports {imported}"
        for line, imported in imports_of(source, module, is_package=is_package)
        if imported.split(".")[0] == "dengine" and not is_allowed(subpackage(module), subpackage(imported))
    ]


# -- the layers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_from_below_and_from_its_own_folder_only(path: Path) -> None:
    module = module_of(path)
    assert violations(path.read_text(), module, is_package=path.name == "__init__.py") == []


def test_every_subpackage_has_a_row_and_every_row_a_subpackage() -> None:
    found = {subpackage(module_of(path)) for path in FILES}
    assert found == LAYERS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_read_as_python_without_star_imports(path: Path) -> None:
    stars = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
    ]
    assert stars == []


@pytest.mark.parametrize(
    ("module", "source", "num_violations"),
    [
        ("dengine.engine.loop", "from dengine.metrics import Metric", 0),
        ("dengine.metrics.core.metric", "from dengine.engine import Engine", 1),
        ("dengine.metrics.core.metric", "def f():\n    from dengine.engine import Engine", 1),
        ("dengine.metrics.core.metric", "if TYPE_CHECKING:\n    from dengine.engine import Engine", 0),
        ("dengine.metrics.core.metric", "if TYPE_CHECKING:\n    pass\nelse:\n    from dengine.engine import Engine", 1),
        ("dengine.metrics.core.metric", "import dengine.handlers.checkpoint", 1),
        ("dengine.metrics.core.metric", "from dengine import handlers", 1),
        ("dengine.metrics.core.metric", "from dengine import Engine", 1),
        ("dengine.metrics.core.metric", "from ...engine import loop", 1),
        ("dengine.metrics.core.metric", "from .inputs import as_pair", 0),
        ("dengine.metrics.core.metric", "from importlib import import_module\nimport_module('dengine.engine')", 1),
        (
            "dengine.metrics.core.metric",
            "class A:\n    def f(self):\n        try:\n            import dengine.tools",
            1,
        ),
        ("dengine.distributed.world", "from dengine.errors import DengineError", 0),
        ("dengine.distributed.world", "from dengine.metrics import Metric", 1),
        ("dengine.engine.loop", "from dengine.checkpoint import save", 1),
        ("dengine.handlers.timer", "from dengine.checkpoint import save", 0),
        ("dengine.errors", "from dengine.distributed import world", 1),
        ("dengine.supervised.step", "from dengine.tools.doctor import x", 1),
        ("dengine.tools.doctor", "from dengine.handlers import x\nimport torch", 0),
    ],
)
def test_the_reader_of_imports_finds_what_it_should(module: str, source: str, num_violations: int) -> None:
    if source.endswith("import dengine.tools"):
        source += "\n        finally:\n            pass"
    assert len(violations(source, module)) == num_violations


# -- what the page names -----------------------------------------------------------------------------------------

NAMED_FILES = sorted(set(re.findall(r"`([\w/]+\.py)`", PAGE)))
NAMED_FUNCTIONS = sorted(set(re.findall(r"`([\w.]+)\(\)`", PAGE)))
# "`function()` in `file.py`", "`function()` of `file.py`" and "`file.py`: `function()`".
PLACED_FUNCTIONS = sorted(
    set(re.findall(r"`([\w.]+)\(\)`\s+(?:in|of)\s+`([\w/]+\.py)`", PAGE))
    | {(function, file) for file, function in re.findall(r"`([\w/]+\.py)`:\s+`([\w.]+)\(\)`", PAGE)}
)


def defined_in(path: Path) -> set[str]:
    """The functions of a file, methods with and without the name of their class."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
    return names


def files_by_function() -> dict[str, list[Path]]:
    found = defaultdict(list)
    for path in FILES:
        for name in defined_in(path):
            found[name].append(path)
    return found


def path_of(file: str) -> Path:
    """Files are named from the package on, those of the tests and examples from the root on."""
    return ROOT.parent / file if file.startswith(("tests", "examples")) else ROOT / file


@pytest.mark.parametrize("file", NAMED_FILES)
def test_every_file_that_the_page_names_exists(file: str) -> None:
    assert path_of(file).is_file()


def test_every_function_that_the_page_names_exists() -> None:
    assert NAMED_FUNCTIONS
    defined = files_by_function()
    assert [name for name in NAMED_FUNCTIONS if name not in defined] == []


@pytest.mark.parametrize(("function", "file"), PLACED_FUNCTIONS)
def test_a_function_is_in_the_file_where_the_page_says(function: str, file: str) -> None:
    assert function in defined_in(path_of(file))


# -- what is loaded, and what is started -------------------------------------------------------------------------

PROBE = """
import json, sys, threading
before = threading.active_count()
import torch
import torch.distributed
loaded_by_torch = set(sys.modules)
import dengine
dengine.Engine
dengine.distributed
dengine.metrics
loaded = {name.partition(".")[0] for name in set(sys.modules) - loaded_by_torch}
print(json.dumps({
    "loaded": sorted(loaded),
    "threads": threading.active_count() - before,
    "initialized": torch.distributed.is_initialized(),
    "cuda": torch.cuda.is_initialized(),
}))
"""


def test_importing_loads_nothing_that_is_not_used_and_starts_nothing() -> None:
    printed = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(printed.stdout)
    assert HEAVY.isdisjoint(found["loaded"])
    assert found["threads"] == 0
    assert not found["initialized"]
    assert not found["cuda"]
    assert printed.stderr == ""


def test_importing_the_package_alone_does_not_even_load_torch() -> None:
    code = "import sys, dengine; assert 'torch' not in sys.modules; dengine.Engine; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_every_public_name_can_be_looked_up_and_a_wrong_one_is_an_attribute_error() -> None:
    code = (
        "import dengine\n"
        "for name in dengine.__all__: getattr(dengine, name)\n"
        "assert set(dengine.__all__) <= set(dir(dengine))\n"
        "try: dengine.Engin\n"
        "except AttributeError as error: assert 'Engin' in str(error)\n"
        "else: raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_its_own_room_imports_a_heavy_package_at_its_top(path: Path) -> None:
    top_level = [
        name.partition(".")[0]
        for node in ast.parse(path.read_text()).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names])
    ]
    # The one room that is entered only with a metric of torchmetrics' in hand.
    allowed = {"torchmetrics"} if path.name == "torchmetrics.py" else set()
    assert HEAVY & set(top_level) <= allowed
