"""`fedrun plan METHOD ...`: memory, time, traffic and disk of a run, before it is started.

    fedrun plan fed_avg --config mamba2_1_3b --num_clients 8 --processes 9 --device_rates h100

Takes the flags of the run; starts nothing, writes nothing, and reads a text only where it is
tokenised already.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from fedrun.common.errors import InputError, require
from fedrun.common.log import WARNING, log
from fedrun.common.terminal import say
from fedrun.config import FederatedConfig, RunConfig
from fedrun.data.sites import Site, take_private
from fedrun.flags import Parser, add_flags, closest, flags_of, method_flags, methods, resolve
from fedrun.tools.plan_machine import Machine
from fedrun.unused import idle, refuse_unread

if TYPE_CHECKING:
    from fedrun.model.pretrained import Pretrained

ABOUT = """\
What a run takes, computed before anything is started: the bytes of each process by
item, arithmetic and seconds, what workers send, the files that are left. Give the
command of the run with `plan` before the method, and how many processes it will have:

    fedrun plan fed_avg --config mamba2_1_3b --num_clients 8 --processes 9 \\
        --device_rates h100

Sizes come from the run's own code, on tensors without memory. Seconds come from a
short step on this machine, or with --device_rates from published rates."""


def main(argv: Sequence[str]) -> int:
    """Print the plan of a run."""
    asked = parse(argv)
    if asked is None:
        return 0
    from fedrun.tools.plan_report import report
    for line in idle(asked.config).values():
        log(line, WARNING)
    for line in report(*asked):
        say(line)
    return 0


class Asked(NamedTuple):
    """What is to be planned."""

    config: RunConfig
    machine: Machine
    site: Site | None
    """What --site_data and the like say."""
    pretrained: Pretrained | None
    """The model of --init_from, of which the header is read alone."""


def parse(argv: Sequence[str]) -> Asked | None:
    """The run that is planned, and where it will be; None if only help was asked for."""
    own = flags_of(Machine)
    site, argv = take_private(argv, os.environ)
    if not argv or argv[0] in ("-h", "--help"):
        parser = Parser(prog="fedrun plan METHOD", description=ABOUT, allow_abbrev=False,
                        formatter_class=argparse.RawDescriptionHelpFormatter,
                        epilog="and the flags of METHOD: `fedrun METHOD --help` explains them")
        add_flags(parser, own)
        parser.print_help()
        return None
    method = argv[0].replace("-", "_")
    if method not in methods():
        raise InputError(f"fedrun plan {argv[0]}: must be central or a federated method"
                         f"{closest(method, methods())}: {', '.join(methods())}")
    known = method_flags(method)
    parser = Parser(prog=f"fedrun plan {method}", description=ABOUT, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser.add_argument_group("where the run will be"), own)
    add_flags(parser.add_argument_group(f"flags of {method}"), known)
    given = {k: v for k, v in vars(parser.parse_args(argv[1:])).items() if v is not None}
    machine = Machine(**{name: own[name].parse(given.pop(name), f"--{name} ")
                         for name in [*given] if name in own})
    refuse_unread(method, given)
    config, pretrained = resolve(method, given), None
    refuse(config, machine)
    if config.init_from is not None:
        from fedrun.experiment import with_pretrained
        from fedrun.model.pretrained import find_pretrained
        pretrained = find_pretrained(config.init_from, "--init_from", config.cache_dir,
                                     downloads=False)
        config = with_pretrained(config, pretrained)
    return Asked(config, machine, site, pretrained)


def refuse(config: RunConfig, machine: Machine) -> None:
    """Raise InputError for runs that cannot be planned."""
    require(isinstance(config, FederatedConfig) or machine.processes == 1, "--processes",
            machine.processes, "1 for central")
    require(machine.device_rates is None or config.device != "cpu", "--device", config.device,
            f"auto or cuda with --device_rates {machine.device_rates}")
