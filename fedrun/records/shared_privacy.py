"""What a run between sites with --dp client tells about their clients, and to whom: two parts of
the page in its folder. The first holds for any such run, the second has this one's numbers.
"""

from __future__ import annotations

from pathlib import Path

from fedrun.common.files import read_regular, write_atomic
from fedrun.records.client_privacy import ClientGuarantee
from fedrun.records.run_files import PRIVACY

SHARED_CLAIM = """\
**Who learns what, with `--sites`, `--site_dir`, `--secure_sum` and `--dp client`.** Every site and
the server learn, of each round, the mean of the clients' clipped updates with noise of which every
site has added a share, and so every global model; how many sequences each client has and when it is
drawn; which rounds each site's log has charged; how long each process took, and when a site was
there. Losses, norms and counts of clients, and whose update was not finite, leave no site, not even
in a sum. Those who put together what they know can take off their own updates and shares, and learn
the sum over the others with the shares of the others. Nobody else learns more than the size and
time of what is sent.

**Under these assumptions.** Everybody follows the protocol. No more sites than the guarantee below
names put together what they know with each other and the server; a client's own site is none of
them. The keys in the file of the sites are theirs, compared by another way. AES-256, ChaCha20,
X25519, HKDF-SHA256 and Ed25519 do what they are made for. Nobody else reads a site's memory, swap
or folder, and each site keeps its journal, the secret of its noise and the log beside it.

**Not covered.** More sites that share what they know: down to one that does not, its term is hidden
by its own share alone. Updates that are wrong on purpose: one client moves the model by its clip at
most, one site by as much as it likes. A server that does not follow the protocol: it can stop a run
and spoil its model. A stranger in the tunnel who only connects gets neither plan nor model, but can
stop a run; one who can change what others send gets both. That a run has ended by an error, and at
which site. One user's processes on one machine hide nothing from that user: that is a
demonstration.
"""


PART = "\n## Differential privacy"
"""What the second part of the page begins with."""


def add_part(run_dir: Path, numbers: str) -> None:
    """Add this run's numbers, a part of Markdown, to the page in its folder, of which
    `write_privacy` has written the rest; in place of those of an earlier start."""
    assert f"\n{numbers}".startswith(PART)
    before = read_regular(run_dir / PRIVACY).decode().partition(PART)[0]
    write_atomic(run_dir / PRIVACY, f"{before}\n{numbers}".encode())


def noised_by(sites: int, colluding: int) -> str:
    """Who adds the noise, for the line at the start of a run."""
    return (f"each of {sites} sites, a share before its mask: enough against the server and "
            f"{_those(colluding)}")


def _those(colluding: int) -> str:
    return f"any {colluding + 1} sites together" if colluding else "any one site"


def part(g: ClientGuarantee, sites: int, colluding: int) -> str:
    """The second part, Markdown. sites: how many; colluding: --dp_colluding."""
    weak = f"\n**{g.warning}**\n" if g.warning else ""
    return f"""\
## Differential privacy of a client
{weak}
**The guarantee.** {g.cost.capitalize()} over all {g.rounds} rounds, as planned, against the server
and {_those(colluding)}. What was spent by then is `epsilon` in every line
of `events.jsonl` and every record of `training_history.json`; `null` there is infinite: nothing is
guaranteed. Whoever has the global models of all rounds, the history and the events, and all that
those sites know, can hardly tell whether another site's client had its updates in the sums or zeros
in their place: the odds change by a factor of at most e^epsilon, but for a probability of delta.

| | |
|---|---|
| unit | a client, with all its text, in all its rounds |
| neighbours | a client's terms replaced by zeros; replaced by others, sums move twice as far |
| clients, in a round | {g.clients}, {g.cohort}, of three sites at least |
| rounds of one client | {g.participations} at most, of {g.rounds}, by a public schedule |
| clip | {g.clip:g}, the L2 norm of an update over all parameters |
| who adds noise | each of {sites} sites a share, in every round, before its mask |
| shares that are counted on | {sites - 1 - colluding}: all but those of {colluding + 1} sites |
| noise multiplier | of these {g.noise:.6g} times what a client can move a sum by |
| accounting | sums of discrete Gaussians (Kairouz et al. 2021), zero-concentrated, converted |
| weights, denominator | 1/{g.cohort} each, whoever is missing or not finite: counted as zero |
| spent before this start | epsilon {g.spent:.3g} by this run |
| the same by all runs on a site's text | in the log of that site |

**The noise** is of integers, from a secret in each site's folder, never from `--seed`. It is bound
to the terms of all sites: a round that is repeated after a kill has the same noise and costs
nothing; if anything has changed at any site, all draw afresh and all are charged. Whoever has a
site's secret can take its share off. A simulation draws all shares from one secret in `--dp_dir`,
by the same law; its bits are not those of sites, whose secrets are others.

**What else is released.** Settings. Losses, perplexity and sample texts of the global model on the
server's own validation text, which is not protected; `--keep best` chooses by it. Clients' AdamW
moments stay at their sites.

**Not covered either.** A text that several clients hold: of its owner all of them would have to be
the unit. What the model that the run started from (`--init_from`) had learnt from the same text.
Settings that were chosen by looking at earlier runs on the same text: each run costs, and costs add
up.
"""
