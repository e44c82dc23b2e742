"""No assert has an effect: under `python -O`, which drops them, a run has the same bits."""

from __future__ import annotations

import ast
import sys

import pytest

from tests.support.runs import ROOT, Run, execute

FILES = sorted((ROOT / "fedrun").rglob("*.py"))
PURE = {"all", "any", "is_dataclass", "isinstance", "issubclass", "len", "list", "max", "min",
        "range", "set", "sorted", "sum", "tuple"}
PURE_METHODS = {"endswith", "get", "items", "keys", "numel", "startswith", "stride", "values"}


def called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else ast.unparse(call.func)


def impure(node: ast.AST, properties: set[str]) -> str:
    """What an expression does besides being looked at; empty for nothing."""
    for part in ast.walk(node):
        if isinstance(part, ast.NamedExpr | ast.Await | ast.Yield | ast.YieldFrom):
            return ast.unparse(part)
        if isinstance(part, ast.Call):
            method = part.func.attr if isinstance(part.func, ast.Attribute) else ""
            if called(part) not in PURE and method not in PURE_METHODS:
                return ast.unparse(part)
        if isinstance(part, ast.Attribute) and part.attr in properties:
            return f"the property {ast.unparse(part)}"
    return ""


def acting_properties(tree: ast.Module) -> set[str]:
    """Names of properties that change something: attribute access is no harmless look there."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and any(
                ast.unparse(d).endswith("property") for d in node.decorator_list):
            for part in ast.walk(node):
                acts = (isinstance(part, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Delete)
                        and any(isinstance(t, ast.Attribute | ast.Subscript)
                                for t in getattr(part, "targets", [getattr(part, "target", None)])))
                asks = isinstance(part, ast.Expr) and isinstance(part.value, ast.Call)
                if acts or asks:
                    found.add(node.name)
    return found


def with_effect(sources: dict[str, str]) -> list[str]:
    trees = {name: ast.parse(source) for name, source in sources.items()}
    properties = set().union(*map(acting_properties, trees.values()))
    return [f"{name}:{node.lineno}: {effect}" for name, tree in trees.items()
            for node in ast.walk(tree) if isinstance(node, ast.Assert)
            if (effect := impure(node, properties))]


def test_no_assert_has_an_effect() -> None:
    assert with_effect({str(path): path.read_text(encoding="utf-8") for path in FILES}) == []


@pytest.mark.parametrize("statement", [
    "assert self.buffer is self._buffer", "assert work.pop()", "assert (x := 1)",
    "assert ready, write(path)"])
def test_an_effect_is_seen(statement: str) -> None:
    source = ("class Sum:\n    @property\n    def buffer(self):\n        self._buffer.zero_()\n"
              f"        return self._buffer\n    def reduce(self):\n        {statement}\n")
    found, = with_effect({"a.py": source})
    assert found.startswith("a.py:7: ")


@pytest.mark.slow
def test_a_cohort_below_the_number_of_workers_without_asserts(
        run_here: Run, run: Run, little_text: tuple[str, ...]) -> None:
    """Workers without a client in a round hold the sum of an earlier one, and add zeros."""
    code, reported = execute([sys.executable, "-c", "import sys; print(sys.flags.optimize)"],
                         env={"PYTHONOPTIMIZE": "1"})
    assert (code, reported) == (0, "1\n")
    flags = (*little_text, "--num_clients", 3, "--cohort", 1, "--rounds", 4)
    alone = run_here("fed_avg", *flags, name="alone")
    optimized = run("fed_avg", *flags, processes=4, launcher=True, env={"PYTHONOPTIMIZE": "1"})
    assert alone.code == optimized.code == 0, alone.output + optimized.output
    assert optimized.bits == alone.bits
