"""The lines that `fedrun plan` prints."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from fedrun.aggregation.int4 import Int4Aggregator
from fedrun.common.limits import machine_memory
from fedrun.config import CentralConfig, Dtype, FederatedConfig, RunConfig
from fedrun.data.sites import Site
from fedrun.distributed.launch import Launch
from fedrun.distributed.runtime import choose_device
from fedrun.experiment import require_names, resolve_dtype
from fedrun.model.hardware import hardware
from fedrun.model.pretrained import Pretrained
from fedrun.tools import plan_central
from fedrun.tools.plan_disk import Sent, evaluations, files, sent
from fedrun.tools.plan_machine import PUBLISHED, USABLE, Machine
from fedrun.tools.plan_memory import ITEMS, Trains, Worker, bytes_of, worker
from fedrun.tools.plan_protected import journal_bytes, log_bytes, of_privacy
from fedrun.tools.plan_ranks import Layout, Rank, on_machine, ranks, starting_bytes
from fedrun.tools.plan_text import Text, text_of
from fedrun.tools.plan_time import Seconds, measured, protected, published
from fedrun.training.evaluate import BATCH_SEQUENCES

WIDTH = 34  # of the first column
# What spares memory: shown if a run does not fit, in this order. The last two change the training.
SPARING = ({"micro_batch": 1}, {"checkpoint_activations": True}, {"offload": "global"},
           {"client_store": "disk"}, {"moments_dtype": "bf16"}, {"client_moments": "reset"})


def report(config: RunConfig, machine: Machine, site: Site | None = None,
           pretrained: Pretrained | None = None) -> Iterator[str]:
    """The plan of a run, line by line. site: with --site_data and the like; pretrained: of
    --init_from. InputError if its text, its vocabulary or its settings cannot be."""
    require_names(config)
    text = text_of(config, machine.vocab_size, site, pretrained)
    rates = PUBLISHED[machine.device_rates] if machine.device_rates else None
    device = torch.device("cpu") if rates else choose_device(config.device, Launch(), False)
    layout = Layout(machine.processes, machine.machines,
                    isinstance(config, FederatedConfig) and config.server == "colocated",
                    rates is not None or device.type == "cuda", text.sites if text.real else None)
    dtype: Dtype = config.dtype
    if rates is None:
        dtype = resolve_dtype(config, [hardware(device)])
    elif dtype == "auto":
        dtype = "bf16"
    config = dataclasses.replace(config, dtype=dtype)
    found, processes = counted(config, text, layout)
    yield from _heading(config, text, found, layout)
    yield ""
    for rank in processes:
        yield from _table(rank)
        yield ""
    if at_start := starting_bytes(config, found, pretrained):
        yield (f"for a moment at its start each process takes {amount(at_start)} of its host, "
               "where the model is " + ("read" if pretrained else "tried"))
    yield from _fits(config, text, layout, processes, _memory(machine, layout, device))
    rounds, known = _rounds(config, text)
    traffic = None
    if isinstance(config, FederatedConfig) and isinstance(found, Worker):
        traffic = sent(config, found, layout, rounds, text.schedule(config))
        yield from _unknown(config, text, found, rounds if known else None)
    yield "\ntime"
    if rates is None:
        seconds = measured(config, text.vocab_size, found, device)
    else:
        seconds = published(config, found, layout, traffic.mean if traffic else 0.0,
                            str(machine.device_rates), rates)
    seconds = protected(config, found, layout, device, seconds)
    yield from _time(config, text, layout, found, seconds, rounds if known else None)
    if traffic is not None:
        yield "\non the wire"
        yield from _wire(config, text, found, layout, traffic)
        if known:
            yield _row("recorded in the history at the end", amount(traffic.recorded))
    yield "\non disk"
    yield from _disk(config, text, found, layout, rounds, known)


def counted(config: RunConfig, text: Text, layout: Layout) -> tuple[Trains, list[Rank]]:
    """The process that trains, and all of them."""
    if isinstance(config, CentralConfig):
        one = plan_central.process(config, text.vocab_size, layout.gpu)
        return one, plan_central.ranks(config, one, layout.gpu)
    assert isinstance(config, FederatedConfig)
    found = worker(config, text.vocab_size, layout.gpu, layout.most(config),
                   text.schedule(config) if config.private else None)
    return found, ranks(config, found, layout)


def amount(size: float) -> str:
    """Bytes for a reader: 5.38 GB."""
    for unit, large in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= large:
            return f"{size / large:,.{2 if size < 100 * large else 0}f} {unit}"
    return f"{size:.0f} B"


def arithmetic(flop: int) -> str:
    """FLOP for a reader."""
    return f"{flop / 1e12:,.3g} TFLOP" if flop >= 1e11 else f"{flop / 1e9:.3g} GFLOP"


def duration(seconds: float) -> str:
    """Seconds for a reader."""
    for unit, large in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * large:
            return f"{seconds / large:,.1f} {unit}"
    return f"{seconds:.3g} s"


def _row(name: str, *cells: str) -> str:
    return f"  {name:<{WIDTH}}" + "".join(f"{cell:>14}" for cell in cells)


def _heading(config: RunConfig, text: Text, found: Trains, layout: Layout) -> Iterator[str]:
    yield (f"{config.method}, {config.config_name}: {found.flat.size:,} parameters, a vocabulary "
           f"of {text.vocab_size:,}, {config.dtype} products")
    where = "GPUs" if layout.gpu else "CPUs"
    if not isinstance(config, FederatedConfig):
        yield f"one process, on {where}"
        return
    hosted = layout.hosted(config.num_clients)
    if layout.sites:
        yield (f"{layout.processes} processes: a server, and {layout.team} for each of "
               f"{len(layout.sites.sites)} sites, on a machine of each site's own, on {where}; "
               f"{config.num_clients:,} clients, {config.cohort_size:,} in a round, at most "
               f"{hosted:,} on a worker")
        return
    who = "one process is the server and the worker" if layout.processes == 1 else (
        f"{layout.processes} processes on {layout.machines} machine{'s' * (layout.machines > 1)}, "
        f"{layout.workers} of them workers")
    yield (f"{who}, on {where}; {config.num_clients:,} clients, {config.cohort_size:,} in a round, "
           f"at most {hosted:,} on a worker")


# ---- memory --------------------------------------------------------------------------------------

def _table(rank: Rank) -> Iterator[str]:
    gpu = bool(rank.device)
    yield f"{f'memory of {rank.name}':<{WIDTH + 2}}" + "".join(
        f"{head:>14}" for head in (("GPU", "host") if gpu else ("host",)))
    for item in ITEMS:
        cells = [rank.device[item], rank.host[item]] if gpu else [rank.host[item]]
        if any(cells):
            yield _row(item, *(amount(cell) if cell else "" for cell in cells))
    totals = [rank.device.total(), rank.host.total()] if gpu else [rank.host.total()]
    yield _row("at the most", *map(amount, totals))
    if rank.shared and rank.name != "the process":
        yield (f"  of which the workers of a machine have {amount(rank.shared)} together")


def _memory(machine: Machine, layout: Layout, device: torch.device) -> float:
    """Bytes of a GPU, or of a machine without."""
    if (given := machine.given_bytes) is not None:
        return given
    if machine.device_rates:
        return PUBLISHED[machine.device_rates].bytes
    if layout.gpu:
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(machine_memory())


def _needed(found: list[Rank], layout: Layout) -> int:
    """Bytes of the memory that counts: of a worker's GPU, or of a machine's host."""
    return found[-1].device.total() if layout.gpu else on_machine(found, layout)


def _fits(config: RunConfig, text: Text, layout: Layout, found: list[Rank], memory: float
          ) -> Iterator[str]:
    where, most = "a GPU" if layout.gpu else "a machine", USABLE * memory
    if layout.sites:
        where += " of a site"
    needed = _needed(found, layout)
    there = f"of {amount(memory)}, where {USABLE:.0%} are for tensors"
    if layout.gpu:
        first = "a site's" if layout.sites else "the first"
        yield f"all processes on {first} machine: {amount(on_machine(found, layout))} of its host"
    if needed <= most:
        yield f"fits: {amount(needed)} on {where} {there}"
        return
    yield f"DOES NOT FIT: {amount(needed)} on {where} {there}"
    yield from advice(config, text, layout, needed, most)


def advice(config: RunConfig, text: Text, layout: Layout, needed: int, most: float
           ) -> Iterator[str]:
    """Flags that spare memory, one after the other until the run fits."""
    began = needed
    for change in SPARING:
        flag, value = next(iter(change.items()))
        changed: Any = change
        if not hasattr(config, flag):  # which central has not
            continue
        try:
            tried = dataclasses.replace(config, **changed)
        except ValueError:  # not with this method, or these flags
            continue
        less = _needed(counted(tried, text, layout)[1], layout)
        if getattr(config, flag) == value or less > 0.99 * needed:
            continue
        shown = f"--{flag} {str(value).lower() if value is True else value}"
        yield f"  with {shown}{' as well' if needed < began else ''}: {amount(less)}" + (
            ", which fits" if less <= most else "")
        config, needed = tried, less
        if needed <= most:
            return
    if layout.gpu or layout.machines >= layout.workers:
        yield "  then a smaller --config, or a larger memory"
    else:
        yield "  then more --machines, fewer --processes or a smaller --config"


# ---- time, wire, disk ----------------------------------------------------------------------------

def _unknown(config: FederatedConfig, text: Text, found: Worker, rounds: int | None
             ) -> Iterator[str]:
    """Of the noise and the text, what is known and what is not. rounds: None if it is not known."""
    if found.level is not None:
        of_text = config.dp == "example" and text.shards is None
        yield from of_privacy(config, text.schedule(config), found.level,
                              None if of_text else rounds, text.knows_noise(config))
    if text.sites is not None and text.shards is None:
        yield ("how many sequences each client has is not known before "
               + ("the sites say so" if text.real else "their text is tokenised"))


def _rounds(config: RunConfig, text: Text) -> tuple[int, bool]:
    """The rounds of the run, or a central one's steps, and whether they are known: else one, as an
    example."""
    if isinstance(config, CentralConfig):
        return plan_central.length(config, text.shards)
    assert isinstance(config, FederatedConfig)
    if text.shards is None and config.rounds is None:
        return 1, False
    return text.schedule(config).rounds, True


def _time(config: RunConfig, text: Text, layout: Layout, found: Trains, seconds: Seconds,
          rounds: int | None) -> Iterator[str]:
    yield f"  {seconds.how}"
    yield _row("a local step", arithmetic(found.flop + found.muon_flop), duration(seconds.step))
    one, once = seconds.of_round(config, layout), 0.0
    tokens, unit = config.batch_size * config.sequence_length, "steps"
    if isinstance(config, FederatedConfig):
        tokens, unit = tokens * config.cohort_size * config.local_updates, "rounds"
        if seconds.noise:
            yield _row("the noise of a round", "", duration(seconds.noise))
        if seconds.masks:
            yield _row("the masks of a site", "", duration(seconds.masks))
            yield "  made beside the training where a core is left over, else besides"
        yield _row("a round", f"{tokens:,} tokens", duration(one))
        if config.local_updates_schedule != "constant" and rounds is not None:
            schedule = text.schedule(config)
            most = max(map(schedule.steps, range(1, rounds + 1)))
            more = layout.turns(config) * (most - config.local_updates) * seconds.step
            yield _row("the longest round", f"{most} local updates", duration(one + more))
        if config.overlap and seconds.wire is not None:
            waited, once = seconds.waited_for(config, layout)
            yield (f"  its sum travels for {duration(seconds.wire)} while the next round trains, "
                   f"which waits for it {duration(waited)} more")
    if seconds.wire is None and layout.processes > 1:
        longer = " longer than the next round trains" * getattr(config, "overlap", False)
        yield f"  besides what is sent between workers{longer}, and evaluations"
    if rounds is None:
        yield (f"  how many {unit}: unknown until the text is tokenised, or given as --rounds N")
        return
    total = rounds * one + once
    if seconds.evaluation is not None and text.validation is not None:
        batches = -(-text.validation // BATCH_SEQUENCES)
        pass_ = seconds.evaluation * -(-batches // layout.workers)
        total += evaluations(config, rounds) * pass_
        yield _row("an evaluation", "", duration(pass_))
    yield _row(f"{rounds:,} {unit}", f"{rounds * tokens:,} tokens", duration(total))


def _wire(config: RunConfig, text: Text, found: Trains, layout: Layout, traffic: Sent
          ) -> Iterator[str]:
    mean = traffic.mean
    if layout.sites:
        yield _row("sent by a site in a round", amount(mean))
        yield (f"  by the first worker of each of {traffic.senders} sites, once; a ring of them "
               "passes on nearly twice that")
        if layout.gpu and layout.team > 1:
            yield "  and as much again, twice, between the GPUs of a site"
    elif traffic.senders:
        yield _row("sent by a worker in a round", amount(mean))
        if mean != traffic.most:
            yield _row("in a round that averages moments", amount(traffic.most))
        if isinstance(found, Worker) and isinstance(found.aggregator, Int4Aggregator):
            yield (f"  by each of {traffic.senders} workers, if it has one client: a sum of "
                   "several updates takes a byte for each parameter, or two")
        else:
            yield (f"  by each of {traffic.senders} workers, once; a ring of them passes on nearly "
                   "twice that")
    else:
        yield ("  nothing: there is one worker" if layout.workers == 1 else
               "  nothing: the workers of a machine share memory")
    if traffic.words:
        yield _row("words beside vectors, evaluated", amount(traffic.words))
    yield _row("a client's term", amount(mean),
               f"{mean / found.flat.size:.3g} B each")
    yield _row("a copy of the model to the server", amount(found.parameter_bytes))
    if layout.sites and config.checkpoint_freq is not None:
        yield _row("a checkpoint's state to the server", amount(bytes_of(found.kept)))
    if layout.sites and text.public_bytes is not None:
        yield _row("validation text to each process", amount(text.public_bytes))


def _disk(config: RunConfig, text: Text, found: Trains, layout: Layout, rounds: int, known: bool
          ) -> Iterator[str]:
    written = files(config, found, layout, rounds)
    for name, size in written.left.items():
        yield _row(name, amount(size))
    if not known:
        yield "  after one round; snapshots grow with each evaluation, and two checkpoints are kept"
    yield _row("left at the end", amount(sum(written.left.values())))
    for name, size in written.meanwhile.items():
        yield _row(f"meanwhile {name}", amount(size))
    if not isinstance(config, FederatedConfig) or not isinstance(found, Worker):
        return
    for name, size in (written.at_site | _logs(config, text, found, layout, rounds)).items():
        yield _row(name, amount(size))


def _logs(config: FederatedConfig, text: Text, found: Worker, layout: Layout, rounds: int
          ) -> dict[str, int]:
    """Bytes of the files that runs append to, after this one."""
    schedule, logs = text.schedule(config), dict[str, int]()
    largest = max(layout.sites.sites, key=lambda one: one.clients) if layout.sites else None
    if largest is not None and config.secure_sum:
        logs["a site's journal"] = journal_bytes(config, schedule, largest, rounds)
    if found.level is not None and text.knows_noise(config) and (
            config.dp == "client" or text.shards is not None):
        logs["the log of what was spent"] = log_bytes(schedule, found.level, rounds, largest)
    return logs
