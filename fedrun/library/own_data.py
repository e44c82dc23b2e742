"""Turns the data that `fedrun.train` is given into the settings of a run on it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedrun.common.errors import InputError
from fedrun.common.log import log
from fedrun.config import CentralConfig, RunConfig
from fedrun.data.given import NAME, GivenData, given_data
from fedrun.data.given_parts import Ids, Texts, given_part
from fedrun.data.table_files import Table
from fedrun.data.text_options import GIVEN
from fedrun.data.tokenizer import LARGEST_IDS, ids_size
from fedrun.flags import file_settings

DEFAULTS = {field.name: field.default for field in dataclasses.fields(RunConfig)}
Given = dict[str, Any]
"""The arguments data, clients, validation and vocab_size, without those that are None."""


def run_on(given: Given, config: RunConfig | None, flags: dict[str, Any],
           resolve: Callable[[dict[str, Any]], RunConfig]) -> tuple[RunConfig, GivenData]:
    """The settings of a run on the data that was given, and the data.

    config: the settings without the data, if they were given as a whole; else `flags` are those
        that were given, and `resolve` makes a config of them.

    Raises:
        InputError: the data cannot be used, or contradicts a setting; or those of `resolve`.
    """
    parts, by_client = _parts(given)
    validation = given_part(given["validation"], "validation") if "validation" in given else None
    path, in_file = Path(), dict[str, Any]()
    whole = config is not None
    if config is None:
        path, in_file = file_settings(str(flags.get("config", DEFAULTS["config"])))
        implied = _implied(parts, by_client)
        config = resolve({k: v for k, v in implied.items() if k not in in_file} | flags)
    asked = flags | in_file
    try:
        _refuse_contradictions(config, flags, asked, parts, by_client, validation)
        data = given_data(parts, validation, by_client, config.sequence_length,
                          config.text_options)
        named = "tokenizer" in asked or config.tokenizer != DEFAULTS["tokenizer"]
        tokenizer = _tokenizer(data, config, named, whole, given)
    except InputError as error:
        raise InputError(re.sub(r"--(\w+)(?= )", lambda flag: f"--config {path}: {flag[1]}"
                                if flag[1] in in_file.keys() - flags.keys() else flag[0],
                                str(error))) from None
    changed: dict[str, Any] = {"dataset": str(data), "tokenizer": tokenizer}
    if by_client:
        changed |= {"num_clients": CentralConfig.num_clients} if _reads_no_clients(config) else {
            "partition": GIVEN}
    return dataclasses.replace(config, **changed), data


def _parts(given: Given) -> tuple[list[Ids | Table], bool]:
    """What was given as data or clients, and whether it was clients."""
    if "data" in given and "clients" in given:
        raise InputError("clients: must be left out where data= is given, which all clients share")
    if "data" in given:
        return [given_part(given["data"], "data")], False
    if "clients" not in given:
        raise InputError(f"{min(given)}: goes with data= or clients= alone")
    clients = given["clients"]
    if not isinstance(clients, list | tuple) or not clients:
        kind = "empty" if isinstance(clients, list | tuple) else f"a {type(clients).__name__}"
        raise InputError(f"clients: is {kind}; must be a list with a client's data in each place")
    return [given_part(one, f"clients[{n}]") for n, one in enumerate(clients)], True


def _implied(parts: list[Ids | Table], by_client: bool) -> dict[str, Any]:
    """The settings that the data decides where they are not given."""
    widths = [part.width for part in parts if isinstance(part, Ids) and part.width is not None]
    return ({"num_clients": len(parts)} if by_client else {}) | (
        {"sequence_length": widths[0]} if widths else {})


def _reads_no_clients(config: RunConfig) -> bool:
    return isinstance(config, CentralConfig) and config.batches == "all"


def _refuse_contradictions(config: RunConfig, flags: Given, asked: Given, parts: list[Ids | Table],
                           by_client: bool, validation: Ids | Table | None) -> None:
    """InputError for a setting that the data leaves no room for. asked: those that were given, as
    flags or in the file of --config."""
    everything = parts if validation is None else [*parts, validation]
    there, count = config.to_dict()["num_clients"], len(parts)
    if by_client and there != count and ("num_clients" in flags or not _reads_no_clients(config)):
        raise InputError(f"--num_clients {there}: must be {count}, the length of clients=")
    names = ["dataset", "encoding", "validation_split", "max_tokens", "stream"]
    names += ["val_fraction"] * (validation is not None)
    names += ["partition", "size_skew"] * by_client
    names += ["text_column"] * all(isinstance(part, Ids | Texts) for part in everything)
    names += ["row_separator"] * isinstance(parts[0], Ids)
    for name in names:
        value = getattr(config, name)
        of_such_a_run = value == GIVEN if name == "partition" else (
            name == "dataset" and NAME.fullmatch(value))
        if (value != DEFAULTS[name] and not of_such_a_run) or (name == "dataset" and name in asked):
            raise InputError(f"--{name} {value}: must be left out with "
                             f"{'clients=' if by_client else 'data='}"
                             + " and validation=" * (name == "val_fraction"))


def _tokenizer(data: GivenData, config: RunConfig, named: bool, whole: bool, given: Given) -> str:
    """The tokenizer of text; of token ids the one that was `named`, or ids:N for N of them. A
    config that was given as a `whole` has a tokenizer, which vocab_size replaces if it is the
    default."""
    size = given.get("vocab_size")
    if not data.ids:
        if size is not None:
            raise InputError(f"vocab_size {size}: belongs to token ids; the vocabulary of texts is "
                             "their tokenizer's (--tokenizer)")
        return config.tokenizer
    if size is None and whole and not named:
        if config.init_from is None:
            log(f"token ids: of the config's tokenizer {config.tokenizer} (vocab_size= for ids of "
                "no tokenizer)")
        return config.tokenizer
    if size is None and not named:
        data.require_below(LARGEST_IDS, "that ids without a tokenizer may have")
        return f"ids:{1 + max(ids.largest for ids in data.ids)}"
    what = f"vocab_size {size}:" if size is not None else f"--tokenizer {config.tokenizer}: N"
    if size is None:
        if (size := ids_size(config.tokenizer)) is None:
            return config.tokenizer
    elif named or config.init_from is not None:
        raise InputError(f"vocab_size {size}: must be left out with --tokenizer or --init_from, "
                         "which have a vocabulary")
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= LARGEST_IDS:
        raise InputError(f"{what} must be an integer in [1, {LARGEST_IDS}]")
    data.require_below(size, "that was given")
    return f"ids:{size}"
