"""Methods that are not in this package: defined in a script or a notebook, loaded by `--plugin`, or
installed.

    @fedrun.strategy("fed_sign")
    @dataclass(frozen=True)
    class FedSign(FedAvg):
        ...

A plugin is code that runs with the user's rights. So it is taken from the command line, from Python
or from an installed package, and never because a run's folder, a checkpoint or a study's file names
it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import re
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import TypeVar

from fedrun.common.errors import InputError, one_line, require
from fedrun.common.log import WARNING, log
from fedrun.strategies import STRATEGIES, Strategy

ENTRY_POINTS = "fedrun.strategies"  # the group in which installed packages list their methods
_BUILT_IN = frozenset(STRATEGIES) | {"central"}
LOADED: list[str] = []
"""What this process has loaded by --plugin; processes that it starts need the same."""

Method = TypeVar("Method", bound=type[Strategy])


def strategy(name: str) -> Callable[[Method], Method]:
    """A class decorator that makes a method a command: `@fedrun.strategy("fed_sign")`, above
    `@dataclass(frozen=True)`.

    A field's help text is its metadata's `help`, or the docstring under it. Defining the class
    again, as a notebook does, replaces it.

    Raises:
        InputError: the name is taken or not lower case with underscores, or the class is not a
            dataclass derived from Strategy whose fields all have defaults.
    """
    def register(cls: Method) -> Method:
        where = f"strategy({name!r})"
        require(re.fullmatch("[a-z][a-z0-9_]*", name) is not None and name not in _BUILT_IN,
                where, "the name", "lower case with underscores, and no method's of fedrun")
        known = STRATEGIES.get(name)
        require(known is None or known.__module__ == cls.__module__, where, "the name",
                f"another than {known and known.__module__}'s")
        require(isinstance(cls, type) and issubclass(cls, Strategy), where, cls,
                "a class derived from fedrun.Strategy")
        own = set(vars(cls).get("__annotations__", {}))
        require(is_dataclass(cls) and own <= {*cls.__dataclass_fields__}, where, cls.__name__,
                "a dataclass: put @dataclass(frozen=True) below the line with @fedrun.strategy")
        STRATEGIES[name] = cls
        return cls
    return register


def load_plugin(plugin: str) -> None:
    """Import what --plugin names: the path of a Python file, or a module.

    Raises:
        InputError: there is no such file or module, it raises an error, or it registers no method.
    """
    accepted = "an existing .py file, or a module that can be imported"
    try:
        if plugin.endswith(".py"):
            path = Path(plugin).expanduser()
            require(path.is_file(), "--plugin", plugin, accepted)
            module = _run_file(path)
        else:
            module = importlib.import_module(plugin)
    except InputError:
        raise
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and plugin.startswith(error.name or " "):
            raise InputError(f"--plugin {plugin}: must be {accepted}") from None
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(f"--plugin {plugin}: {type(error).__name__} at {at.filename}:{at.lineno}: "
                         f"{one_line(error)}") from error
    package = module.__name__.partition(".")[0]
    if not any(cls.__module__.partition(".")[0] == package
               for name, cls in STRATEGIES.items() if name not in _BUILT_IN):
        raise InputError(f"--plugin {plugin}: registers no method; put @fedrun.strategy(\"NAME\") "
                         "above its class")
    if plugin not in LOADED:
        LOADED.append(plugin)


def _run_file(path: Path) -> ModuleType:
    name = f"fedrun_plugin_{zlib.crc32(str(path.resolve()).encode())}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@functools.cache
def load_installed() -> None:
    """Import the methods of installed packages, once. One that fails is left out, with a
    warning: it must not keep other methods from running."""
    for point in entry_points(group=ENTRY_POINTS):
        try:
            if not (isinstance(loaded := point.load(), type) and loaded in STRATEGIES.values()):
                strategy(point.name)(loaded)
        except Exception as error:
            log(f"the method {point.name} of an installed package cannot be used: "
                f"{one_line(error)}", WARNING)


def method_digest(method: str) -> str:
    """A digest of the code of a method that is not in this package, 16 hexadecimal digits; empty
    for others. What the method's own files import from elsewhere is not part of it."""
    if method in _BUILT_IN:
        return ""
    content = hashlib.sha256()
    for cls in STRATEGIES[method].__mro__:
        if cls.__module__.partition(".")[0] not in ("fedrun", "builtins"):
            file = getattr(sys.modules.get(cls.__module__), "__file__", None)
            content.update(Path(file).read_bytes() if file else repr([*_code(cls)]).encode())
    return content.hexdigest()[:16]


def _code(cls: type) -> Iterator[object]:
    """What a class of a notebook's cell consists of, in the same words for the same source."""
    if is_dataclass(cls):
        yield from ((f.name, str(f.type), repr(f.default)) for f in fields(cls))
    for name, value in sorted(vars(cls).items()):
        function = getattr(value, "fget", None) or getattr(value, "__func__", value)
        if isinstance(function, FunctionType):
            yield name, _instructions(function.__code__)
        elif isinstance(value, str | int | float | tuple) and not name.startswith("__"):
            yield name, value


def _instructions(code: CodeType) -> tuple[object, ...]:
    constants = [_instructions(c) if isinstance(c, CodeType) else c for c in code.co_consts]
    return code.co_code, code.co_names, constants
