"""Limits of commands that tests start against the limit of the test itself, which would end it
without the command's output."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

from tests.support.runs import ROOT

PREFIX = "pytest.mark.timeout("


def test_a_command_has_less_time_than_the_test_that_starts_it() -> None:
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    usual = settings.getint("tool:pytest", "timeout")
    found = [case for file in sorted((ROOT / "tests").rglob("test_*.py"))
             for case in limits(file, usual)]
    assert len(found) > 10
    assert not [case for case in found if not case[1] < case[2]]


def limits(file: Path, usual: int) -> Iterator[tuple[str, float, float]]:
    """Each literal limit in a test: where, the limit, and the test's own, all in seconds."""
    tree = ast.parse(file.read_text())
    marks = [node.value for node in tree.body if isinstance(node, ast.Assign)
             and ast.unparse(node.targets[0]) == "pytestmark"]
    of_file = own_limit(marks, usual)
    for test in (node for node in tree.body if isinstance(node, ast.FunctionDef)
                 and node.name.startswith("test_")):
        own = own_limit(test.decorator_list, of_file)
        for node in ast.walk(test):
            if isinstance(node, ast.keyword) and node.arg == "limit" \
                    and isinstance(node.value, ast.Constant):
                yield (f"{file.relative_to(ROOT)}: {test.name}", ast.literal_eval(node.value), own)


def own_limit(marks: list[ast.expr], usual: float) -> float:
    """Without a bound where it is computed."""
    for mark in (node for expression in marks for node in ast.walk(expression)
                 if isinstance(node, ast.Call)):
        if ast.unparse(mark).startswith(PREFIX):
            literal = isinstance(mark.args[0], ast.Constant)
            return float(ast.literal_eval(mark.args[0])) if literal else math.inf
    return usual
