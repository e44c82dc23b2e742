"""The code follows the package structure described in fedrun/README.md."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.runs import ROOT

PACKAGE = ROOT / "fedrun"
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
           for path in PACKAGE.rglob("*.py")}


def rows() -> list[tuple[list[str], list[str]]]:
    """The table of wings, from the top: the names in a row, and what these never import."""
    text = (PACKAGE / "README.md").read_text(encoding="utf-8")
    table = text.partition("| wing |")[2].partition("\n\n")[0].splitlines()[2:]
    cells = [line.strip("|").split("|") for line in table]
    return [(re.findall(r"`(\w+)`", first), re.findall(r"`(\w+)`", last))
            for first, _, last in cells]


def wing(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of every module that a file imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def test_the_table_names_every_wing() -> None:
    there = {wing(f"{name}.x") for name in MODULES} - {"__init__", "x"}
    named = [name for names, _ in rows() for name in names]
    assert sorted(named) == sorted(there)


def test_imports_run_one_way() -> None:
    """Against the order of the table, and what its last column excludes."""
    order = {name: n for n, (names, _) in enumerate(rows()) for name in names}
    never = {name: excluded for names, excluded in rows() for name in names}
    wrong = []
    for module, path in MODULES.items():
        for line, name in imports(path):
            parts = name.split(".")
            if parts[0] != "fedrun" or len(parts) < 2 or parts[1] not in order:
                continue
            here, there = wing(f"{module}.x"), parts[1]
            if here in order and here != there and (
                    order[there] <= order[here] or there in never[here]):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {here} imports {there}")
    assert not wrong


def test_modules_of_a_wing_import_in_no_circle() -> None:
    graph = {module: {name for _, full in imports(path)
                      for name in (full, full.rpartition(".")[0]) if name in MODULES}
             for module, path in MODULES.items()}
    finished: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above, module])
        if module not in finished:
            for below in graph[module]:
                visit(below, (*above, module))
            finished.add(module)

    for module in graph:
        visit(module, ())


def test_only_ranks_know_torch_distributed() -> None:
    for module, path in MODULES.items():
        if wing(f"{module}.x") not in ("distributed", "torchrun"):
            reported = [name for _, name in imports(path) if "distributed" in name
                    and name.startswith("torch")]
            assert not reported, f"{module} imports {reported}"


def is_fixture(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef) and any(
        "fixture" in ast.unparse(decorator).partition("(")[0] for decorator in node.decorator_list)


def test_test_modules_share_by_support_and_conftest_alone() -> None:
    """No test imports another test, nor a fixture: a conftest.py of its folder or one above has
    those that several modules use."""
    wrong = []
    for path in (ROOT / "tests").rglob("*.py"):
        shown, tree = path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))
        wrong += [f"{shown}:{line}: imports {name}" for line, name in imports(path)
                  if any(part == "conftest" or part.startswith("test_")
                         for part in name.split("."))]
        if path.name != "conftest.py" and not path.name.startswith("test_"):
            wrong += [f"{shown}:{node.lineno}: a fixture in no test or conftest.py"
                      for node in tree.body if is_fixture(node)]
    assert not wrong


def test_packages_are_the_folders() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = setup["options"]["packages"].split()
    folders = {f"fedrun.{path.parent.name}" for path in PACKAGE.glob("*/__init__.py")}
    assert sorted(listed) == sorted({"fedrun", "fedrun.configs", *folders})


@pytest.mark.slow
def test_the_wheel_holds_everything(tmp_path: Path) -> None:
    """Built, unpacked into an empty folder, every module imported, every preset resolved."""
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps",
                    "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)], check=True,
                   timeout=200)
    (wheel,) = tmp_path.glob("*.whl")
    place = tmp_path / "place"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(place)], check=True,
                   timeout=60)
    modules = [name.removesuffix(".__init__") for name in MODULES if not name.endswith("__main__")]
    program = f"""
import importlib, sys
sys.path.insert(0, {str(place)!r})
import fedrun
assert fedrun.__file__.startswith({str(place)!r}), fedrun.__file__
for name in {modules!r}:
    importlib.import_module(name)
from fedrun.flags import configs_dir, methods, resolve
presets = sorted(path.stem for path in (configs_dir() / "models").glob("*.yaml"))
assert len(presets) >= 6, presets
for method in methods():
    resolve(method, {{}})
for preset in presets:
    resolve("fed_avg", {{"config": preset}})
print("all", len({modules!r}))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True,
                          text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert f"all {len(modules)}" in done.stdout
