"""`fedrun privacy ...`: what differential privacy protects and costs, ahead of a run.

    fedrun privacy --clients 1000 --participations 12 --noise 2.08
    fedrun privacy --unit example --rate 0.01 --steps 1000 --epsilon 8 --sequences 20000
"""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from fedrun.common.errors import InputError, require
from fedrun.common.terminal import say
from fedrun.flags import Parser, add_flags, flags_of
from fedrun.privacy.accountant import (
    UNPROTECTED,
    example_epsilon,
    example_noise_for,
    gaussian_epsilon,
    noise_for,
    zcdp_epsilon,
)

if TYPE_CHECKING:
    from rich.table import Table

ABOUT = """\
What differential privacy protects and costs, computed before anything is trained.

In every round each client's update is shortened to a length, the clip, and noise
is added to the sum of all of them. The noise multiplier says how much: 2 is noise
of twice what one client can change. Epsilon says what that is worth: whatever is
concluded from the models, the odds that one client took part change by a factor
of e^epsilon at most, but for a chance of about delta. 1 is strong, 8 is common,
and above 10 nothing is protected. More rounds cost more epsilon, more noise costs
accuracy, and only more clients in a round help against that."""
MOST = 1_000_000_000
PARAMETERS = (500_000, 3_000_000, 27_000_000)


@dataclass(frozen=True)
class Question:
    """What is asked for. InputError, naming the flag, for what has no answer."""

    unit: Literal["client", "example"] = "client"
    """What is protected: all text of a client (client), or one sequence of its text (example),
    which is less: a document has several. With example each client adds noise to its own gradients
    (DP-SGD), and all of this is asked for one site."""
    clients: int | None = None
    """Clients of the run, with --unit client."""
    participations: int | None = None
    """Rounds that each client trains in, with --unit client: rounds x cohort / clients."""
    noise: float | None = None
    """Noise multiplier: standard deviation of the noise over the clip. This or --epsilon."""
    epsilon: float | None = None
    """What the whole run may cost: the noise multiplier for it is computed."""
    delta: float = 1e-5
    """Chance that the promise fails. Below 1 / clients: at 1 / clients publishing all that one
    client has would be allowed."""
    cohort: int | None = None
    """Clients that train in a round, with --unit client. none: several, to compare."""
    rate: float | None = None
    """Chance of each sequence to be in a step, with --unit example: batch size / sequences."""
    steps: int | None = None
    """Optimizer steps at one client, in all its rounds together, with --unit example."""
    sequences: int | None = None
    """Sequences of the client, with --unit example, for the table of noise against learning."""
    parameters: int | None = None
    """Parameters of the model. none: several, to compare."""

    def __post_init__(self) -> None:
        needed = {"client": ("clients", "participations"), "example": ("rate", "steps")}[self.unit]
        idle = {"client": ("rate", "steps", "sequences"),
                "example": ("clients", "participations", "cohort")}[self.unit]
        for name in idle:
            value = getattr(self, name)
            require(value is None, f"--{name}", value, f"left out with --unit {self.unit}")
        for name in needed:
            if getattr(self, name) is None:
                raise InputError(f"fedrun privacy: --unit {self.unit} needs --{name}")
        if (self.noise is None) == (self.epsilon is None):
            raise InputError("fedrun privacy: needs --noise or --epsilon, one of them")
        for name in ("clients", "participations", "cohort", "steps", "sequences", "parameters"):
            value = getattr(self, name)
            require(value is None or 1 <= value <= MOST, f"--{name}", value, f"1 to {MOST:,}")
        for name, low in (("noise", 1e-3), ("epsilon", 1e-3)):
            value = getattr(self, name)
            require(value is None or low <= value <= 1e6, f"--{name}", value, f"{low} to 1,000,000")
        require(self.rate is None or 0 < self.rate <= 1, "--rate", self.rate, "> 0 and <= 1")
        units, counted = (self.clients, "clients") if self.unit == "client" else (
            self.sequences, "sequences")
        require(0 < self.delta < 1 / (units or 1), "--delta", self.delta,
                f"> 0 and < 1 / {counted} = {1 / units:g}" if units else "> 0 and < 1")
        require(self.cohort is None or self.clients is None or self.clients % self.cohort == 0,
                "--cohort", self.cohort, f"a divisor of --clients {self.clients}, so that all "
                "clients train equally often")

    @property
    def times(self) -> int:
        """How many releases each unit is in, or may be drawn for."""
        return self.participations or self.steps or 0

    def cost(self, noise: float, times: int) -> float:
        """Epsilon of this many releases with this noise multiplier."""
        if self.rate is None:
            return gaussian_epsilon(math.sqrt(times) / noise, self.delta)
        return example_epsilon(noise, self.rate, times, self.delta)

    def needed_noise(self) -> float:
        """The noise multiplier that is given, or that keeps the epsilon that is given."""
        if self.noise is not None or self.epsilon is None:
            return self.noise or 0.0
        if self.rate is None:
            return noise_for(self.epsilon, self.delta, self.times)
        return example_noise_for(self.epsilon, self.delta, self.rate, self.times)


def main(argv: Sequence[str]) -> int:
    """Print what it is worth, the trade around it, and what the noise leaves to learn."""
    parser = Parser(prog="fedrun privacy", description=ABOUT, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    known = flags_of(Question)
    add_flags(parser, known)
    given = vars(parser.parse_args(argv))
    question = Question(**{name: known[name].parse(given[name], f"--{name} ")
                           for name in (f.name for f in fields(Question))
                           if given[name] is not None})
    noise = question.needed_noise()
    from rich.console import Console
    console = Console(markup=False, emoji=False, highlight=False)
    say(worth(question, noise))
    say(f"\nepsilon at delta {question.delta:g}; no: more than {UNPROTECTED:g}, which protects "
        "nobody")
    console.print(trade(question, noise))
    if question.unit == "example" and question.sequences is None:
        say("\nWith --sequences: also what the noise leaves to learn.")
        return 0
    each = "round" if question.unit == "client" else "step"
    say(f"\nnoise over the longest possible update (lengths), in one {each} and in all")
    console.print(drowning(question, noise))
    say("drowned: the noise moves the model further than all updates together could, if\n"
        "each were as long as the clip and all agreed; theirs are shorter, and do not.")
    return 0


def worth(question: Question, noise: float) -> str:
    """What the run is worth, in sentences, and compared with what."""
    epsilon = question.cost(noise, question.times)
    client = question.unit == "client"
    who = "client" if client else "sequence"
    how = (f"{question.times:,} rounds for each client" if client else
           f"{question.times:,} steps with {question.rate:g} of the sequences in each")
    first = (f"epsilon {shown(epsilon)} at delta {question.delta:g}: noise multiplier {noise:.4g}, "
             f"{how}.")
    if epsilon > UNPROTECTED:
        first += (f" That is more than {UNPROTECTED:g}: no protection. It takes more noise or "
                  f"fewer {'rounds' if client else 'steps'}.")
    else:
        first += (f" The odds that one {who} took part change by a factor of "
                  f"{math.ceil(math.exp(epsilon)):,} at most, but for a chance of about "
                  f"{question.delta:g}.")
    if client:
        replaced = gaussian_epsilon(2 * math.sqrt(question.times) / noise, question.delta)
        shares = zcdp_epsilon(question.times / noise ** 2 / 2, question.delta)
        second = ("Compared are runs with a client's updates and without them; between two texts "
                  f"of the client epsilon is {shown(replaced)}. With --secure_sum, where every "
                  f"site adds a share of the noise, it is {shown(shares)}.")
    else:
        second = "A sequence is not a document: whoever wrote several is protected less."
    return f"{textwrap.fill(first, 80)}\n{textwrap.fill(second, 80)}"


def trade(question: Question, noise: float) -> Table:
    """A table of epsilon: noise multipliers down, participations or steps across."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    client = question.unit == "client"
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("noise multiplier", justify="right")
    across = sorted({max(1, question.times // 2), question.times, 2 * question.times})
    for times in across:
        table.add_column(f"{times:,} {'rounds' if client else 'steps'}", justify="right")
    root = math.sqrt(2)
    for factor in (1 / 2, 1 / root, 1, root, 2) if client else (1 / root, 1, root):
        spent = [question.cost(noise * factor, times) for times in across]
        table.add_row(f"{noise * factor:.4g}", *(
            f"{shown(epsilon)} no" if epsilon > UNPROTECTED else shown(epsilon)
            for epsilon in spent))
    return table


def drowning(question: Question, noise: float) -> Table:
    """A table of noise against learning: cohorts down, sizes of models across.

    The mean of K updates has noise of standard deviation noise x clip / K in each of D elements,
    of length noise x clip x sqrt(D) / K together, and the mean itself is clip long at most. Over R
    rounds the mean grows with R at most, the noise with sqrt(R).
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    client = question.unit == "client"
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("cohort" if client else "batch", justify="right")
    table.add_column("rounds" if client else "steps", justify="right")
    sizes = [question.parameters] if question.parameters else list(PARAMETERS)
    for size in sizes:
        table.add_column(f"{size:,} parameters" if size == sizes[0] else f"{size:,}",
                         justify="right")
    for together, rounds in batches(question):
        in_one = [noise * math.sqrt(size) / together for size in sizes]
        in_all = [ratio / math.sqrt(rounds) for ratio in in_one]
        table.add_row(f"{together:,.6g}", f"{rounds:,}", *(
            f"{two_digits(one)}, {two_digits(all_)}{' drowned' if all_ > 1 else ''}"
            for one, all_ in zip(in_one, in_all, strict=True)))
    return table


def batches(question: Question) -> list[tuple[float, int]]:
    """How many units are summed at a time, and how often, for each row."""
    if question.rate is not None and question.sequences is not None:
        return [(question.rate * question.sequences, question.times)]
    clients = question.clients or 1
    if question.cohort is not None:
        cohorts = [question.cohort]
    else:  # the divisors of the number of clients that are nearest to its tenth, hundredth, ...
        low = [n for n in range(1, math.isqrt(clients) + 1) if clients % n == 0]
        divisors = {*low, *(clients // n for n in low)}

        def nearest(wanted: float) -> Callable[[int], float]:
            return lambda divisor: abs(math.log(divisor / wanted))

        cohorts = sorted({min(divisors, key=nearest(clients / 10 ** power)) for power in range(4)
                          if clients >= 2 * 10 ** power or power == 0})
    return [(cohort, question.times * clients // cohort) for cohort in cohorts]


def shown(epsilon: float) -> str:
    """An epsilon, rounded to more: 8.0 is not said of 8.04."""
    if not math.isfinite(epsilon):
        return "inf"
    if epsilon >= 100:
        return f"{math.ceil(epsilon):,}"
    digits = 1 if epsilon >= 1 or epsilon == 0 else 1 - math.floor(math.log10(epsilon))
    return f"{math.ceil(epsilon * 10 ** digits - 1e-6) / 10 ** digits:.{digits}f}"


def two_digits(ratio: float) -> str:
    """A ratio with two digits, and no power of ten."""
    digits = max(0, 1 - math.floor(math.log10(ratio)))
    return f"{ratio:,.{digits}f}"
