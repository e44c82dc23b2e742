"""`fedrun.train`: a run from Python, in a notebook, a script or a job of several ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fedrun.common.errors import InputError
from fedrun.common.log import LOGGER, print_log
from fedrun.config import RunConfig
from fedrun.data.sites import take_private
from fedrun.distributed.launch import detect
from fedrun.flags import closest, methods, resolve
from fedrun.library.opened_run import Run
from fedrun.library.own_data import run_on
from fedrun.strategies.plugins import load_plugin
from fedrun.unused import refuse_unread

if TYPE_CHECKING:
    from fedrun.records.recorder import OnRound


def train(method: str | RunConfig, *, data: Any = None, clients: Sequence[Any] | None = None,
          validation: Any = None, vocab_size: int | None = None, on_round: OnRound | None = None,
          plugin: str | None = None, site_data: str | os.PathLike[str] | None = None, **flags: Any
          ) -> Run:
    """Train, and return the run's folder as an object.

    In one process, and under torchrun or SLURM on all ranks, which call it with the same arguments.
    Messages are printed as the command prints them, unless a handler for the logger "fedrun" is set
    up. Ctrl-C and SIGTERM stop the run after its round, with a checkpoint, and this returns. Signal
    handlers, threads, environment and torch's settings are as before when it has returned.

    method: central, or an aggregation method; or a config, which has all settings.
    data: text or tokens in place of --dataset, dealt to clients by --partition: token ids as an
        array or a list of integers (a stream of them, or 2-D: sequences), a list of texts, or a
        `datasets.Dataset` (--text_column).
    clients: the same for each client, in a list; what client 2 has is clients[2].
    validation: the same to validate on; without it --val_fraction is held out, of the end of each
        client's data, but of a client with few texts or sequences perhaps nothing.
    vocab_size: of token ids without --tokenizer; None: the largest id and one, or beside a config
        the tokenizer that it has.
    on_round: called on rank 0 after each round (or step of a central run) with a
        `fedrun.RoundRecord` r; if it returns "stop", the run stops there, with a checkpoint.
        r.number: of the round or step, from 1. r.train_ppl: perplexity of its training batches,
        None with --dp. r.val_ppl: the global model's on the validation split, None where it was not
        evaluated (--val_freq). r.lr: learning rate. r.tokens: training tokens so far, of all
        clients. r.seconds: wall-clock time so far. r.event: all of its line in events.jsonl, as a
        dict.
    plugin: the path of a Python file, or a module, with a method of your own; it is run.
    site_data: with sites=FILE, where the text of each site is: "texts/{site}/*.txt". It is not
        recorded, and FEDRUN_SITE_DATA of the environment may say it instead.
    flags: settings by the names of the command's flags: num_clients=4, dataset="pydocs".

    Raises:
        fedrun.InputError: a setting is wrong, with the message of the command.
        fedrun.Diverged: the model or the loss is not finite any more.
        fedrun.FedrunError: another reason worded for users: the hub or a rank does not answer. The
            two above are FedrunErrors as well.
    """
    with _unchanged_process():
        if plugin is not None:
            load_plugin(plugin)
        config = method if isinstance(method, RunConfig) else None
        if config is not None and flags:
            raise InputError(f"{min(flags)}: belongs into the config, where one is given")
        own = {name: value for name, value in (
            ("data", data), ("clients", clients), ("validation", validation),
            ("vocab_size", vocab_size)) if value is not None}
        site, _ = take_private([] if site_data is None else ["--site_data", os.fspath(site_data)],
                               os.environ)
        launch = detect(os.environ)
        with _printing(quiet=launch.local_rank > 0):
            given = None
            if own:
                config, given = run_on(own, config, flags, lambda flags: _config(method, flags))
            elif config is None:
                config = _config(method, flags)
            from fedrun import run  # imports torch
            run.train(run.prepare(config, launch, given, site), on_round)
        return Run(config.run_dir)


def _config(method: object, flags: dict[str, Any]) -> RunConfig:
    if not isinstance(method, str):
        raise InputError(f"method: is of type {type(method).__name__}; must be a name "
                         f"({', '.join(methods())}) or a whole config, of fedrun.flags.resolve")
    if method not in methods():
        raise InputError(f"unknown method {method!r}{closest(method, methods())}; must be one of "
                         + ", ".join(methods()))
    refuse_unread(method, flags)
    return resolve(method, flags)


@contextmanager
def _printing(quiet: bool) -> Iterator[None]:
    """Print messages in the block, unless the program receives them from the logger itself."""
    if LOGGER.hasHandlers():
        yield
        return
    handlers, level = LOGGER.handlers.copy(), LOGGER.level
    print_log(quiet)
    try:
        yield
    finally:
        LOGGER.handlers[:] = handlers
        LOGGER.setLevel(level)


@contextmanager
def _unchanged_process() -> Iterator[None]:
    """Restore what a run sets in its process: the environment, and torch's threads, deterministic
    kernels and precision."""
    import torch
    from tqdm import tqdm
    before, monitored = dict(os.environ), tqdm.monitor is None
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    flags = [(place, name, getattr(place, name)) for place, name in (
        (torch.backends.cudnn, "allow_tf32"), (torch.backends.cuda.matmul, "allow_tf32"),
        (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"),
        (torch.utils.deterministic, "fill_uninitialized_memory"))]
    try:
        yield
    finally:
        if monitored and tqdm.monitor is not None:  # a thread of progress bars
            tqdm.monitor.exit()  # type: ignore[no-untyped-call]
            tqdm.monitor = None
        torch.set_num_threads(threads)
        if torch.are_deterministic_algorithms_enabled() != deterministic:
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        for place, name, value in flags:
            setattr(place, name, value)
        os.environ.clear()  # last: torch's compiler, which some of these import, sets a variable
        os.environ.update(before)
