"""What all ranks tell each other when they have connected: on what they compute, and between sites
of their own the text that is public, and how much there is of the rest.

    public text   server -> all    its validation split and its tokenizer
    sizes         all -> server    how many sequences each client of a site has, or that the site
                                   cannot take part: of that a code alone, the rest stays there
    all sizes     server -> all

A site reads its text between the first two, with the tokenizer that the server has handed out.
"""

from __future__ import annotations

import base64
import dataclasses
import os
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fedrun.common.errors import (
    ERROR_TEXTS,
    ErrorCode,
    InputError,
    error_code,
    explain,
    require,
)
from fedrun.common.limits import shortage
from fedrun.common.log import ERROR, WARNING, keep_log, log
from fedrun.config import FederatedConfig, RunConfig
from fedrun.data.partition import Shards
from fedrun.data.site_texts import deal_site, keep_tokenizer, read_site_text, sizes_digest
from fedrun.data.sites import IDENTITY, Site, Sites, read_sites
from fedrun.data.tokens import TokenData
from fedrun.distributed.connect import named
from fedrun.distributed.control_plane import ControlPlane
from fedrun.distributed.handshake import Proof
from fedrun.distributed.launch import Launch
from fedrun.experiment import CorpusCheck, Experiment, resolve_dtype
from fedrun.federation.resuming import gather_holdings, open_checkpoint
from fedrun.federation.secure_sum import PlanRefused
from fedrun.model.hardware import Hardware
from fedrun.records.checkpoint import Checkpoint
from fedrun.records.folders import Folders
from fedrun.records.site_states import SiteStates
from fedrun.start import RunRefused, StartDecision, decide_start, run_id

LOG = "log"  # of a site, in its folder


# ---- before connecting ---------------------------------------------------------------------------

def proof_of(config: RunConfig, site: Site | None, launch: Launch) -> Proof | None:
    """What this process proves with whose it is; None if one user owns all processes.

    InputError for private settings that contradict the file of the sites or how this process was
    started, and for a key that is not the one in that file.
    """
    if (site is None or site.folder is None or not isinstance(config, FederatedConfig)
            or config.sites is None):
        return None
    require(config.dp_dir is None, "--dp_dir", config.dp_dir, "left out with --site_dir, which has "
            "the key of the noise and the log of each site")
    sites = read_sites(config.sites)
    if launch.alone:
        raise InputError("--site_dir: sites of their own need a process for the server and one for "
                         "each site at least; --site_data 'texts/{site}/*.txt' without --site_dir "
                         "simulates them in one")
    require(config.server == "dedicated", "--server", config.server, "dedicated with --site_dir: "
            "the server has no text, and no clients")
    if launch.rank == 0:
        require(not site.name, "--site", site.name, "left out at rank 0, which is the server")
        return open_folder(site, sites, run_id(config))
    if not site.name:
        raise InputError(f"--site: missing; which of {', '.join(sites.names)} is this?")
    require(site.name in sites.names, "--site", site.name, f"one of {', '.join(sites.names)}, "
            "which the file of --sites names")
    return open_folder(site, sites, "")


def open_folder(site: Site, sites: Sites, run: str) -> Proof:
    """What this site, or the server, proves with who it is. At a site nothing that this process
    writes is readable for others from here on, and its messages are kept in the site's log.

    run: the run's id; sites learn it from the server. InputError unless the folder is there, with
    a key for its owner alone that is the one in the file of the sites.
    """
    folder = site.folder
    assert folder is not None
    try:
        from fedrun.secure.identity import Identity, public_key
    except ImportError:
        raise InputError("--site_dir: sites prove who they are with the package cryptography: "
                         "pip install 'fedrun[secure]'") from None
    try:
        identity = Identity.load(folder / IDENTITY)
        if site.name:
            os.umask(0o077)
            keep_log(folder / LOG)
    except FileNotFoundError:
        raise InputError(f"--site_dir {folder}: no key there ({IDENTITY}); `fedrun sites key` "
                         "makes one") from None
    except OSError as error:
        raise InputError(f"--site_dir {folder}: {explain(error)}") from None
    except InputError as error:
        raise InputError(f"--site_dir: {error}") from None
    return Proof(identity, site.name, {entry.name: public_key(entry.key) for entry in sites.sites},
                 public_key(sites.server), run)


# ---- errors --------------------------------------------------------------------------------------

def problem_of(site: str, code: ErrorCode) -> str:
    """What everybody is told of an error at a site."""
    return f"site {site}: {ERROR_TEXTS[code]} (its own log says more)"


def tell(error: BaseException) -> ErrorCode:
    """Log why this site's text cannot be used, all of it; returns what leaves the site."""
    line = shortage(error) or explain(error)
    trace = "" if line else "".join(traceback.format_exception(error))
    log(line or "an unexpected error", ERROR, trace)
    return "text" if (code := error_code(error)) in ("settings", "disk") else code


# ---- after the handshake -------------------------------------------------------------------------

def join(experiment: Experiment, control: ControlPlane, check: CorpusCheck, device: torch.device
         ) -> Experiment:
    """All ranks: the experiment with the server's public text, the text of this site alone, and the
    sizes of all clients.

    check: of the server's text. device: of this rank. RunRefused on all ranks, naming a site, if
    one cannot take part.
    """
    config, sites, site = experiment.config, experiment.sites, experiment.site
    assert sites is not None
    assert site is not None
    if name := site.name:  # from here on no more of an exception leaves than what kind it is
        control.public = lambda error: problem_of(name, error_code(error))
    problem = check.finish()
    public = hand_out(control, experiment.data if site.name or problem else
                      experiment.data.reopen(), problem)
    data, shards = public, Shards([])
    code: ErrorCode = ""
    if site.name:
        try:
            text = read_own_text(site, sites, public, config)
            shards = deal_site(sites[site.name], text, config.seed, config.batch_size,
                               experiment.federated.site_holdout)
            data = experiment.fitting(dataclasses.replace(
                public, train=text.train, content=text.content), device)
        except Exception as error:
            code = tell(error)
    sizes = agree_on_sizes(control, sites, shards.sizes, code)
    joined = experiment.with_text(data, place(shards, sizes, sites, site.name),
                                  partition=sizes_digest(sites, sizes), sites=sites.digest()[:16])
    try:
        _ = joined.length, joined.schedule  # refused if there is nothing to do, or no noise
    except InputError as error:
        raise RunRefused(str(error)) from None
    return joined


def read_own_text(site: Site, sites: Sites, public: TokenData, config: RunConfig) -> TokenData:
    """The text of this site, tokenised into its own folder."""
    assert site.folder is not None
    tokenizer = keep_tokenizer(site.folder, public.tokenizer_json)
    return read_site_text(sites[site.name], site.data, tokenizer, config.sequence_length,
                          site.folder)


def place(own: Shards, sizes: list[int], sites: Sites, name: str) -> Shards:
    """The shards of a site's clients under their numbers in the run, beside the sizes of all.

    PlanRefused if the server hands out other sizes of this site: weights are made of them.
    """
    mine = sites.clients_of(name) if name else []
    if len(sizes) != sites.num_clients or [sizes[k] for k in mine] != own.sizes:
        raise PlanRefused(f"the server hands out other sizes of this site's clients than "
                          f"{own.sizes}, or not those of {sites.num_clients} clients")
    nothing = np.empty(0, np.int64)
    train, texts = [nothing] * len(sizes), [np.empty((0, 0))] * len(sizes)
    for client, shard, text in zip(mine, own.train, own.texts, strict=True):
        train[client], texts[client] = shard, text
    return Shards(train, texts=texts, held_out=own.held_out, agreed=sizes)


def hand_out(control: ControlPlane, data: TokenData, problem: str) -> TokenData:
    """All ranks: the server's text, without what could be trained on.

    data: on the server. problem: why it cannot be used; then all ranks raise RunRefused.
    """
    message: dict[str, Any] = {"problem": problem}
    if control.rank == 0 and not problem:
        message |= {"tokenizer": base64.b64encode(data.tokenizer_json).decode(),
                    "vocab_size": data.vocab_size, "fingerprint": data.fingerprint,
                    "dtype": data.validation.dtype.str, "shape": data.validation.shape}
    message = control.share(message)
    if message["problem"]:
        raise RunRefused(message["problem"])
    (rows, length), dtype = message["shape"], np.dtype(message["dtype"])
    sent = None
    if control.rank == 0:  # as bytes: gloo sends no uint16
        sent = torch.from_numpy(np.array(data.validation).reshape(-1).view(np.uint8))
    received = control.share_vector(sent, rows * length * dtype.itemsize, torch.uint8)
    return TokenData(np.empty((0, length), dtype), received.numpy().view(dtype).reshape(
        rows, length), message["vocab_size"], message["fingerprint"], data.tokenizer_path,
        tokenizer_json=base64.b64decode(message["tokenizer"]))


def agree_on_sizes(control: ControlPlane, sites: Sites, own: Sequence[int], code: ErrorCode
                   ) -> list[int]:
    """All ranks: how many sequences each client in the run trains on.

    own: of this site's clients. code: why this site cannot take part; then all ranks raise
    RunRefused, as they do if the processes of a site have read different text.
    """
    said = control.gather({"sizes": [int(size) for size in own], "code": code})
    answer = control.share(said and _answer(control, sites, said))
    if answer["problem"]:
        raise RunRefused(answer["problem"])
    return list(answer["sizes"])


def _answer(control: ControlPlane, sites: Sites, said: Sequence[dict[str, Any]]
            ) -> dict[str, Any]:
    """Server: the sizes of all clients, or which site cannot take part."""
    assert control.membership is not None
    sizes: list[int] = []
    for entry in sites.sites:
        of_site = [said[rank] for rank in control.membership.workers_of(entry.name)]
        if code := next((one["code"] for one in of_site if one["code"]), ""):
            return {"problem": problem_of(entry.name, code if code in ERROR_TEXTS else "bug")}
        first = of_site[0]["sizes"]
        if any(one["sizes"] != first for one in of_site):
            return {"problem": f"site {entry.name}: its processes have read different text; all of "
                               "them need the same files"}
        if len(first) != entry.clients:
            return {"problem": f"site {entry.name}: has {len(first)} clients, but {entry.clients} "
                               "in the file of --sites"}
        sizes += first
    return {"problem": "", "sizes": sizes}


# ---- hardware and the start ----------------------------------------------------------------------

def hardware_of_workers(control: ControlPlane, here: Hardware) -> dict[int, Hardware]:
    """All ranks: the hardware of every worker, by rank. here: this rank's."""
    everyone = control.share(control.gather(dataclasses.asdict(here)))
    return {rank: Hardware(**values) for rank, values in enumerate(everyone)
            if rank >= control.first_worker}


def states_of(experiment: Experiment, control: ControlPlane, proof: Proof | None
              ) -> SiteStates | None:
    """At a site: its clients' states in this run, as this process keeps them. None elsewhere."""
    members, site, sites = control.membership, experiment.site, experiment.sites
    if not experiment.at_site:
        return None
    assert members is not None
    assert proof is not None
    assert site is not None
    assert sites is not None
    peers = members.workers_of(site.name)
    return SiteStates(Folders.of(experiment.config, site, members.run), proof.identity.tag,
                      members.run, sites.digest(), experiment.data.content,
                      peers.index(control.rank), len(peers))


def take_up(control: ControlPlane, experiment: Experiment, start: StartDecision,
            states: SiteStates | None) -> Checkpoint | None:
    """All ranks: the checkpoint to resume from, of which a site has a part. RunRefused on all of
    them if a site cannot go on from it."""
    found = None if experiment.at_site else start.open(experiment.config.run_dir)
    if not experiment.real or start.step is None:
        return found
    try:
        return open_checkpoint(control, states, found, start.step)
    except InputError as error:
        raise RunRefused(str(error)) from None


def agree_on_start(control: ControlPlane, experiment: Experiment, workers: Mapping[int, Hardware],
                   states: SiteStates | None) -> StartDecision:
    """All ranks: how rank 0 decides to start. RunRefused on all of them if it refuses.

    states: of this process, at a site.
    """
    config, message = experiment.config, dict[str, Any]()
    holdings = gather_holdings(control, states) if experiment.real else None
    if control.rank == 0:
        try:
            require_alike(workers, config.deterministic)
            start = decide_start(
                config, experiment.length, lambda c: resolve_dtype(c, workers.values()),
                experiment.provenance, holdings)
            if experiment.pretrained is not None and start.step is None and not start.finished:
                experiment.pretrained.build()  # refused before an earlier run is removed
            message = dataclasses.asdict(start)
        except InputError as error:
            message = {"refused": str(error)}
    message = control.share(message)
    if "refused" in message:
        raise RunRefused(message["refused"])
    return StartDecision(**message)


def require_alike(workers: Mapping[int, Hardware], deterministic: bool) -> None:
    """Rank 0: whether the workers compute the same bits.

    Raises RunRefused if they run different kernels, and under --deterministic if anything else
    differs that decides the last bits; without it that is a warning.
    """
    found = differing(workers)
    if kernels := found.pop("kernels", ""):
        raise RunRefused(f"--device: the workers run different kernels: {kernels}; use the same "
                         "installation on all machines")
    if not found:
        return
    line = "; ".join(f"{name} {values}" for name, values in found.items())
    if deterministic:
        raise RunRefused(f"--deterministic: the workers differ ({line}), so results would depend "
                         "on which of them trains a client; must be alike")
    log(f"the workers differ, and with them the last bits of their clients: {line}", WARNING)


def differing(workers: Mapping[int, Hardware]) -> dict[str, str]:
    """What the workers differ in, by name: each value, and the ranks that have it."""
    seen = {rank: {"kernels": worker.kernels, "GPU": worker.gpu} | worker.versions
            for rank, worker in workers.items()}
    found = {}
    for name in dict.fromkeys(n for values in seen.values() for n in values):
        ranks: dict[str, list[int]] = {}
        for rank, values in seen.items():
            ranks.setdefault(values.get(name) or "none", []).append(rank)
        if len(ranks) > 1:
            found[name] = ", ".join(f"{value} on {named(those)}" for value, those in ranks.items())
    return found
