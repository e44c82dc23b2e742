"""What the READMEs show works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedrun import cli, flags
from tests.support.runs import ROOT, Run, fresh_python

PAGES = {str(path.parent.relative_to(ROOT)): path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", *ROOT.glob("*/README.md"), *ROOT.glob("*/*/README.md"))
         if not path.parent.name.startswith(".")}
OTHERS = {"--plugin", "--print_config", "--help", "--nproc-per-node", "--node-rank",
          "--extra-index-url", "--no-build-isolation", "--no-deps", "--standalone", "--axes",
          "--scale", "--name", "--dry_run", "--site", "--site_data", "--site_dir",
          "--from", "--y_max", "--where", "--against", "--settings", "--recorded", "--so_far",
          "--processes", "--device_memory", "--device_rates"}
"""Flags that no method has."""


@pytest.mark.slow
def test_a_method_of_your_own(tmp_path: Path, run: Run) -> None:
    """Saved and run as the page has it, by one process and by three."""
    source = re.search(r"```python\n(.*?class FedSign.*?)```", PAGES["fedrun/strategies"],
                       re.DOTALL)
    assert source
    plugin = tmp_path / "fed_sign.py"
    plugin.write_text(source[1], encoding="utf-8")
    given = ("--plugin", plugin, "--server_lr", "2e-3", "--rounds", 2, "--num_clients", 2)
    one, three = (run("fed_sign", *given, processes=n, name=str(n), launcher=True)
                  for n in (1, 3))
    assert one.code == three.code == 0, one.output + three.output
    assert one.bits == three.bits
    help_text = fresh_python("import sys; from fedrun import cli; cli.main(sys.argv[1:])",
                             "fed_sign", "--plugin", str(plugin), "--help")
    assert "How far every parameter moves in a round." in " ".join(help_text.split())


def test_the_pages_are_read() -> None:
    assert {".", "fedrun", "fedrun/strategies", "fedrun/data", "launch", "results", "configs",
            "tests", "tests/benchmarks", "results/gallery"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_flags_exist(page: str) -> None:
    launch = r"^(?:python -m fedrun|.*torchrun .*-m fedrun|fedrun) (.*)$"
    for line in re.findall(launch, PAGES[page].replace("\\\n", " "), re.M):
        words = line.split("#")[0].split()
        if words[0] in flags.methods() and "--plugin" not in words:
            assert cli.parse(words) is not None
    known = OTHERS | {f"--{name}" for m in flags.methods() for name in flags.method_flags(m)}
    named = set(re.findall(r"`(--[a-z0-9_-]+)", PAGES[page]))
    assert named - known == set()


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        file, _, heading = target.partition("#")
        if file.startswith("http"):
            continue
        path = (ROOT / page / file).resolve() if file else ROOT / page / "README.md"
        assert path.exists(), target
        if heading:
            shown = (path / "README.md" if path.is_dir() else path).read_text(encoding="utf-8")
            names = {re.sub(r"[^\w\- ]", "", line).strip().lower().replace(" ", "-")
                     for line in re.findall(r"^#+ (.*)$", shown, re.M)}
            assert heading in names, target


def test_the_first_page_works_offline() -> None:
    """Each command in `Run it` trains a run of its own, on text that needs no hub."""
    (section,) = re.findall(r"## Run it\n(.*?)\n## ", PAGES["."], re.DOTALL)
    launch = r"^(?:python -m fedrun\.torchrun \S+ \S+ -m )?fedrun (.*)$"
    lines = [line.split() for line in re.findall(launch, section.replace("\\\n", " "), re.M)]
    runs = [cli.parse(words) for words in lines if words[0] in flags.methods()]
    assert len(runs) >= 3
    assert len({run.name for run in runs if run}) == len(runs)
    for run in runs:
        assert run is not None
        assert (run.dataset, run.config, run.lr) == ("pydocs", "tiny", 4e-3)
        assert run.tokenizer.startswith("bpe:")


def test_the_first_page_is_short() -> None:
    assert PAGES["."].count("\n") <= 170
