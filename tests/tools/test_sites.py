"""`fedrun sites`: keys and the file of the sites, from the command line."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from fedrun import cli
from fedrun.data.public_keys import fingerprint
from fedrun.data.sites import IDENTITY, read_sites
from fedrun.secure.identity import Identity, public_text, verify
from tests.support.runs import fresh_python
from tests.support.site_files import public


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sites(*argv: str) -> int:
    return cli.main(["sites", *argv])


def test_three_operators_make_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert sites("init", "--site_dir", "server", "--run_name", "trial") == 0
    keys = {}
    for name in ("north", "south", "east"):
        capsys.readouterr()
        assert sites("key", "--site-dir", f"at/{name}") == 0
        printed = capsys.readouterr().out
        (keys[name],) = re.findall("^ed25519:.*$", printed, re.MULTILINE)
        assert fingerprint(keys[name]) in printed
    assert sites("add", "north", keys["north"], "--clients", "2", "--partition=documents",
                 "--size-skew", "0.5", "--rounded_to", "64", "--row_separator", "none") == 0
    for name in ("south", "east"):
        assert sites("add", name, keys[name]) == 0
    capsys.readouterr()
    assert sites("show") == 0
    shown = capsys.readouterr().out
    made = read_sites(Path("sites.yaml"))
    assert made.run_name == "trial"
    assert made.names == ["north", "south", "east"]
    north = made["north"]
    assert (north.clients, north.partition, north.size_skew, north.rounded_to, north.row_separator
            ) == (2, "documents", 0.5, 64, "none")
    for name, folder, key in (("the server", "server", made.server),
                              *((site.name, f"at/{site.name}", site.key) for site in made.sites)):
        private = Path(folder) / IDENTITY
        assert private.stat().st_mode & 0o777 == 0o600
        assert private.parent.stat().st_mode & 0o777 == 0o700
        identity = Identity.load(private)
        assert public_text(identity.public) == key
        verify(name, identity.public, identity.sign("a test", b"x"), "a test", b"x")
        assert f"{fingerprint(key)}  {name}" in shown


def test_a_key_is_never_overwritten(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert sites("key", "--site_dir", "north") == 0
    key, first = Path("north") / IDENTITY, capsys.readouterr().out
    before = key.read_bytes()
    assert sites("key", "--site_dir", "north") == 0
    second = capsys.readouterr().out
    assert "is there already, and is kept" in second
    assert first.splitlines()[1:] == second.splitlines()[1:]
    assert sites("init", "--site_dir", "north") == 0
    assert key.read_bytes() == before
    for spoil in ("mode", "content", "dangling"):
        if spoil == "mode":
            key.chmod(0o640)
        elif spoil == "content":
            key.chmod(0o600)
            key.write_bytes(b"not a key")
        else:
            key.unlink()
            key.symlink_to(tmp_path / "nowhere")
        capsys.readouterr()
        assert sites("key", "--site_dir", "north") == 2
        error = capsys.readouterr().err
        assert error.startswith("fedrun: error: ")
        assert str(key) in error or "north" in error
        assert not (tmp_path / "nowhere").exists()


def test_the_file_is_not_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    Path("sites.yaml").write_text("mine")
    assert sites("init", "--site_dir", "server") == 2
    assert "--sites sites.yaml: is there already" in capsys.readouterr().err
    assert Path("sites.yaml").read_text() == "mine"
    assert not Path("server").exists()
    assert sites("init", "--site_dir", "server", "--sites", "other.yaml") == 0


@pytest.mark.parametrize(("argv", "message"), [
    ((), "the following arguments are required: COMMAND"),
    (("ad",), "invalid choice: 'ad'"),
    (("key",), "the following arguments are required: --site_dir"),
    (("add", "west"), "the following arguments are required: KEY"),
    (("add", "north", public("x")), "fedrun sites add north: the name north: must be its own"),
    (("add", "west", public("north")), "it is the key of north too"),
    (("add", "west", "ed25519:x"), "fedrun sites add west: key 'ed25519:x': must be a public key"),
    (("add", "west", "ed25519:AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="),
     "under this one anybody could sign"),
    (("add", "West", public("west")), "the name 'West': must be 1 to 32 of"),
    (("add", "west", public("west"), "--clients", "0"), "clients 0: must be an integer from 1"),
    (("add", "west", public("west"), "--clients", "x"), "--clients x: must be an integer"),
    (("add", "west", public("west"), "--size_skew", "nan"), "size_skew nan: must be a number"),
    (("add", "west", public("west"), "--partition", "dirichlet"), "--partition dirichlet: must be"),
    (("add", "west", public("west"), "--sites", "no.yaml"), "--sites no.yaml: No such file"),
    (("add", "west", public("west"), "--clents", "2"), "unknown flag --clents"),
    (("init", "--site_dir", "s", "--sites", "n.yaml", "--run_name", "\n"), "run_name"),
    (("show", "--sites", "no.yaml"), "--sites no.yaml: No such file"),
])
def test_what_is_refused_leaves_the_file_as_it_is(
        argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sites("init", "--site_dir", "server") == sites("add", "north", public("north")) == 0
    before = Path("sites.yaml").read_bytes()
    capsys.readouterr()
    assert sites(*argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert Path("sites.yaml").read_bytes() == before
    assert not Path("n.yaml").exists()


def test_help_tells_the_whole_way_and_the_overview_names_the_command(
        capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(r"^  sites +make the file", cli.overview(), re.MULTILINE)
    with pytest.raises(SystemExit):
        sites("--help")
    text = capsys.readouterr().out
    for command in ("init", "key", "add", "show"):
        assert f"fedrun sites {command}" in text


def test_it_needs_no_torch_and_without_cryptography_says_what_to_install() -> None:
    printed = fresh_python(
        "import sys\nfrom fedrun import cli\n"
        "sys.modules['cryptography'] = None\n"
        "code = cli.main(['sites', 'key', '--site_dir', 'north'])\n"
        "assert 'torch' not in sys.modules\nprint(code)", env={"PYTHONPATH": ":".join(sys.path)})
    assert printed == "2\n"
