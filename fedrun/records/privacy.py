"""What a run between sites shows of their text, and to whom: a page in its folder.

The README has CLAIM word for word.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from fedrun.common.files import DamagedFile, read_regular, write_atomic
from fedrun.records.example_privacy import EXAMPLE_CLAIM
from fedrun.records.run_files import PRIVACY
from fedrun.records.shared_privacy import PART, SHARED_CLAIM
from fedrun.secure import fewest_sites

if TYPE_CHECKING:
    from fedrun.config import FederatedConfig

CLAIM = """\
**Who learns what, with `--sites`, `--site_dir` and `--secure_sum`.** Every site and the server
learn the weighted sum of all sites' updates in each round (of the optimizer's moments too if
clients average them, or of their size in each row; with `fed_fisher` of Fisher information, with
`fed_sgd` of gradients), and so every global model; sums over a round's clients of losses, tokens
and weights, and of norms and their squares, how many were left out, by reason; with
`--site_holdout` the loss on what all sites hold out; with `--aggregation int8`, for each 256
parameters, how many clients clipped, how many came near it, and of averaged moments the mean of
clients' largest; how many sequences each client has and when it is drawn; how long each process
took, and when a site was there. Those who put together what they know learn these sums over the
others, and nothing else of them. Nobody else learns more than the size and time of what is sent.

**Under these assumptions.** Everybody follows the protocol. Of the sites whose clients are in a
sum, at least two do not share what they know with the adversary. The keys in the file of the sites
are theirs, compared by another way. AES-256, X25519, HKDF-SHA256 and Ed25519 do what they are made
for. Nobody else reads a site's memory, swap or folder, and each site keeps its journal.

**Not covered.** What sums show. A sum of few sites can tell much of one: the sums of norms and
squares give each client's norm if there are few, sums after one local update would give the signs
of each one's gradient (so two are needed without `--dp`), and what sums after a few give of single
updates has not been bounded. A sum still shows which tokens were trained on (`python -m
tests.benchmarks.leak` measures how well, and `leak_rows` there what sizes of rows show: also how
often each was), the sums of many rounds, and of several runs over the same text, more. Differential
privacy is not part of this. A site with nearly all the weight, which is nearly the sum (more than
nine tenths are refused). Updates that are wrong on purpose. A server that does not follow the
protocol: it can stop a run and spoil its model. A stranger in the tunnel who only connects gets
neither plan nor model, but can stop a run; one who can change what others send gets both. Without
`--secure_sum` the server's machine, which forwards everything, can read every update. One user's
processes on one machine hide nothing from that user: that is a demonstration.
"""

SIMULATION = """\
This run simulated its sites: its owner has read the text of all of them, and nothing was hidden
from that owner. Between sites of their own (`--site_dir`) with `--secure_sum` what follows would
hold.
"""

DEMONSTRATION = """\
Processes of sites ran on the server's machine: this was a demonstration, whose text and updates the
owner of that machine could read. On machines of their own what follows would hold.
"""

IN_THE_CLEAR = """\
This run had no secure sums: the server's machine could read every site's updates, and from them
much of what its text says. What follows holds with `--secure_sum` alone.
"""

NOISED_IN_THE_CLEAR = """\
This run had no secure sums: the server's machine could read every site's updates, which are made of
gradients with noise. The guarantee for sequences holds without them, and what follows on sums with
`--secure_sum` alone.
"""

CLIPPED = """\
With `--client_clip` all learn besides, of each round, how many clients had a longer update.
"""

REWEIGHTED = """\
In a round of `{method}` with `--weiszfeld_steps {sums}`, the same updates are summed once for each
step, with weights that each client works out from its update and the sum before. All learn each of
these sums, and the sums of the weights.
"""

REWEIGHTED_SITES = """\
Several sums of a few sites' updates could show single updates. So the second assumption below is
another: at least {others} sites do not share what they know with the adversary. Every round has
clients of at least {fewest} sites.
"""

CLAIMS = {"none": CLAIM, "client": SHARED_CLAIM, "example": EXAMPLE_CLAIM}
"""By --dp."""


def write_privacy(config: FederatedConfig, real: bool, demonstration: bool) -> None:
    """Write the page into a run's folder.

    real: whether sites had processes of their own; demonstration: whether some of these were on the
    server's machine, which remains so where the run is resumed otherwise.
    """
    numbers = ""
    with suppress(OSError, DamagedFile):
        before = read_regular(config.run_dir / PRIVACY).decode("utf-8", "replace")
        demonstration = demonstration or DEMONSTRATION in before
        if config.private:  # until this start has its own
            numbers = "".join(before.partition(PART)[1:])
    remarks = [SIMULATION] if not real else [DEMONSTRATION] if demonstration else []
    if real and not config.secure_sum:
        remarks.append(NOISED_IN_THE_CLEAR if config.dp == "example" else IN_THE_CLEAR)
    if config.client_clip is not None:
        remarks.append(CLIPPED)
    if sums := config.strategy.reweighted:
        remarks.append(REWEIGHTED.format(method=config.method, sums=sums))
        if config.secure_sum:
            fewest = fewest_sites(sums)
            remarks.append(REWEIGHTED_SITES.format(others=fewest - 1, fewest=fewest))
    page = "\n".join(["# What this run showed, and to whom\n", *remarks, CLAIMS[config.dp]])
    write_atomic(config.run_dir / PRIVACY, (page + numbers).encode())
