"""The file of the sites: what is read, what is refused by name, and what is private beside it."""

from __future__ import annotations

import base64
import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from fedrun.common.errors import InputError
from fedrun.data.public_keys import fingerprint
from fedrun.data.sites import (
    LARGEST_FILE,
    MOST_SITES,
    Dealing,
    Site,
    SiteEntry,
    Sites,
    read_sites,
    take_private,
    write_sites,
)
from tests.support.site_files import THREE, public, sites_of

P = 2**255 - 19
D = -121665 * pow(121666, -1, P) % P
HEAD = f"run_name: trial\nserver: {public('server')}\nsites:\n"
NORTH = f"  north: {{key: {public('north')}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sites.yaml"


def refused(path: Path, content: str | bytes) -> str:
    """What is said of a file, in one line that begins with its name."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError) as raised:
        read_sites(path)
    start, message = f"--sites {path}: ", str(raised.value)
    assert message.startswith(start)
    assert "\n" not in message
    assert len(message) < len(start) + 400
    return message.removeprefix(start)


def test_what_is_written_is_read_back(path: Path) -> None:
    every = sites_of(THREE | {"no": {}, "12": {}, "null": {}, "a_b-c": {
        "clients": 7, "partition": "by_source", "size_skew": 1e-3, "rounded_to": 64,
        "text_column": "title, body", "encoding": "latin-1", "row_separator": "none"}})
    write_sites(path, every)
    assert read_sites(path) == every
    assert read_sites(path).digest() == every.digest()
    # A field that is left out has its default.
    assert "rounded_to: 1\n" not in path.read_text()


def test_only_what_is_said_counts_and_the_order_of_sites(path: Path) -> None:
    north, south = (f"  {name}: {{key: {public(name)}, clients: 2, size_skew: 1}}\n"
                    for name in ("north", "south"))
    path.write_text(HEAD + north + south)
    first = read_sites(path)
    path.write_text(f"# a comment\nsites:\n  north:\n    partition: contiguous\n    clients: 2\n"
                    f"    size_skew: 1.0\n    'key': \"{public('north')}\"\n{south}"
                    f"server: {public('server')}\nrun_name: trial\n", encoding="utf-8-sig")
    assert read_sites(path) == first
    assert read_sites(path).digest() == first.digest()
    path.write_text(HEAD + south + north)
    assert read_sites(path).digest() != first.digest()


def test_every_field_is_in_the_digest() -> None:
    sites = sites_of(THREE)
    others: dict[str, Any] = {
        "name": "west", "key": public("west"), "clients": 9, "partition": "by_source",
        "size_skew": 2.0, "rounded_to": 128, "text_column": "x", "encoding": "ascii",
        "row_separator": "none"}
    assert others.keys() == {f.name for f in dataclasses.fields(SiteEntry)}
    changed = [dataclasses.replace(sites, sites=(
        dataclasses.replace(sites.sites[0], **{name: value}), *sites.sites[1:]))
        for name, value in others.items()]
    changed += [dataclasses.replace(sites, run_name="other"),
                dataclasses.replace(sites, server=public("other"))]
    assert len({sites.digest(), *(one.digest() for one in changed)}) == 1 + len(changed)


def test_clients_are_numbered_in_the_order_of_the_sites() -> None:
    sites = sites_of(THREE)
    assert sites.num_clients == 5
    assert [sites.clients_of(name) for name in sites.names] == [
        range(2), range(2, 3), range(3, 5)]
    assert [sites.site_of(client) for client in range(5)] == [
        "north", "north", "south", "east", "east"]


@pytest.mark.parametrize(("content", "message"), [
    ("", "is empty"),
    ("# nothing\n", "is empty"),
    ("[]", "line 1: the file must be a mapping with run_name, server, sites"),
    ("trial", "line 1: the file must be a mapping"),
    ("a: 1\n---\nb: 2", "cannot be read as YAML: expected a single document"),
    ("run_name: [", "cannot be read as YAML"),
    (b"run_name: \xff", "cannot be read as YAML: 'utf-8' codec"),
    (b"run_name: \0", "cannot be read as YAML"),
    ("[" * 5000, "cannot be read as YAML: maximum recursion depth exceeded"),
    ("{a: " * 5000, "cannot be read as YAML: maximum recursion depth exceeded"),
    ("!!python/object/apply:os.getcwd []", "line 1: the file must be a mapping"),
    ("run_name: &a x\nserver: *a\nsites: {}", "line 2: must be without aliases"),
    ("a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]", "line 2: must be without aliases"),
    ("<<: {run_name: x}", "line 1: unknown field '<<' of the file"),
    ("run_name: x\nrun_name: y", "line 2: 'run_name' is there twice"),
    ("runname: x", "line 1: unknown field 'runname' of the file; must be one of run_name, server"),
    ("? [1, 2]\n: 3", "line 1: unknown field '?'"),
    (f"run_name: x\nserver: {public('a')}", "line 1: the file has no field sites"),
    (HEAD, "line 3: sites must be a mapping of names"),
    (HEAD + "  - north", "line 4: sites must be a mapping of names"),
    (HEAD.replace("sites:", "sites: {}"), "has no site; `fedrun sites add` adds one"),
    (HEAD.replace("trial", "[]") + NORTH + "}", "run_name must be a text"),
    (HEAD.replace("trial", "none") + NORTH + "}", "run_name '': must be 1 to 100 printable"),
    (HEAD.replace("trial", "x" * 101) + NORTH + "}", "run_name 'xxx"),
    (HEAD.replace("trial", '"a\\tb"') + NORTH + "}", "run_name 'a\\tb': must be 1 to 100"),
    (HEAD.replace(public("server"), "none") + NORTH + "}", "server '': must be a public key"),
    (HEAD + "  north: x", "line 4: north must be a mapping of names"),
    (HEAD + "  north: {}", "line 4: north: key none: must be there"),
    (HEAD + "  north: {key: none}", "line 4: north: key None: must be a public key"),
    (HEAD + "  north: {key: {a: b}}", "line 4: north: key must be a text"),
    (HEAD + NORTH + ", sizes: 3}", "line 4: north: unknown field 'sizes'; must be one of key"),
    (HEAD + NORTH + ", clients: 0}", "line 4: north: clients 0: must be an integer from 1 to"),
    (HEAD + NORTH + ", clients: 1000001}", "line 4: north: clients 1000001: must be"),
    (HEAD + NORTH + f", clients: {'9' * 9000}}}", "line 4: north: clients 9999999999"),
    (HEAD + NORTH + ", clients: 1.0}", "line 4: north: clients 1.0: must be an integer"),
    (HEAD + NORTH + ", clients: true}", "line 4: north: clients true: must be an integer"),
    (HEAD + NORTH + ", clients: '2'}", "line 4: north: clients 2: must be an integer"),
    (HEAD + NORTH + ", clients: 0x10}", "line 4: north: clients 0x10: must be an integer"),
    (HEAD + NORTH + ", clients: [2]}", "line 4: north: clients must be an integer"),
    (HEAD + NORTH + ", clients: 2, clients: 3}", "line 4: 'clients' is there twice"),
    (HEAD + NORTH + ", rounded_to: -1}", "line 4: north: rounded_to -1: must be an integer"),
    (HEAD + NORTH + ", size_skew: .nan}", "line 4: north: size_skew .nan: must be a number"),
    (HEAD + NORTH + ", size_skew: .inf}", "line 4: north: size_skew .inf: must be a number"),
    (HEAD + NORTH + ", size_skew: 1e999}", "line 4: north: size_skew inf: must be a number >= 0"),
    (HEAD + NORTH + ", size_skew: -1}", "line 4: north: size_skew -1: must be a number"),
    (HEAD + NORTH + ", partition: dirichlet}", "line 4: north: partition dirichlet: must be conti"),
    (HEAD + NORTH + ", encoding: klingon}", "line 4: north: encoding klingon: must be an encoding"),
    (HEAD + NORTH + ", text_column: ','}", "line 4: north: text_column ,: must be a column's name"),
    (HEAD + NORTH + ", row_separator: tab}", "line 4: north: row_separator tab: must be newline"),
    (HEAD + NORTH.replace("north", "North", 1) + "}", "line 4: 'North': the name 'North': must be"),
    (HEAD + NORTH.replace("north", "'a b'", 1) + "}", "the name 'a b': must be"),
    (HEAD + NORTH.replace("north", "..", 1) + "}", "the name '..': must be"),
    (HEAD + NORTH.replace("north", "-n", 1) + "}", "the name '-n': must be"),
    (HEAD + NORTH.replace("north", "n" * 33, 1) + "}", "must be 1 to 32 of"),
    (HEAD + NORTH.replace("north", '"no\\nrth"', 1) + "}", "must be 1 to 32 of"),
    (HEAD + NORTH + "}\n" + NORTH + "}", "line 5: 'north' is there twice"),
    (HEAD + NORTH + "}\n" + NORTH.replace("north", "south", 1) + "}",
     f"south: key {public('north')}: must be its own; it is the key of north too"),
    (HEAD + f"  north: {{key: {public('server')}}}", "it is the key of the server too"),
    ("x" * (LARGEST_FILE + 1), f"must be at most {LARGEST_FILE}"),
])
def test_a_wrong_file_is_refused_by_name(path: Path, content: str | bytes, message: str) -> None:
    assert message in refused(path, content)


def test_too_many_sites_and_clients(path: Path) -> None:
    most: dict[str, dict[str, Any]] = {f"s{n}": {} for n in range(MOST_SITES)}
    write_sites(path, sites_of(most))
    assert len(read_sites(path).sites) == MOST_SITES
    more = path.read_text() + f"  one-more: {{key: {public('one-more')}}}\n"
    assert "sites (256 of them): must be at most 255" in refused(path, more)
    with pytest.raises(InputError, match="clients 1200000: must be at most 1000000 of all sites"):
        sites_of({"a": {"clients": 600_000}, "b": {"clients": 600_000}})
    with pytest.raises(InputError, match="the name a: must be its own"):
        Sites("x", public("x"), (SiteEntry("a", public("a")), SiteEntry("a", public("b"))))


def test_what_is_no_file(path: Path, tmp_path: Path) -> None:
    for no_file, why in ((path, "No such file"), (tmp_path, "is not a regular file"),
                         (tmp_path / "pipe", "is not a regular file")):
        if no_file.name == "pipe":
            os.mkfifo(no_file)
        with pytest.raises(InputError, match=f"--sites {no_file}: .*{why}"):
            read_sites(no_file)


# ---- keys ----------------------------------------------------------------------------------------

def add(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    """The sum of two points of Ed25519, by the formula of RFC 8032, section 5.1.4, in fractions."""
    (x, y), (u, v) = one, other
    both = D * x * u * y * v % P
    return ((x * v + u * y) * pow(1 + both, -1, P) % P, (y * v + x * u) * pow(1 - both, -1, P) % P)


def eighth_of_a_turn() -> tuple[int, int]:
    """A point of order 8: x² = -1 / (1 + √(1 + d)) on this curve's points with y² = -x²."""
    for y in range(2, 40):  # any point times the order of the base point has order 1, 2, 4 or 8
        square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
        x = pow(square, (P + 3) // 8, P)
        if x * x % P != square:
            x = x * pow(2, (P - 1) // 4, P) % P
        if x * x % P != square:
            continue
        point, power, order = (0, 1), (x, y), 2**252 + 27742317777372353535851937790883648493
        while order:
            if order & 1:
                point = add(point, power)
            power, order = add(power, power), order >> 1
        if add(add(point, point), add(point, point)) != (0, 1):
            return point
    raise AssertionError("found none")


def test_keys_under_which_anybody_could_sign_are_refused() -> None:
    """The eight points of small order, made here by adding one up, in all their encodings, and
    encodings that are not the one of their point."""
    point, turn, small = (0, 1), eighth_of_a_turn(), list[int]()
    for _ in range(8):
        small.append(point[1] | (point[0] & 1) << 255)
        point = add(point, turn)
    assert point == (0, 1)
    assert len(set(small)) == 8
    for number in [*small, *(n ^ 1 << 255 for n in small), *range(P, 2**255), 2**256 - 1]:
        text = f"ed25519:{base64.b64encode(number.to_bytes(32, 'little')).decode()}"
        with pytest.raises(InputError, match=r"key ed25519:.*: must be a key that `fedrun sites"):
            SiteEntry("north", text)


@pytest.mark.parametrize("text", [
    "", "ed25519:", public("a").removeprefix("ed25519:"), public("a")[:-1], public("a") + "=",
    public("a") + " ", public("a").upper(), public("a").replace("=", "A"), "x25519" + public("a"),
    "ed25519:" + public("a"), "ed25519:" + "\N{LATIN SMALL LETTER E WITH ACUTE}" * 44,
    public("a")[:-2] + chr(ord(public("a")[-2]) + 1) + "="])
def test_other_texts_are_no_keys(text: str) -> None:
    """The last one is a key in other bits than its own encoding has."""
    with pytest.raises(InputError, match=r"key .*: must be a public key, ed25519: and 44 char"):
        SiteEntry("north", text)


def test_fingerprints_are_what_other_tools_compute() -> None:
    # printf '\2...' (32 times) | sha256sum
    key = f"ed25519:{base64.b64encode(bytes([2]) * 32).decode()}"
    assert fingerprint(key) == "7587 7bb4 1d39 3b5f"


# ---- what is private -----------------------------------------------------------------------------

@pytest.mark.parametrize(("argv", "env", "site", "rest"), [
    (["fed_avg", "--sites", "x", "--lr", "1"], {}, None, ["fed_avg", "--sites", "x", "--lr", "1"]),
    (["fed_avg", "--site_data", "t/{site}", "--lr", "1"], {}, Site("", "t/{site}", None),
     ["fed_avg", "--lr", "1"]),
    (["fed_avg", "--site-data=t/{site}"], {}, Site("", "t/{site}", None), ["fed_avg"]),
    (["fed_avg"], {"FEDRUN_SITE_DATA": "t/{site}"}, Site("", "t/{site}", None), ["fed_avg"]),
    (["--site", "north", "--site_dir", "d", "--site_data", "t"], {}, Site("north", "t", Path("d")),
     []),
    (["--site_data", "u"], {"FEDRUN_SITE": "north", "FEDRUN_SITE_DIR": "d",
                            "FEDRUN_SITE_DATA": "t"}, Site("north", "u", Path("d")), []),
    ([], {"FEDRUN_SITE_DIR": "d"}, Site("", "", Path("d")), [])])
def test_private_settings_are_taken_off_the_command_line(
        argv: list[str], env: dict[str, str], site: Site | None, rest: list[str]) -> None:
    assert take_private(argv, env) == (site, rest)


@pytest.mark.parametrize(("argv", "message"), [
    (["--site_data"], "--site-data: expected one argument"),
    (["--site_data", ""], "--site_data '': must be left out, or not empty"),
    (["--site", "north", "--site_data", "t"], "--site north: must be given with --site_dir"),
    (["--site", "north", "--site_dir", "d"], "--site north: must be given with --site_data"),
    (["--site_dir", "d", "--site_data", "t"], "--site_data of one site: must be given with --site"),
])
def test_private_settings_that_do_not_go_together(argv: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        take_private(argv, {})


def test_what_is_private_is_not_shown() -> None:
    assert "secret" not in repr(Site("north", "secret/*.txt", Path("secret")))


def test_every_setting_of_a_site_has_a_help_text() -> None:
    from fedrun.flags import flags_of
    assert all(flag.help for flag in flags_of(Dealing).values())
