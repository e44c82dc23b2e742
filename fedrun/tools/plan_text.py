"""How much text a planned run has, without tokenising any, how many tokens its model knows, and the
rounds that follow."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from fedrun.common.errors import InputError, require
from fedrun.config import FederatedConfig, RunConfig
from fedrun.data.cache_entry import entry_name, read_manifest
from fedrun.data.site_texts import SITE, deal_all, read_all
from fedrun.data.sites import Site, Sites, read_sites
from fedrun.data.tokenizer import bpe_size, ids_size, read_tokenizer
from fedrun.data.tokens import TokenData, prepare
from fedrun.experiment import shards_of, with_vocabulary
from fedrun.federation.schedule import Schedule
from fedrun.model.pretrained import Pretrained

KNOWN = {"gpt2": 50257, "EleutherAI/gpt-neox-20b": 50277}
"""Tokens of tokenizers on the hub."""


@dataclass(frozen=True)
class Text:
    """What is known of a run's text, and of who owns it."""

    vocab_size: int
    shards: list[int] | None
    """Sequences of each client; None if the text is not tokenised yet, or lies with sites."""
    validation: int | None
    """Sequences of the validation split."""
    sites: Sites | None = None
    """The file of --sites."""
    real: bool = False
    """Whether sites have processes, folders and text of their own."""
    public_bytes: int | None = None
    """Of the validation split, as a server hands it out to such sites."""

    def schedule(self, config: FederatedConfig) -> Schedule:
        """The run's rounds: from shards as small as they may be, where they are not known, and
        one round where their number is not known. InputError as the run would raise it."""
        least = config.batch_size * (1 if config.rounds and config.sync == "round"
                                     else config.local_updates)
        if self.shards is None:
            config = dataclasses.replace(config, rounds=config.rounds or 1)
        if not self.knows_noise(config):
            config = dataclasses.replace(config, dp_noise=1.0, dp_epsilon=None)
        shards = self.shards or [least] * config.num_clients
        return Schedule(config, shards, self.sites)

    def knows_noise(self, config: FederatedConfig) -> bool:
        """Whether what --dp_epsilon leads to is known; else a plan is made with a multiplier of 1,
        which decides no size."""
        return config.dp_epsilon is None or self.shards is not None or (
            config.dp == "client" and config.rounds is not None)


def text_of(config: RunConfig, vocab_size: int | None, site: Site | None = None,
            pretrained: Pretrained | None = None) -> Text:
    """From the cache, if the text is there. vocab_size: the value of --vocab_size. site: with
    --site_data or --site_dir. pretrained: of --init_from.

    InputError if the vocabulary is not known, or there is no such text.
    """
    sites = read_sites(config.sites) if isinstance(config, FederatedConfig) and config.sites \
        else None
    require(site is None or sites is not None, "--site_data", "(or others of --site)",
            "given with --sites FILE alone")
    real = site is not None and site.folder is not None
    cache = config.cache_dir.expanduser()
    entry = cache / "tokens" / entry_name(config.dataset, config.tokenizer, config.text_options)
    if read_manifest(entry, check_tokens=False) is None:
        known = vocab_size or (pretrained.vocab_size if pretrained else vocabulary(
            config.tokenizer))
        return Text(known, None, None, sites, real)
    data = prepare(config.dataset, config.tokenizer, config.sequence_length, cache,
                   options=config.text_options, check=False)
    if pretrained is not None:
        data = with_vocabulary(data, pretrained, config)
    return Text(vocab_size or data.vocab_size, _shards(config, data, sites, site),
                len(data.validation), sites, real, data.validation.nbytes)


def _shards(config: RunConfig, data: TokenData, sites: Sites | None, site: Site | None
            ) -> list[int] | None:
    """Sequences of each client, if all their text is tokenised here."""
    if sites is None:
        return shards_of(config, data).sizes
    assert isinstance(config, FederatedConfig)
    if site is None or site.folder is not None or SITE not in site.data:
        return None
    for entry in sites.sites:
        full = str(Path(site.data.replace(SITE, entry.name)).expanduser().absolute())
        name = entry_name(full, str(data.tokenizer_path), entry.text_options)
        if read_manifest(config.cache_dir.expanduser() / "tokens" / name,
                         check_tokens=False) is None:
            return None
    texts = read_all(sites, site.data, data.tokenizer_path, config.sequence_length,
                     config.cache_dir.expanduser())
    return deal_all(sites, texts, config.seed, config.batch_size, config.site_holdout).sizes


def vocabulary(tokenizer: str) -> int:
    """Tokens of a tokenizer, by its name or its file. InputError if that does not tell."""
    size = bpe_size(tokenizer) or ids_size(tokenizer) or KNOWN.get(tokenizer)
    path = Path(tokenizer).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if size is None and file.is_file():
        size = max(read_tokenizer(file, "--tokenizer").get_vocab(True).values(), default=0) + 1
    if size is None:
        raise InputError(f"--tokenizer {tokenizer}: its size is not known before the text is "
                         "tokenised; must come with --vocab_size N")
    return size
