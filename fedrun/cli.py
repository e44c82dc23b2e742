"""The command line: commands, with flags made from the dataclasses in config/.

    fedrun fed_avg --num_clients 8 --lr 1e-3
    fedrun fed_sign --plugin my_method.py
    python -m fedrun.torchrun --nproc-per-node 5 -m fedrun fed_avg --num_clients 4
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence

from fedrun import __version__
from fedrun.common.errors import InputError, explain, one_line
from fedrun.common.log import ERROR, log, print_log
from fedrun.common.terminal import shortened, visible
from fedrun.config import RunConfig
from fedrun.data.sites import PRIVATE, take_private
from fedrun.distributed.launch import detect
from fedrun.distributed.stopping import refuse
from fedrun.flags import (
    Parser,
    add_flags,
    closest,
    method_flags,
    methods,
    resolve,
    with_underscores,
)
from fedrun.strategies.plugins import load_plugin
from fedrun.unused import NEVER_READ, refuse_unread

SECONDS_FOR_RANK_0 = 15.0
# Commands other than training: name -> (help, module with its `main(argv) -> exit code`).
TOOLS: dict[str, tuple[str, str]] = {
    "study": ("run a grid of settings, tune, repeat over seeds, make a table",
              "fedrun.tools.study"),
    "plan": ("memory, time, traffic and disk of a run, by item, before it is started",
             "fedrun.tools.plan"),
    "watch": ("follow a run in the terminal, or look at a finished one", "fedrun.tools.watch"),
    "sites": ("make the file that names the owners of the text, and their keys",
              "fedrun.tools.sites"),
    "partition": ("show which data each client holds under --partition",
                  "fedrun.tools.partition"),
    "privacy": ("what differential privacy protects and costs, ahead of a run",
                "fedrun.tools.privacy"),
    "plot": ("draw perplexities and changes of weights from run folders", "fedrun.tools.plot"),
    "report": ("write one HTML page about all runs in a folder", "fedrun.tools.report"),
    "generate": ("continue a text with a run's model", "fedrun.tools.generate"),
    "evaluate": ("compute a run's loss and perplexity on any text", "fedrun.tools.evaluate"),
    "export": ("write a run's model for transformers or mamba_ssm", "fedrun.tools.export"),
}
# What people do first, each with a command to paste; every run has a folder of its own.
FIRST_STEPS = (
    ("Try it: four clients, a little model, text that needs no network; a minute.",
     "fedrun fed_avg --config tiny --dataset pydocs --tokenizer bpe:800 \\\n"
     "      --lr 4e-3 --rounds 60 --run_name try"),
    ("The same in parallel: a server and four workers, each with a GPU if there are.",
     "python -m fedrun.torchrun --nproc-per-node 5 -m fedrun fed_avg \\\n"
     "      --config tiny --dataset pydocs --tokenizer bpe:800 \\\n"
     "      --lr 4e-3 --rounds 60 --run_name parallel"),
    ("Train on text of your own: files, a folder, or a data set's name on the hub.",
     "fedrun fed_avg --config tiny --dataset 'notes/*.txt' --tokenizer bpe:800 \\\n"
     "      --lr 4e-3 --rounds 60 --run_name notes"),
    ("Continue a text with a run's model.",
     'fedrun generate try "The function returns" --temperature 0.8'),
    ("See what happened: one page about all runs in results/, with their curves.",
     "fedrun report"),
    ("Compare methods: a study tunes them, repeats them over seeds, makes a table.",
     "fedrun study configs/experiments/methods.yaml --dataset pydocs \\\n"
     "      --tokenizer bpe:4096 --dry_run"),
    ("From Python, in a script or a notebook: fedrun.train and fedrun.open_run.",
     'python -c "import fedrun; help(fedrun.train)"'))
# Headings of a method's help -> flags, in the order in which they are shown. The method's own
# flags come under its name.
GROUPS: dict[str, tuple[str, ...]] = {
    "model": ("config", "init_from"),
    "data": ("dataset", "tokenizer", "sequence_length", "text_column", "encoding",
             "row_separator", "validation_split", "val_fraction", "max_tokens", "stream",
             "sampling"),
    "federation": ("num_clients", "sites", "cohort", "local_updates", "local_updates_schedule",
                   "sync", "batches", "personal", "partition", "alpha", "size_skew"),
    "length of the training": ("rounds", "n_epochs", "epoch_passes"),
    "local training": ("lr", "lr_schedule", "warmup", "batch_size", "micro_batch",
                       "local_optimizer", "muon_momentum", "beta1", "beta2", "eps",
                       "moments_dtype", "weight_decay", "grad_clip", "prox_mu", "client_moments",
                       "moments_every", "seed"),
    "aggregation": ("weighting", "aggregation", "overlap", "client_clip", "secure_sum",
                    "site_holdout"),
    "differential privacy": ("dp", "dp_clip", "dp_noise", "dp_epsilon", "dp_delta",
                             "dp_colluding", "max_epsilon", "dp_dir"),
    "evaluation and records": ("val_freq", "eval_clients", "client_holdout", "save_client_deltas",
                               "keep", "track",
                               "data_dir", "run_name", "overwrite", "resume", "extend",
                               "checkpoint_freq"),
    "machine": ("device", "dtype", "checkpoint_activations", "threads", "deterministic", "server",
                "client_store", "offload", "cache_dir", "timeout")}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 1 failed, 2 if the user has to change
    something or a rank or server did not answer.

    Other exceptions are bugs and are raised, for their traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    print_log(quiet=detect(os.environ).local_rank > 0)
    site = None
    try:
        argv = load_plugins(argv)
        if argv and argv[0] in TOOLS:
            tool = importlib.import_module(TOOLS[argv[0]][1])
            return int(tool.main([with_underscores(a) for a in argv[1:]]))
        site, argv = take_private(argv, os.environ)
        config = parse(argv)
        if config is None:
            return 0
        from fedrun.run import run  # imports torch, so only after everything fast
        return run(config, site)
    except BrokenPipeError:  # the reader of our output has closed it: `fedrun ... | head`
        return 1
    except UnicodeEncodeError as error:  # from a library that accepts only UTF-8 paths
        complain(f"{shortened(visible(error.object), 200)}: this name cannot be used in this "
                 "locale; set LC_ALL=C.UTF-8, or rename the file")
        return 2
    except (InputError, ConnectionError, TimeoutError) as error:
        if isinstance(error, InputError):  # a rank or a hub that does not answer may do so later
            refuse()
        complain(one_line(error), waits=site is None or not site.name)
        return 2
    except Exception as error:
        if (line := explain(error)) is None:
            raise
        complain(line)
        return 1


def load_plugins(argv: Sequence[str]) -> list[str]:
    """Load what --plugin names, which may be the command itself. Returns the other arguments."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--plugin", action="append", default=[])
    named, rest = parser.parse_known_args(argv)
    for plugin in named.plugin:
        load_plugin(plugin)
    if shadowed := TOOLS.keys() & methods().keys():
        raise InputError(f"--plugin: {min(shadowed)} is a command of fedrun; give the "
                         "method another name")
    return rest


def complain(line: str, waits: bool = True) -> None:
    """Print the error that ends the command.

    Usually every rank hits the same error. Rank 0 prints it; the others sleep first, because a
    launcher kills all ranks as soon as one exits. A rank still alive after that prints its own
    error. waits: not at a site, whose owner sees only what this process prints.
    """
    if waits and detect(os.environ).rank:
        time.sleep(SECONDS_FOR_RANK_0)
    log(line, ERROR)


def parse(argv: Sequence[str]) -> RunConfig | None:
    """The config for a command line; None if it only asked for information, which was printed."""
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return None
    if argv[0] == "--version":
        print(f"fedrun {__version__}")
        return None
    method = argv[0].replace("-", "_")
    if method not in methods():
        known = [*methods(), *TOOLS]
        raise InputError(f"unknown command {argv[0]!r}{closest(method, known)}; "
                         f"must be one of {', '.join(known)} (a method of your own needs "
                         "--plugin FILE)")
    flags = vars(method_parser(method).parse_args([with_underscores(a) for a in argv[1:]]))
    print_config, print_run_dir = flags.pop("print_config"), flags.pop("print_run_dir")
    given = {k: v for k, v in flags.items() if v is not None}
    refuse_unread(method, given)
    config = resolve(method, given)
    if print_run_dir:
        print(config.run_dir)
        return None
    if print_config:
        import yaml
        print(yaml.safe_dump(config.to_dict(), sort_keys=False), end="")
        return None
    return config


def method_parser(method: str) -> argparse.ArgumentParser:
    """A parser for the flags of one method, with help and defaults."""
    parser = Parser(prog=f"fedrun {method}", description=methods()[method], allow_abbrev=False,
                     formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30,
                                                                         width=100))
    known, unread = method_flags(method), NEVER_READ.get(method, {})
    shown = {name: flag for name, flag in known.items() if name not in unread}
    for heading, names in GROUPS.items():
        if group := {name: shown.pop(name) for name in names if name in shown}:
            add_flags(parser.add_argument_group(heading), group)
    add_flags(parser.add_argument_group(f"the method {method}"), shown)
    add_flags(parser, {name: known[name] for name in unread}, hidden=True)
    if "sites" in known:
        private = parser.add_argument_group("with --sites, at this site alone")
        for flag, text in PRIVATE.items():  # taken off before: no setting of the run
            private.add_argument(f"--{flag}", metavar="TEXT", help=f"{text} (or "
                                 f"FEDRUN_{flag.upper()})")
    others = parser.add_argument_group("other")
    others.add_argument("--plugin", metavar="FILE|MODULE",
                        help="A Python file or module with a method of your own; it is run. May be "
                             "given several times.")
    others.add_argument("--print_config", action="store_true",
                        help="Print the resolved settings as YAML and exit.")
    others.add_argument("--print_run_dir", action="store_true",
                        help="Print the path of the run's folder and exit (for launch scripts).")
    return parser


def overview() -> str:
    """What `fedrun --help` prints: what people do first, then the commands. Fits 80 columns."""
    steps = "\n".join(f"{why}\n  {command}" for why, command in FIRST_STEPS)
    return (f"fedrun {__version__}: federated training of Mamba-2 language models\n\n"
            f"usage: fedrun COMMAND [--flag value ...]\n\n{steps}\n\n"
            f"Train:\n{_listed(methods())}\n\n"
            f"Other commands:\n{_listed({name: text for name, (text, _) in TOOLS.items()})}\n\n"
            "`fedrun COMMAND --help` explains the flags of a command.")


def _listed(commands: Mapping[str, str]) -> str:
    width = 1 + max(map(len, commands))
    return "\n".join(textwrap.fill(text, 80, initial_indent=f"  {name:<{width}}",
                                   subsequent_indent=" " * (width + 2))
                     for name, text in commands.items())
