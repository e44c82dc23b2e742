"""What a run with --dp client tells about its clients, and to whom: a page in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from fedrun.common.files import write_atomic
from fedrun.records.run_files import PRIVACY

LITTLE = 10.0
"""From this epsilon on a guarantee says next to nothing: what is 1 in 10,000 may become 2 in 3."""


class ClientGuarantee(NamedTuple):
    """What the page is made of."""

    clients: int
    cohort: int
    rounds: int
    participations: int
    """Most rounds that one client trains in."""
    clip: float
    noise: float
    """Noise multiplier."""
    delta: float
    spent: float
    """Epsilon before the first round of this start."""
    planned: float
    """Epsilon after the last round, --max_epsilon at most unless more is spent already."""
    on_text: float
    """Epsilon of all runs on this text before this start, by the log."""
    noised: str = "the workers, who are trusted with all text"
    """By whom."""

    @property
    def cost(self) -> str:
        """The planned epsilon in words."""
        return f"epsilon {self.planned:.3g} at delta {self.delta:g}"

    @property
    def line(self) -> str:
        """What is printed when the run starts."""
        return (f"privacy: unit a client, its part of each sum against zero; clip {self.clip:g}, "
                f"noise multiplier {self.noise:.4g}, {self.participations} participations, planned "
                f"{self.cost}; noise added by {self.noised}")

    @property
    def warning(self) -> str:
        """Why that is no protection; empty if it may be one."""
        if self.planned <= LITTLE:
            return ""
        return (f"--dp client: {self.cost} is no protection to speak of: more noise, more clients "
                "or fewer rounds make it less (`fedrun privacy` shows what)")


def write_client_privacy(run_dir: Path, guarantee: ClientGuarantee) -> None:
    """Write the page into a run's folder."""
    write_atomic(run_dir / PRIVACY, page(guarantee).encode())


def page(g: ClientGuarantee) -> str:
    """The page's text, Markdown."""
    weak = f"\n**{g.warning}**\n" if g.warning else ""
    return f"""\
# What this run tells about its clients, and to whom
{weak}
**The guarantee.** Differential privacy of a client: {g.cost} over all
{g.rounds} rounds, as planned. What was spent by then is `epsilon` in every line of `events.jsonl`
and every record of `training_history.json`; `null` there is infinite: nothing is guaranteed.
Whoever has the global models of all rounds, the history and the events can hardly tell whether a
client's updates were in the sums or zeros in their place: the odds change by a factor of at most
e^epsilon, but for a probability of delta.

| | |
|---|---|
| unit | a client, with all its text, in all its rounds |
| neighbours | a client's terms replaced by zeros; replaced by others, sums move twice as far |
| clients, in a round | {g.clients}, {g.cohort} |
| rounds of one client | {g.participations} at most, of {g.rounds}, by a public schedule |
| clip | {g.clip:g}, the L2 norm of an update over all parameters |
| noise multiplier | {g.noise:.6g} times what a client can move a sum by |
| weights, denominator | 1/{g.cohort} each, whoever is missing or not finite: counted as zero |
| spent before this start | epsilon {g.spent:.3g} by this run |
| by all runs with `--dp client` on just this text, dealt alike | epsilon {g.on_text:.3g} |

**Who adds the noise, who sees what is without it.** The workers add a discrete Gaussian to the
integers of the sum, before any of them reads it. Workers, the machines they run on and the network
between them are trusted: they see the text, updates without clip or noise, or the noise itself. The
noise comes from a secret in `--dp_dir`, never from `--seed`; whoever has that secret can subtract
the noise. A log in the same folder holds what was released. A round that is repeated after a kill
has the same noise and costs nothing; if anything of it has changed, it has fresh noise and is
charged again.

**What else is released.** Who trains in which round, how many clients there are and how many
sequences each has; settings; how long each process took. Losses, perplexity and sample texts of the
global model on the validation split, which is nobody's text in this sense and not protected, even
where it was taken from the clients' sources; `--keep best` chooses by it. Of clients nothing is
written: no losses, norms, weights or counts, nor whose update was not finite.

**Not covered.** A text that several clients hold: of its owner all of them would have to be the
unit. What the model that the run started from (`--init_from`) had learnt from the same text. What
the tokenizer tells, if it was trained on the clients' text (`--tokenizer bpe:N`), and the digests
and sizes of the text in `config.json`, `environment.json` and checkpoints, by which a guessed text
can be recognised. Settings that were chosen by looking at earlier runs on the same text: each run
costs, and costs add up. The checkpoints in this folder, and `clients/` in it, which hold clients'
AdamW moments unless `--client_moments reset`: give away models, not these. That a run has ended by
an error. Updates that are wrong on purpose: one client moves the model by its clip at most, and
noise stops nobody.
"""
