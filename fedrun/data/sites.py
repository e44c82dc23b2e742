"""The file of the sites: who takes part, with which keys, and how each one's text becomes its
clients. It is public and the same everywhere; where a site's text lies is known to that site alone.
Needs neither torch nor cryptography.

    run_name: trial
    server: ed25519:...
    sites:                # in the order of their clients
      north: {key: ed25519:..., clients: 2, partition: documents, rounded_to: 64}
      south: {key: ed25519:..., clients: 1}
"""

from __future__ import annotations

import argparse
import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from fedrun.common.errors import InputError, naming, one_line, require
from fedrun.common.files import read_regular, write_atomic
from fedrun.data.public_keys import fingerprint, require_key
from fedrun.data.text_options import TextOptions

MOST_SITES = 255
MOST_CLIENTS = 1_000_000
LARGEST_FILE = 1 << 18  # in bytes; 255 sites with all their settings take less
PARTITIONS = ("contiguous", "shuffled", "documents", "by_source")  # what a site can do alone
SERVER = "the server"  # as it is listed beside the sites, whose names have no spaces
IDENTITY = "identity.pem"  # the private key, in the folder of a site or of the server
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")


@dataclass(frozen=True, kw_only=True)
class Dealing:
    """How a site's text becomes its clients. InputError, naming the field, for what cannot work."""

    clients: int = 1
    """Clients that the site's text is divided among: each trains a model of its own in a round."""
    partition: Literal["contiguous", "shuffled", "documents", "by_source"] = "contiguous"
    """How its text is divided: sequences in order (contiguous) or at random (shuffled), whole
    documents at random (documents), or whole sources, such as folders of files (by_source)."""
    size_skew: float = 0.0
    """How unequal its clients are: the standard deviation of the logarithm of their sizes. 0: equal
    sizes."""
    rounded_to: int = 1
    """Use of each client only a multiple of this many sequences, since everybody sees how many
    each client has. 64 says less about the text than 1, and leaves out at most 63."""
    text_column: str | None = None
    """Column that holds the text, if the files are tables. none: the column text, or the only
    column with texts."""
    encoding: str | None = None
    """Encoding of the text files, for example latin-1. none: UTF-8."""
    row_separator: Literal["newline", "none"] = "newline"
    """Whether each row that does not end with a newline gets one (newline), or is taken as it is
    (none)."""

    def __post_init__(self) -> None:
        for name, highest in (("clients", MOST_CLIENTS), ("rounded_to", 2**31)):
            value = getattr(self, name)
            require(type(value) is int and 1 <= value <= highest, name, value,
                    f"an integer from 1 to {highest}")
        require(self.partition in PARTITIONS, "partition", self.partition, " or ".join(PARTITIONS))
        require(0 <= self.size_skew < math.inf, "size_skew", self.size_skew, "a number >= 0")
        require(self.row_separator in ("newline", "none"), "row_separator", self.row_separator,
                "newline or none")
        _ = self.text_options

    @property
    def text_options(self) -> TextOptions:
        """How its text is read: all of it is trained on."""
        with _beginning("--", ""):
            return TextOptions(self.text_column, self.encoding, row_separator=self.row_separator,
                               hold_out=False)


@dataclass(frozen=True)
class SiteEntry(Dealing):
    """What everybody knows of one site."""

    name: str
    key: str
    """Its public Ed25519 key, as `secure.identity.public_text` writes it."""

    def __post_init__(self) -> None:
        require(_NAME.fullmatch(self.name) is not None, "the name", repr(self.name)[:80],
                "1 to 32 of a-z, 0-9, _ and -, the first a letter or digit")
        require_key("key", self.key)
        super().__post_init__()


@dataclass(frozen=True)
class Sites:
    """The file of the sites. InputError, naming the field, for what cannot work."""

    run_name: str
    """What everybody calls this training; for people, and part of what is signed."""
    server: str
    """The server's public key."""
    sites: tuple[SiteEntry, ...]

    def __post_init__(self) -> None:
        require(0 < len(self.run_name) <= 100 and self.run_name.isprintable(), "run_name",
                repr(self.run_name)[:120], "1 to 100 printable characters")
        require_key("server", self.server)
        require(len(self.sites) <= MOST_SITES, "sites", f"({len(self.sites)} of them)",
                f"at most {MOST_SITES}")
        owners = {self.server: SERVER}
        for number, site in enumerate(self.sites):
            require(site.name not in self.names[:number], "the name", site.name,
                    "its own; it is another site's too")
            require(site.key not in owners, f"{site.name}: key", site.key,
                    f"its own; it is the key of {owners.get(site.key)} too")
            owners[site.key] = site.name
        require(self.num_clients <= MOST_CLIENTS, "clients", self.num_clients,
                f"at most {MOST_CLIENTS} of all sites together")

    @property
    def num_clients(self) -> int:
        return sum(site.clients for site in self.sites)

    @property
    def names(self) -> list[str]:
        return [site.name for site in self.sites]

    def __getitem__(self, name: str) -> SiteEntry:
        return next(site for site in self.sites if site.name == name)

    @functools.cached_property
    def _ends(self) -> list[int]:
        """The number after that of the last client of each site."""
        return list(itertools.accumulate(site.clients for site in self.sites))

    def clients_of(self, name: str) -> range:
        """The numbers of a site's clients in the run."""
        end = self._ends[self.names.index(name)]
        return range(end - self[name].clients, end)

    def site_of(self, client: int) -> str:
        """The site that owns a client."""
        return self.sites[bisect.bisect_right(self._ends, client)].name

    @property
    def listed(self) -> list[dict[str, Any]]:
        """Who takes part, the server first: name, fingerprint of the key, and clients."""
        return [{"name": SERVER, "fingerprint": fingerprint(self.server)},
                *({"name": site.name, "fingerprint": fingerprint(site.key), "clients": site.clients}
                  for site in self.sites)]

    def digest(self) -> str:
        """SHA-256 in hex of what the file says: comments and the order of keys do not count, the
        order of the sites does."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self)).encode()).hexdigest()


@dataclass(frozen=True)
class Site:
    """What a site alone knows: never compared, sent, recorded or printed. In a simulation, what the
    owner of all processes knows: no name, no folder, and of every site the text."""

    name: str
    data: str = field(repr=False)
    """Its text: a file, a folder or a pattern; in a simulation with {site} in place of the site's
    name."""
    folder: Path | None = field(repr=False)
    """Its key, token cache, clients' states, journal and log; None in a simulation."""


PRIVATE = {"site": "the name of this site in the file of --sites",
           "site_data": "this site's text: a file, a folder or a pattern, 'text/*.txt'; without "
                        "--site_dir one owner has the text of all sites, as a simulation: "
                        "'texts/{site}/*.txt'",
           "site_dir": "this site's own folder: its key, tokens, states and log; for the server, "
                       "its key"}
"""Flags that are never recorded, compared or sent -> help. Each may be given in the environment
instead: FEDRUN_SITE_DATA."""


def take_private(argv: Sequence[str], env: Mapping[str, str]) -> tuple[Site | None, list[str]]:
    """What only this site may know, from the flags of PRIVATE or the environment, and the other
    arguments. None if nothing of it is given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in PRIVATE:
        parser.add_argument(f"--{flag}", f"--{flag.replace('_', '-')}",
                            default=env.get(f"FEDRUN_{flag.upper()}"))
    try:
        given, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise InputError(str(error).removeprefix("argument ").rpartition("/")[2]) from None
    name, data, folder = given.site, given.site_data, given.site_dir
    if name is data is folder is None:
        return None, rest
    for flag, value in vars(given).items():
        require(value is None or bool(value.strip()), f"--{flag}", repr(value),
                "left out, or not empty (an unset variable?)")
    if folder is None:
        require(name is None, "--site", name, "given with --site_dir, which has the site's key")
    elif name is None:
        require(data is None, "--site_data", "of one site",
                "given with --site NAME, or without --site_dir for a simulation")
    else:
        require(data is not None, "--site", name, "given with --site_data, which is its text")
    return Site(name or "", data or "", None if folder is None else Path(folder).expanduser()), rest


# ---- the file ------------------------------------------------------------------------------------

def read_sites(path: Path, empty: bool = False) -> Sites:
    """Read the file of the sites.

    empty: whether it may lack sites, as before the first one is added.

    Raises:
        InputError: --sites PATH cannot be read, or the line of it that is wrong.
    """
    with naming("--sites", path), _beginning("", f"--sites {path}: ", unless="--sites"):
        try:
            root = yaml.compose(read_regular(path.expanduser(), LARGEST_FILE).decode("utf-8-sig"),
                                Loader=_Loader)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise InputError(f"cannot be read as YAML: {one_line(error)[:200]}") from None
        if root is None:
            raise InputError("is empty; `fedrun sites init` makes one")
        top = _mapping(root, "the file", ("run_name", "server", "sites"))
        found = [_entry(name, node) for name, node in _mapping(top["sites"], "sites", ()).items()]
        if not found and not empty:
            raise InputError("has no site; `fedrun sites add` adds one")
        return Sites(_text(top["run_name"], "run_name") or "", _text(top["server"], "server") or "",
                     tuple(found))


def write_sites(path: Path, sites: Sites) -> None:
    """Write the file of the sites, without what is the default. OSError if that fails."""
    listed = {site.name: {"key": site.key} | {f.name: getattr(site, f.name) for f in
                                              dataclasses.fields(Dealing)
                                              if getattr(site, f.name) != f.default}
              for site in sites.sites}
    content = {"run_name": sites.run_name, "server": sites.server, "sites": listed}
    write_atomic(path, b"# The same everywhere; written by `fedrun sites`. Compare the keys by "
                 b"telephone before you use it.\n" + yaml.safe_dump(
                     content, sort_keys=False, allow_unicode=True, width=1000).encode())


class _Loader(yaml.SafeLoader):
    """YAML without aliases, with which a small file can stand for a huge one."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            at = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise InputError(f"line {at.line + 1}: must be without aliases (*)")
        return super().compose_node(parent, index)


@contextmanager
def _beginning(old: str, new: str, unless: str = "\0") -> Iterator[None]:
    """Let the message of an InputError begin with `new` in place of `old`; but not if it begins
    with `unless`."""
    try:
        yield
    except InputError as error:
        if str(error).startswith(unless):
            raise
        raise InputError(new + str(error).removeprefix(old)) from None


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def _mapping(node: yaml.Node, what: str, fields: tuple[str, ...]) -> dict[str, yaml.Node]:
    """The values of a mapping with these keys, all of them; with any keys if there are none."""
    if not isinstance(node, yaml.MappingNode):
        raise InputError(f"{_line(node)}: {what} must be a mapping"
                         + (f" with {', '.join(fields)}" if fields else " of names"))
    found: dict[str, yaml.Node] = {}
    for key, value in node.value:
        # Its text as it stands there, since YAML would make no and 12 something else than names.
        name = key.value if isinstance(key, yaml.ScalarNode) else "?"
        if fields and name not in fields:
            raise InputError(f"{_line(key)}: unknown field {name[:80]!r} of {what}; must be one of "
                             + ", ".join(fields))
        if name in found:
            raise InputError(f"{_line(key)}: {name[:80]!r} is there twice")
        found[name] = value
    for name in fields:
        if name not in found:
            raise InputError(f"{_line(node)}: {what} has no field {name}")
    return found


def _entry(name: str, node: yaml.Node) -> SiteEntry:
    fields = ["key", *(f.name for f in dataclasses.fields(Dealing))]
    shown = name if _NAME.fullmatch(name) else repr(name[:40])
    with _beginning("", f"{_line(node)}: {shown}: ", unless="line "):
        present = _mapping(node, shown, ())
        if unknown := [each for each in present if each not in fields]:
            raise InputError(f"unknown field {unknown[0][:80]!r}; must be one of "
                             + ", ".join(fields))
        require("key" in present, "key", "none", "there")
        values: dict[str, Any] = {}
        for each, value in present.items():
            if each in ("clients", "rounded_to"):
                values[each] = _number(value, each, r"[0-9]{1,12}", int, "an integer")
            elif each == "size_skew":
                values[each] = _number(value, each, r"[0-9.]+(e[-+]?[0-9]+)?", float, "a number")
            else:
                values[each] = _text(value, each)
        return SiteEntry(name, **values)


def _text(node: yaml.Node, what: str) -> str | None:
    """The text of a value; None for none, ~ and null."""
    if not isinstance(node, yaml.ScalarNode):
        raise InputError(f"{what} must be a text")
    text = str(node.value)
    if text == "none" and what == "row_separator":
        return text
    return None if node.style is None and text in ("none", "null", "~", "") else text


def _number(node: yaml.Node, what: str, pattern: str, kind: type[int | float], accepted: str
            ) -> int | float:
    if not isinstance(node, yaml.ScalarNode):
        raise InputError(f"{what} must be {accepted}")
    with suppress(ValueError):
        if node.style is None and re.fullmatch(pattern, node.value):
            return kind(node.value)
    raise InputError(f"{what} {node.value[:80]}: must be {accepted}")
