"""What a run with --dp example tells about single sequences, and to whom: a page in its folder, or
between sites two parts of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from fedrun.common.files import write_atomic
from fedrun.records.client_privacy import LITTLE
from fedrun.records.run_files import PRIVACY

EXAMPLE_CLAIM = """\
**Who learns what, with `--sites`, `--site_dir`, `--secure_sum` and `--dp example`.** Every site and
the server learn the weighted sum of all sites' updates in each round (of the optimizer's moments
too if clients average them), which are made of gradients with noise, and so every global model;
sums over a round's clients of weights, and of norms of updates and noised gradients and their
squares, and how many clients were left out, by reason; with `--aggregation int8` also, for each 256
parameters, how many clients clipped and how many came near it; how many sequences each client has
and when it is drawn; which rounds each site's log has charged; how long each process took, and when
a site was there. Losses of clients leave no site, not even in a sum. Those who put together what
they know learn these sums over the others, and nothing else of them. Nobody else learns more than
the size and time of what is sent.

**Under these assumptions.** Everybody follows the protocol. Of the sites whose clients are in a
sum, at least two do not share what they know with the adversary, or updates are not hidden in a
sum, and the guarantee below is all that protects them. The keys in the file of the sites are
theirs, compared by another way. AES-256, ChaCha20, X25519, HKDF-SHA256 and Ed25519 do what they are
made for. Nobody else reads a site's memory, swap or folder, and each site keeps its journal, the
secret of its noise and the log beside it.

**Not covered.** A site with nearly all the weight, which is nearly the sum. Updates that are wrong
on purpose. A server that does not follow the protocol: it can stop a run and spoil its model. A
stranger in the tunnel who only connects gets neither plan nor model, but can stop a run; one who
can change what others send gets both. That a run has ended by an error, and at which site. Without
`--secure_sum` the server's machine, which forwards everything, can read every update. One user's
processes on one machine hide nothing from that user: that is a demonstration.
"""

DOCUMENTS = """\
**A document is more than a sequence.** One that was cut into k sequences is protected k times less:
its epsilon is k times as much, and its delta more than k times. The same holds for a passage that
occurs in k sequences, and for all that a person wrote: no client is protected as a whole.
"""

REPEATED = """\
a round that is repeated after a kill has the same noise and costs nothing, and one of which
anything has changed has another and is charged again, as is one that is repeated on GPUs without
`--deterministic`."""

TIMES = """\
How long steps took: the more sequences, the longer, and the accounting takes their number to be
secret. Whoever knows it of every step can tell somewhat more than epsilon says."""

BY_SITES = "the workers of each site, who are trusted with its text"
"""Who adds the noise, for the line at the start of a run between sites."""


class ExampleGuarantee(NamedTuple):
    """What the page is made of."""

    clients: int
    cohort: int
    rounds: int
    steps: int
    """Most local steps that one client makes in the run."""
    batch_size: int
    smallest: int
    """Sequences of the smallest shard."""
    largest: int
    length: int
    """Tokens of a sequence."""
    clip: float
    noise: float
    """Noise multiplier."""
    delta: float
    spent: float
    """Epsilon before the first round of this start."""
    planned: float
    """Epsilon after the last round, --max_epsilon at most."""
    on_text: float
    """Epsilon of all runs on this text before this start, by the log."""
    noised: str = "the workers, who are trusted with all text"
    """By whom."""

    @property
    def cost(self) -> str:
        """The planned epsilon in words."""
        return f"epsilon {self.planned:.3g} at delta {self.delta:g}"

    @property
    def rate(self) -> str:
        """How likely it is that a sequence is in a step."""
        low, high = (self.batch_size / size for size in (self.largest, self.smallest))
        return f"{high:.4g}" if low == high else f"{low:.4g} to {high:.4g}"

    @property
    def line(self) -> str:
        """What is printed when the run starts."""
        return (f"privacy: unit a sequence of {self.length} tokens, its gradients against zeros; "
                f"clip {self.clip:g}, noise multiplier {self.noise:.4g}, {self.steps} steps of a "
                f"client on samples at rate {self.rate}, planned {self.cost}; noise added by "
                f"{self.noised}")

    @property
    def warning(self) -> str:
        """Why that is no protection; empty if it may be one."""
        if self.planned <= LITTLE:
            return ""
        return (f"--dp example: {self.cost} is no protection to speak of: more noise, larger "
                "shards or fewer steps make it less (`fedrun privacy --unit example` shows what)")


def write_example_privacy(run_dir: Path, guarantee: ExampleGuarantee) -> None:
    """Write the page into a run's folder."""
    write_atomic(run_dir / PRIVACY, page(guarantee).encode())


def page(g: ExampleGuarantee) -> str:
    """The page's text, Markdown."""
    return f"""\
# What this run tells about single sequences, and to whom
{_guarantee(g)}
| by all runs with `--dp example` on just this text, dealt alike | epsilon {g.on_text:.3g} |

{DOCUMENTS}
**Who adds the noise, who sees what is without it.** The worker that trains a client adds a discrete
Gaussian to the integers of each step's sum, before the optimizer sees it. Workers, the machines
they run on and the network between them are trusted: they see the text, gradients without noise, or
which sequences were in which step. Samples and noise come from a secret in `--dp_dir`, never from
`--seed`; whoever has that secret can subtract the noise. A log beside it holds what was released:
{REPEATED}

**What else is released.** Who trains in which round, how many sequences each client has; settings;
how long each process took. Clients' weights, norms of their updates and of their noised gradients,
with `--eval_clients` the validation losses of their models, and whether one was left out, which are
made of noised gradients alone. Losses, perplexity and sample texts on the validation split, which
is nobody's text in this sense and not protected, even where it was taken from the clients' sources;
`--keep best` chooses by it. Losses of training are not written.

**Not covered.** {TIMES} What the model that the run started from (`--init_from`) had learnt from
the same text. What the tokenizer tells, if it was trained on the clients' text (`--tokenizer
bpe:N`), and the digests and sizes of the text in `config.json`, `environment.json` and checkpoints,
by which a guessed text can be recognised. Settings that were chosen by looking at earlier runs on
the same text: each run costs, and costs add up. What a round that never ended left on the disk.
That a run has ended by an error.
"""


def part(g: ExampleGuarantee) -> str:
    """Of a run between sites, after EXAMPLE_CLAIM: the second part of its page, Markdown."""
    return f"""\
## Differential privacy of a sequence
{_guarantee(g)}
| by all runs with `--dp example` on a site's text | in the log of that site |

{DOCUMENTS}
**Who adds the noise, who sees what is without it.** The worker that trains a client adds a discrete
Gaussian to the integers of each step's sum, before the optimizer sees it. A site's workers are
trusted with its text, gradients without noise, and which sequences were in which step, and nobody
else is: the guarantee needs no masks, and holds if all others put together what they know. A server
that has clients train more often than was planned makes it cost more, by the site's own log, which
`--max_epsilon` is kept by. Samples and noise come from a secret in the site's folder, never from
`--seed`; whoever has that secret can subtract the noise. The log beside it holds what was released:
{REPEATED} A simulation draws all from one secret in
`--dp_dir`, by the same law; its bits are not those of sites, whose secrets are others.

**What else is released.** Settings. Losses, perplexity and sample texts of the global model on the
server's own validation text, which is not protected; `--keep best` chooses by it.

**Not covered either.** {TIMES} What the model that the run started from (`--init_from`) had learnt
from the same text. Settings that were chosen by looking at earlier runs on the same text: each run
costs, and costs add up. What a round that never ended left on a site's disk.
"""


def _guarantee(g: ExampleGuarantee) -> str:
    """What holds, in words and numbers; the table's last row is left to the caller."""
    weak = f"\n**{g.warning}**\n" if g.warning else ""
    return f"""{weak}
**The guarantee.** Differential privacy of a sequence of {g.length} tokens: {g.cost} over all
{g.rounds} rounds, as planned, for the sequences that cost most, of any client. What was spent by
then is `epsilon` in the lines of evaluated rounds in `events.jsonl` and in every record of
`training_history.json`; `null` there is infinite: nothing is guaranteed. Whoever has the global
models of all rounds, the updates and moments of all clients, the history and the events, but for
the times in them, can hardly tell whether a sequence's gradients were in the sums or zeros in their
place: the odds change by a factor of at most e^epsilon, but for a probability of delta.

| | |
|---|---|
| unit | one sequence of {g.length} tokens of a client's text |
| neighbours | a sequence's gradients replaced by zeros, in all steps |
| clients, in a round | {g.clients}, {g.cohort} |
| sequences of a client | {g.smallest} to {g.largest} |
| steps of a client | {g.steps} at most, in {g.rounds} rounds by a public schedule |
| rate | {g.rate}: each sequence is in a step by itself, drawn from a secret stream |
| clip | {g.clip:g}, the L2 norm of a sequence's gradient over all parameters |
| noise multiplier | {g.noise:.6g} times what a sequence can move a step's sum by |
| denominator | {g.batch_size}, however many are drawn; a gradient that is not finite is zero |
| spent before this start | epsilon {g.spent:.3g} by this run |"""
