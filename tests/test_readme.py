"""What the README shows works as it stands there."""

from __future__ import annotations

import inspect
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedrun import cli, config, flags, strategies
from fedrun.strategies.base import ServerRound
from tests.support.runs import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_method_of_your_own(monkeypatch: pytest.MonkeyPatch,
                              capsys: pytest.CaptureFixture[str]) -> None:
    source = re.search(r"```python\n(.*?class FedSign.*?)```", README, re.DOTALL)
    assert source
    module = types.ModuleType("fed_sign")
    monkeypatch.setitem(sys.modules, "fed_sign", module)
    exec(compile(source[1], "fed_sign.py", "exec"), module.__dict__)
    monkeypatch.setitem(strategies.STRATEGIES, "fed_sign", module.FedSign)
    monkeypatch.setitem(flags.METHODS, "fed_sign", module.FedSign.__doc__)
    # inspect.getsource needs a file for the docstrings under the fields; give it the README's text.
    monkeypatch.setattr(inspect, "getsource", _source_of(source[1]))
    chosen = cli.parse(["fed_sign", "--server_lr", "2e-3"])
    assert isinstance(chosen, config.FederatedConfig)
    model, delta = torch.zeros(3), torch.tensor([0.5, -0.1, 0.0])
    chosen.strategy.server_update(model, {}, {"delta": delta}, ServerRound(1))
    assert torch.equal(model, torch.tensor([2e-3, -2e-3, 0.0]))
    assert "How far every parameter moves in a round." in " ".join(
        cli.method_parser("fed_sign").format_help().split())


def _source_of(text: str) -> Callable[[type], str]:
    real = inspect.getsource

    def getsource(cls: type) -> str:
        if cls.__name__ != "FedSign":
            return real(cls)
        return text[text.index("@dataclass"):]
    return getsource


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "results" / "gallery" / "README.md"],
                         ids=["README", "gallery"])
def test_pictures_exist(page: Path) -> None:
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    assert pictures
    assert [name for name in pictures if not (page.parent / name).is_file()] == []


def test_commands_and_flags_in_the_readme_exist() -> None:
    launch = r"^(?:python -m fedrun|.*torchrun .*-m fedrun|fedrun) (.*)$"
    for line in re.findall(launch, README, re.M):
        words = line.split("#")[0].split()
        if words[0] in flags.METHODS:
            assert cli.parse(words) is not None
    methods = [*flags.METHODS]
    known = {f"--{name}" for m in methods for name in flags.method_flags(m)}
    known |= {"--print_config", "--help", "--nproc-per-node", "--node-rank", "--extra-index-url",
              "--no-build-isolation", "--no-deps", "--standalone", "--axes", "--scale", "--dry_run",
              "--from", "--y_max", "--where"}
    named = set(re.findall(r"`(--[a-z0-9_-]+)", README))
    assert named
    assert named - known == set()
