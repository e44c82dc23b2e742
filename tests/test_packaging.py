"""What has to be installed: setup.cfg for pip, environment.yml for conda."""

from __future__ import annotations

import configparser

import pytest
import yaml
from packaging.requirements import Requirement

from tests.support.runs import ROOT

CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}


@pytest.fixture
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def requirements(lines: list[str]) -> dict[str, str]:
    """Name -> versions."""
    return {one.name: str(one.specifier) for one in map(Requirement, lines)}


def test_conda_and_pip_ask_for_the_same(setup: configparser.ConfigParser) -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["name"] == setup["metadata"]["name"]
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": ["--editable ."]}
    asked = requirements(setup["options"]["install_requires"].split())
    asked = {CONDA_NAMES.get(name, name): versions for name, versions in asked.items()}
    assert requirements(conda) == asked | {
        "python": setup["options"]["python_requires"], "pip": ""}
    assert asked["pytorch"] == "<2.14,>=2.9"


def test_the_kernels_for_gpus_have_a_deterministic_mode(setup: configparser.ConfigParser) -> None:
    """Older ones ignore --deterministic, which is refused with them."""
    assert requirements(setup["options.extras_require"]["cuda"].split()) == {
        "mamba-ssm": ">=2.3.0", "causal-conv1d": ">=1.6.0"}
