"""What the README shows works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedrun import cli, flags
from tests.support.runs import ROOT, Run, fresh_python

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_method_of_your_own(tmp_path: Path, run: Run) -> None:
    """Saved and run as the README has it, by one process and by three."""
    source = re.search(r"```python\n(.*?class FedSign.*?)```", README, re.DOTALL)
    assert source
    plugin = tmp_path / "fed_sign.py"
    plugin.write_text(source[1], encoding="utf-8")
    flags = ("--plugin", plugin, "--server_lr", "2e-3", "--rounds", 2, "--num_clients", 2)
    one, three = (run("fed_sign", *flags, processes=n, name=str(n)) for n in (1, 3))
    assert one.code == three.code == 0, one.output + three.output
    assert one.bits == three.bits
    help_text = fresh_python("import sys; from fedrun import cli; cli.main(sys.argv[1:])",
                             "fed_sign", "--plugin", str(plugin), "--help")
    assert "How far every parameter moves in a round." in " ".join(help_text.split())


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
        if words[0] in flags.methods() and "--plugin" not in words:
            assert cli.parse(words) is not None
    methods = [*flags.methods()]
    known = {f"--{name}" for m in methods for name in flags.method_flags(m)}
    known |= {"--plugin", "--print_config", "--help", "--nproc-per-node", "--node-rank",
              "--extra-index-url", "--no-build-isolation", "--no-deps", "--standalone",
              "--axes", "--scale", "--dry_run", "--from", "--y_max", "--where"}
    named = set(re.findall(r"`(--[a-z0-9_-]+)", README))
    assert named
    assert named - known == set()
