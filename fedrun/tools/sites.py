"""`fedrun sites ...`: makes the file that names the owners of the text, and their keys.

    fedrun sites init --site_dir server                  at the server
    fedrun sites key --site_dir north                    at each site, which sends the key that this
                                                         prints, and never the folder
    fedrun sites add north ed25519:... --clients 2       at the server, for each site
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from fedrun.common.errors import InputError, naming
from fedrun.common.terminal import say
from fedrun.data.public_keys import fingerprint
from fedrun.data.sites import IDENTITY, Dealing, SiteEntry, Sites, read_sites, write_sites
from fedrun.flags import Parser, add_flags, flags_of

ABOUT = """\
Several owners of text, the sites, can train one model together, each on its own
text, which it shows to nobody. One of them, or somebody else, runs the server.
Who takes part stands in one file, sites.yaml, which all of them have.

Everybody has a key in two parts. The private part stays in a file of its owner,
who alone can sign with it. The public part goes into sites.yaml: with it the
others can tell that a message comes from that owner and from nobody else.

  1. The server's operator:  fedrun sites init --site_dir server
  2. Each site's operator:   fedrun sites key --site_dir north
     and sends the line that begins with ed25519: to the server's operator.
  3. The server's operator:  fedrun sites add north ed25519:...
     for each site, and sends sites.yaml to all of them.
  4. Everybody:              fedrun sites show
     and compares the fingerprints by telephone, since someone who can change a
     mail on its way can put another key into it."""


def main(argv: Sequence[str]) -> int:
    """Run one of the commands."""
    parser = Parser(prog="fedrun sites", description=ABOUT, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, text: str, action: object) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        added.set_defaults(action=action)
        return added

    def takes_file(added: argparse.ArgumentParser) -> None:
        added.add_argument("--sites", type=Path, default=Path("sites.yaml"), metavar="FILE",
                           help="the file of the sites (default: %(default)s)")

    def takes_folder(added: argparse.ArgumentParser, whose: str) -> None:
        added.add_argument("--site_dir", type=Path, required=True, metavar="FOLDER",
                           help=f"{whose} own folder, made if it is not there; nobody else may "
                                f"read it. The private key is the file {IDENTITY} in it, which is "
                                "never overwritten, and must never be sent or copied")

    init = command("init", "make the server's key, and a file of the sites without sites", _init)
    takes_folder(init, "the server's")
    takes_file(init)
    init.add_argument("--run_name", default="training", metavar="NAME",
                      help="what the training is called in the file (default: %(default)s)")
    key = command("key", "make this site's key, and print its public part", _key)
    takes_folder(key, "the site's")
    add = command("add", "add a site to the file", _add)
    add.add_argument("name", metavar="NAME", help="the site's name: a-z, 0-9, _ and -")
    add.add_argument("key", metavar="KEY", help="its public key, as `fedrun sites key` printed it "
                                                "at the site: ed25519:...")
    takes_file(add)
    add_flags(add.add_argument_group("how its text becomes clients"), flags_of(Dealing))
    show = command("show", "print who is in the file, with fingerprints to compare by telephone",
                   _show)
    takes_file(show)
    given = parser.parse_args(argv)
    given.action(given)
    return 0


def _init(given: argparse.Namespace) -> None:
    if os.path.lexists(given.sites):
        raise InputError(f"--sites {given.sites}: is there already; it is not overwritten")
    sites = Sites(given.run_name, make_key(given.site_dir), ())
    with naming("--sites", given.sites):
        write_sites(given.sites, sites)
    say(f"wrote {given.sites}; `fedrun sites add` adds a site to it")


def _key(given: argparse.Namespace) -> None:
    public = make_key(given.site_dir)
    say("Send this line to the server's operator, who adds it with `fedrun sites add`:\n\n"
        f"{public}\n\nand tell them its fingerprint by telephone: {fingerprint(public)}")


def _add(given: argparse.Namespace) -> None:
    values = {name: flag.parse(getattr(given, name), f"--{name} ")
              for name, flag in flags_of(Dealing).items() if getattr(given, name) is not None}
    sites = read_sites(given.sites, empty=True)
    try:
        entry = SiteEntry(given.name, given.key, **values)
        sites = Sites(sites.run_name, sites.server, (*sites.sites, entry))
    except InputError as error:
        raise InputError(f"fedrun sites add {given.name[:40]}: {error}") from None
    with naming("--sites", given.sites):
        write_sites(given.sites, sites)
    say(f"added {entry.name} to {given.sites}; fingerprint {fingerprint(entry.key)}: compare it "
        "with the site by telephone")


def _show(given: argparse.Namespace) -> None:
    sites = read_sites(given.sites, empty=True)
    say(f"{sites.run_name}, {sites.num_clients} clients; fingerprints:")
    for one in sites.listed:
        say(f"  {one['fingerprint']}  {one['name']}"
            + (f", clients: {one['clients']}" if "clients" in one else ""))


def make_key(folder: Path) -> str:
    """The public key of the one in a folder, which is made if there is none."""
    try:
        from fedrun.secure.identity import Identity, public_text
    except ModuleNotFoundError:
        raise InputError("fedrun sites: keys need the package cryptography: pip install "
                         "'fedrun[secure]'") from None
    folder = folder.expanduser()
    with naming("--site_dir", folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / IDENTITY
        if os.path.lexists(path):
            public = public_text(Identity.load(path).public)
            say(f"{path} is there already, and is kept; fingerprint {fingerprint(public)}")
        else:
            public = public_text(Identity.create(path).public)
            say(f"made {path}; fingerprint {fingerprint(public)}")
    return public
