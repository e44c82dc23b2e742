"""The text of sites: read and dealt to clients by each site alone, or by the owner of all text in
a simulation, which calls the same functions for one site after the other.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from fedrun.common import locks
from fedrun.common.errors import InputError, require
from fedrun.common.files import DamagedFile, read_regular, write_atomic
from fedrun.data.discovery import folder_of, matching_files
from fedrun.data.partition import Shards, drawn_rows
from fedrun.data.sites import SiteEntry, Sites
from fedrun.data.text_files import printable
from fedrun.data.tokens import TokenData, prepare

LOCK_SECONDS = 60.0  # to wait for another process of this site that writes the tokenizer
LARGEST_TOKENIZER = 1 << 28  # bytes of a tokenizer.json
SITE = "{site}"  # stands for each site's name in the --site_data of a simulation


def read_site_text(entry: SiteEntry, data: str, tokenizer: Path, sequence_length: int,
                   cache_dir: Path) -> TokenData:
    """The sequences of one site's text, all of which are `train`.

    Args:
        data: a local file, folder or pattern. Files of a pattern are read in the order of their
            names, wherever they lie.
        tokenizer: a folder with tokenizer.json; no statistic of the text makes one.
        cache_dir: for the tokens. Their checksums are compared.
    Raises:
        InputError: the text cannot be read as the file of the sites says, or is too short.
    """
    full = str(Path(data).expanduser().absolute())  # not the name of one of our datasets
    with _of_site(entry, **{f"--dataset {printable(full)}": f"--site_data {printable(data)}"}):
        # Else it would be looked for on the hub, which would learn the name.
        require(folder_of(full) is not None or bool(matching_files(full)), "--site_data",
                printable(data), "an existing file or folder, or a pattern ('path/*.txt')")
        return prepare(full, str(tokenizer), sequence_length, cache_dir,
                       options=entry.text_options)


def deal_site(entry: SiteEntry, text: TokenData, seed: int, batch_size: int,
              holdout: float | None = None) -> Shards:
    """What each client of a site owns of the site's text, by the file of the sites.

    seed: of the run. holdout: --site_holdout. InputError if nothing would be held out, or if a
    client would have less than a batch, or no document or source.
    """
    rows, held = drawn_rows(len(text.train), holdout or 0.0, seed)
    with _of_site(entry):
        require(holdout is None or len(held) > 0, "--site_holdout", holdout,
                f"at least 1/{len(text.train)}, or none of its {len(text.train)} sequences is "
                "held out")
        shards = Shards.deal(
            text, num_clients=entry.clients, partition=entry.partition, alpha=1.0,
            size_skew=entry.size_skew, seed=seed, holdout=0.0, batch_size=batch_size,
            rounded_to=entry.rounded_to, rows=rows if len(held) else None)
    return Shards(shards.train, shards.holdout, [text.train] * entry.clients,
                  [] if holdout is None else [text.train[held]])


def read_all(sites: Sites, data: str, tokenizer: Path, sequence_length: int, cache_dir: Path
             ) -> dict[str, TokenData]:
    """For a simulation: the text of each site. data: with {site} for its name."""
    require(SITE in data, "--site_data", printable(data), f"a path with {SITE} for the name of "
            f"each site, such as 'texts/{SITE}/*.txt': without --site_dir this is a simulation, "
            "whose owner has the text of all sites")
    return {entry.name: read_site_text(entry, data.replace(SITE, entry.name), tokenizer,
                                       sequence_length, cache_dir) for entry in sites.sites}


def deal_all(sites: Sites, texts: Mapping[str, TokenData], seed: int, batch_size: int,
             holdout: float | None = None) -> Shards:
    """For a simulation: the clients of all sites, numbered in the order of the sites."""
    dealt = [deal_site(entry, texts[entry.name], seed, batch_size, holdout)
             for entry in sites.sites]
    return Shards([shard for one in dealt for shard in one.train],
                  [shard for one in dealt for shard in one.holdout],
                  [text for one in dealt for text in one.texts],
                  [held for one in dealt for held in one.held_out])


def texts_digest(texts: Mapping[str, TokenData]) -> str:
    """For a simulation: 16 hex digits of the tokens of all sites, in their order."""
    return hashlib.sha256(json.dumps([[name, text.content, *text.train.shape] for name, text in
                                      texts.items()]).encode()).hexdigest()[:16]


def sizes_digest(sites: Sites, sizes: Sequence[int]) -> str:
    """16 hex digits: all that everybody knows of who owns which text."""
    return hashlib.sha256(json.dumps([sites.digest(), list(sizes)]).encode()).hexdigest()[:16]


@contextmanager
def _of_site(entry: SiteEntry, **shown: str) -> Iterator[None]:
    """Let errors about text speak of a site, whose settings are no flags but stand in the file of
    the sites. shown: other words of a message -> what to say instead."""
    try:
        yield
    except InputError as error:
        text = str(error)
        for words, instead in {**shown, "--num_clients": "clients"}.items():
            text = text.replace(words, instead)
        text = re.sub(r"--(partition|size_skew|text_column|encoding)\b", r"\1", text)
        raise InputError(f"site {entry.name}: {text}") from error


def keep_tokenizer(folder: Path, tokenizer_json: bytes) -> Path:
    """The file of the tokenizer that was handed out, in a site's folder.

    Written only if it is not there, since tokens are cached under the times of this file.
    """
    digest = hashlib.sha256(tokenizer_json).hexdigest()
    file = folder / f"tokenizer-{digest[:16]}" / "tokenizer.json"
    held = locks.acquire(folder / "tokenizer.lock", LOCK_SECONDS)
    try:
        with suppress(OSError, DamagedFile):
            if read_regular(file, LARGEST_TOKENIZER) == tokenizer_json:
                return file
        write_atomic(file, tokenizer_json)
        return file
    finally:
        held.release()
