"""What a run is made of, built once and handed down: config, text, shards, weights, provenance."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import platform
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from fedrun.common.errors import InputError, require
from fedrun.config import CentralConfig, Dtype, FederatedConfig, RunConfig
from fedrun.data.given import GivenData, Source
from fedrun.data.partition import Shards, client_shards
from fedrun.data.site_settings import require_fit
from fedrun.data.site_texts import deal_all, read_all, sizes_digest, texts_digest
from fedrun.data.sites import Site, Sites, read_sites
from fedrun.data.tokens import TokenData, prepare, verify
from fedrun.distributed.control_plane import ControlPlane
from fedrun.distributed.launch import Launch
from fedrun.federation.schedule import Schedule, rounds_per_epoch
from fedrun.model.base import Model
from fedrun.model.build import new_model, require_personal, require_trainable
from fedrun.model.hardware import Hardware, together
from fedrun.model.memory import BYTES_TO_LOAD, bytes_to_train, require_memory
from fedrun.model.pretrained import Pretrained, find_pretrained, parameters_of
from fedrun.records.provenance import (
    Length,
    central_length,
    corpus_digests,
    settings_equal_on_all_ranks,
)
from fedrun.start import RunRefused
from fedrun.strategies.plugins import method_digest

Config = TypeVar("Config", bound=RunConfig)
NO_TEXT = TokenData(np.empty((0, 0)), np.empty((0, 0)), 0, {}, Path())


@dataclass(frozen=True)
class Experiment:
    """What every rank builds from the flags before it connects, to the same content on all ranks.

    After connecting, `on` adds what it is computed on, and `decided` the type of the matrix
    products, which is rank 0's decision.
    """

    config: RunConfig
    data: TokenData
    shards: Shards
    """Who owns which sequences; of a central run, what it trains on."""
    pretrained: Pretrained | None
    """The model of --init_from."""
    provenance: dict[str, Any]
    """What a checkpoint records besides the settings."""
    given: GivenData | None = None
    """The data, where --dataset does not name it."""
    sites: Sites | None = None
    """The file of --sites."""
    site: Site | None = None
    """What this process alone knows of a run with sites."""

    @property
    def real(self) -> bool:
        """Whether the run's sites have processes and folders of their own."""
        return self.site is not None and self.site.folder is not None

    @property
    def at_site(self) -> bool:
        """Whether this process is one of a site, which has neither the server's text nor a run's
        folder."""
        return self.real and self.site is not None and bool(self.site.name)

    @property
    def source(self) -> Source:
        """What the tokens are made of."""
        return self.config.dataset if self.given is None else self.given

    @property
    def federated(self) -> FederatedConfig:
        assert isinstance(self.config, FederatedConfig)
        return self.config

    @property
    def central(self) -> CentralConfig:
        assert isinstance(self.config, CentralConfig)
        return self.config

    @property
    def length(self) -> Length:
        """The global steps of the run. InputError if it would make none."""
        if isinstance(self.config, FederatedConfig):
            return Length(self.config, rounds_per_epoch(self.config, self.shards.sizes))
        return central_length(self.config, sum(self.shards.sizes))

    @property
    def schedule(self) -> Schedule:
        """The rounds of a federated run. InputError if they cannot be had: no cohort has clients of
        three sites, or no noise is enough for --dp_epsilon."""
        return Schedule(self.federated, self.shards.sizes, self.sites)

    def decided(self, dtype: Dtype, data: TokenData) -> Experiment:
        """The same with the decided type of the matrix products, and text that was verified."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, dtype=dtype),
                                   data=data)

    def fitting(self, data: TokenData, device: torch.device) -> TokenData:
        """Text that came later than the settings, with the vocabulary of --init_from. InputError if
        the model cannot be trained on it here."""
        if self.pretrained is not None:
            data = with_vocabulary(data, self.pretrained, self.config)
        require_model(self.config, data.vocab_size, device)
        return data

    def with_text(self, data: TokenData, shards: Shards, **digests: str) -> Experiment:
        """The same with text and shards, and its provenance but for what `on` adds.

        digests: of what is this run's alone, by their names in the provenance.
        """
        return dataclasses.replace(self, data=data, shards=shards, provenance={
            **corpus_digests(data.fingerprint), "partition": "",
            "init_from": None if self.pretrained is None else self.pretrained.digest(),
            "plugin": method_digest(self.config.method), **digests})

    def on(self, workers: Iterable[Hardware]) -> Experiment:
        """The same with the workers' kernels, GPUs and libraries in its provenance."""
        found = list(workers)
        gpu_versions = {name: together(worker.versions.get(name, "none") for worker in found)
                        for name in dict.fromkeys(n for worker in found for n in worker.versions)}
        return dataclasses.replace(self, provenance=self.provenance | {
            "versions": versions() | gpu_versions,
            "kernels": together(worker.kernels for worker in found),
            "gpu": together(worker.gpu for worker in found)})

    def new_model(self, device: torch.device | str) -> Model:
        """The model at the start of the run: the same weights on every rank and every device."""
        return new_model(self.config, self.data.vocab_size, torch.device(device), self.pretrained)


def prepare_experiment(config: RunConfig, device: torch.device, given: GivenData | None = None,
                       site: Site | None = None) -> Experiment:
    """Read the weights and the text, and partition the text into shards.

    device: where this rank computes. given: data in place of --dataset's. site: with --sites, where
    the text is; at a site of its own text and shards come later (`with_text`), at its server the
    shards. InputError if the text or the weights do not fit the settings.
    """
    sites = sites_of(config, given, site)
    pretrained = None
    if config.init_from is not None:
        pretrained = find_pretrained(config.init_from, "--init_from", config.cache_dir)
        config = with_pretrained(config, pretrained)
    found = Experiment(config, NO_TEXT, Shards([]), pretrained, {}, given, sites, site)
    if found.at_site:
        return found
    data = prepare(config.dataset if given is None else given, config.tokenizer,
                   config.sequence_length, config.cache_dir.expanduser(),
                   check=config.partition == "dirichlet",  # whose topics are made of the tokens
                   options=config.text_options)
    data = found.fitting(data, device)
    if found.real:
        return found.with_text(data, Shards([]))
    if sites is not None and site is not None:
        texts = read_all(sites, site.data, data.tokenizer_path, config.sequence_length,
                         config.cache_dir)
        shards = deal_all(sites, texts, config.seed, config.batch_size,
                          found.federated.site_holdout)
        return found.with_text(data, shards, partition=sizes_digest(sites, shards.sizes),
                               sites=sites.digest()[:16], site_texts=texts_digest(texts))
    shards = shards_of(config, data)
    return found.with_text(data, shards, partition=shards.digest() if isinstance(
        config, FederatedConfig) else "")


def sites_of(config: RunConfig, given: GivenData | None, site: Site | None) -> Sites | None:
    """The file of --sites; None without sites. InputError if it does not fit the settings, or where
    the text lies is not said, or is without sites."""
    if not isinstance(config, FederatedConfig) or config.sites is None:
        require(site is None, "--site_data", "(or FEDRUN_SITE_DATA, or others of --site)",
                "given with --sites FILE alone, of a federated method")
        return None
    sites = read_sites(config.sites)
    require_fit(config, sites)
    require(given is None, "--sites", config.sites, "none where data are given, which have no site")
    if site is None:
        raise InputError(f"--sites {config.sites}: needs --site_data, where the text of the sites "
                         "is: 'texts/{site}/*.txt'")
    return sites


def require_model(config: RunConfig, vocab_size: int, device: torch.device) -> None:
    """Raise InputError if the model cannot be trained: here, or at all, or as the flags ask for."""
    where = f"--config {config.config}" if config.init_from is None else \
        f"--init_from {config.init_from}"
    shape = config.model
    if isinstance(config, FederatedConfig):
        require_personal(config.personal, shape, vocab_size)
    try:
        count = parameters_of(shape, shape.rows(vocab_size))
        needed = bytes_to_train(config.moments_dtype, config.local_optimizer)
        require_memory(count, needed if device.type == "cpu" else BYTES_TO_LOAD, where)
        require_trainable(shape, vocab_size, config.sequence_length, config.init_from is None)
    except InputError as error:
        if str(error).startswith("--"):
            raise
        raise InputError(f"{where}: {error}") from None
    require_names(config)


def require_names(config: RunConfig) -> None:
    """Raise InputError for settings that need more names of parameters than the model has."""
    shape = config.model
    if shape.tracks_parameters or not isinstance(config, FederatedConfig):
        return
    why = "for a model of transformers, which names no"
    require(not config.save_client_deltas, "--save_client_deltas", "true",
            f"false {why} parameters to save")
    scope = config.strategy.fisher_settings.scope if "fisher" in config.strategy.inputs else "all"
    require(scope != "mixers", "--fisher_scope", scope, f"all or untied {why} mixers")


def with_pretrained(config: Config, pretrained: Pretrained) -> Config:
    """The config under --init_from: the shape of that model, its tokenizer if it has one, and its
    name in place of the config's."""
    assert config.init_from is not None
    if pretrained.folder.resolve().is_relative_to(config.run_dir.resolve()):
        raise InputError(f"--init_from {config.init_from}: this run would overwrite it; choose "
                         "another --run_name or --data_dir")
    tokenizer = config.tokenizer if pretrained.tokenizer is None else str(pretrained.tokenizer)
    return dataclasses.replace(config, config=config.config_name, model=pretrained.model,
                               tokenizer=tokenizer)


def with_vocabulary(data: TokenData, pretrained: Pretrained, config: RunConfig) -> TokenData:
    """`data` with the vocabulary size of the --init_from model, which may have rows to spare."""
    if data.vocab_size > pretrained.vocab_size:
        raise InputError(f"--tokenizer {config.tokenizer}: has {data.vocab_size} tokens, more than "
                         f"the {pretrained.vocab_size} of --init_from {config.init_from}; give the "
                         "tokenizer that the model was trained with")
    return dataclasses.replace(data, vocab_size=pretrained.vocab_size)


def shards_of(config: RunConfig, data: TokenData) -> Shards:
    """The clients' shards of a federated run; what a central run trains on, by --batches."""
    if isinstance(config, FederatedConfig):
        return Shards.deal(data, num_clients=config.num_clients, partition=config.partition,
                           alpha=config.alpha, size_skew=config.size_skew, seed=config.seed,
                           holdout=config.client_holdout or config.strategy.holdout,
                           flag="--client_holdout" if config.client_holdout else
                           "--entropy_holdout", batch_size=config.batch_size)
    assert isinstance(config, CentralConfig)
    if config.batches == "all":
        return Shards([np.arange(len(data.train))])
    shards = client_shards(data, config.num_clients, config.partition, config.alpha,
                           config.size_skew, config.seed)
    return Shards(shards if config.batches == "clients" else shards[:1])


# ---- text ----------------------------------------------------------------------------------------

class CorpusCheck:
    """One rank on each machine verifies the checksums of the corpus's cached files, in a thread
    during connecting; damaged entries are reported and rebuilt."""

    def __init__(self, experiment: Experiment, launch: Launch) -> None:
        self.experiment, self.data = experiment, experiment.data
        self._problem = ""
        self._thread: threading.Thread | None = None
        if launch.local_rank == 0 and not experiment.at_site:
            self._thread = threading.Thread(target=self._verify, name="fedrun-corpus", daemon=True)
            self._thread.start()

    def _verify(self) -> None:
        config = self.experiment.config
        try:
            self._problem = "the corpus could not be verified (see above)"  # a bug of ours
            verify(self.experiment.source, config.tokenizer, config.cache_dir, config.text_options)
            self.data.reopen()
            self._problem = ""
        except (ValueError, OSError) as error:  # ConnectionError and TimeoutError are among them
            self._problem = str(error)

    def finish(self) -> str:
        """Wait until all is verified; what is damaged here and cannot be rebuilt, or nothing."""
        if self._thread is not None:
            self._thread.join()
        return self._problem

    def agree(self, control: ControlPlane) -> TokenData:
        """All ranks: the corpus, mapped from verified files. RunRefused on all of them if it is
        damaged on some machine and cannot be rebuilt."""
        problems = control.gather(self.finish())
        problem = control.share("" if problems is None else next(filter(None, problems), ""))
        if problem:
            raise RunRefused(problem)
        return self.data.reopen()


# ---- hardware and provenance ---------------------------------------------------------------------

def resolve_dtype(config: RunConfig, workers: Iterable[Hardware]) -> Dtype:
    """What --dtype means on these workers: decided by hardware capability, never by a timing.

    InputError for bf16 if one of them lacks the hardware.
    """
    lacking = [worker.host for worker in workers if not worker.bf16]
    if config.dtype == "bf16" and lacking:
        raise InputError(f"--dtype bf16: {lacking[0]} has no hardware for it and would "
                         "emulate it, many times slower than fp32; must be auto, fp32 or fp64")
    if config.dtype == "auto":
        return "fp32" if lacking else "bf16"
    return config.dtype


@functools.cache  # packages have long files of metadata, which are parsed each time
def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {
        name: version(name) for name in ("torch", "numpy", "transformers", "datasets",
                                         "tokenizers")}


def environment(experiment: Experiment, launch: Launch, workers: Mapping[int, Hardware]
                ) -> dict[str, object]:
    """What a reader of the run folder needs to know of the machines and the data."""
    made_with, found = experiment.provenance, workers.values()
    return {"versions": made_with["versions"], "processes": launch.world_size,
            "device": together(worker.device.partition(":")[0] for worker in found),
            "device_name": together(worker.name for worker in found), "host": platform.node(),
            "kernels": made_with["kernels"],
            "workers": [{"rank": rank, "host": worker.host, "device": worker.device,
                         "device_name": worker.gpu or worker.name}
                        for rank, worker in workers.items()],
            **({} if experiment.sites is None else {"sites": experiment.sites.listed}),
            "corpus": experiment.data.fingerprint, "made_with": made_with}


def identity(experiment: Experiment) -> dict[str, str]:
    """What must be equal on all ranks for their sums to mean anything."""
    provenance, data = experiment.provenance, experiment.data
    text = {"the tokenised corpus": provenance["content"], "the tokens of the corpus": data.content}
    if experiment.real:  # what the server has handed out: nothing of a site's text leaves it
        text = {"the tokenizer": hashlib.sha256(data.tokenizer_json).hexdigest(),
                "the validation text": hashlib.sha256(data.validation.tobytes()).hexdigest()}
    if experiment.sites is not None:
        text |= {"the file of the sites (--sites)": experiment.sites.digest(),
                 "the text of the sites (--site_data)": provenance.get("site_texts", ""),
                 "--secure_sum": str(experiment.federated.secure_sum)}
    return ({f"--{k}": json.dumps(v)
             for k, v in settings_equal_on_all_ranks(experiment.config).items()}
            | {f"version of {k}": v for k, v in versions().items()} | text
            | {"the clients' shards": provenance["partition"],
               "the weights of --init_from": str(provenance["init_from"]),
               "the code of the method (--plugin)": provenance["plugin"]})
