"""The settings of federated runs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from fedrun.common.errors import require
from fedrun.config.client_clip import MEDIAN, check_client_clip
from fedrun.config.overlap import check_overlap
from fedrun.config.own import check_own
from fedrun.config.shared import RunConfig
from fedrun.data.site_settings import check_sites
from fedrun.privacy.settings import PrivacySettings, check_privacy
from fedrun.strategies import FedAvg, Strategy

INT8_COHORT = 126  # most clients whose int8 sum still gives each one level on both sides of zero
INT4_COHORT = 4681  # most clients whose sum, of 7 levels each, fits 16 bits


@dataclass(frozen=True)
class FederatedConfig(PrivacySettings, RunConfig):
    """Federated training: clients train on their own shards, and their updates are aggregated."""

    # ---- federation
    strategy: Strategy = field(default_factory=FedAvg)
    """The aggregation method with its own settings."""
    num_clients: int = 4
    """Clients, each with its own shard. Any number runs on any number of processes."""
    sites: Path | None = None
    """File of the sites, the owners of the text, as `fedrun sites` makes it: their keys, how many
    clients each has and how its text is dealt to them, in place of --num_clients and --partition.
    Each client's text is its site's (--site_data); --dataset is the server's own text, to validate
    on. none: one owner of all text."""
    secure_sum: bool = False
    """Mask what each site sends, so that all others see the sum over at least three sites and
    nothing else. Needs --sites. Results are the same, to the bit."""
    site_holdout: float | None = None
    """Share of each site's sequences, drawn at random, that nobody trains on (0.05). Evaluations
    record their mean loss over all sites (site_val_loss). Needs --secure_sum, so that only the sum
    leaves a site. none: all are trained on."""
    cohort: float | None = None
    """Clients that train in a round, drawn at random for each: a number (10) or a share of all
    (0.1). none: all of them."""
    local_updates: int = 1
    """Optimizer steps that a client makes in a round. More of them mean less communication."""
    local_updates_schedule: Literal["constant", "quadratic"] = "constant"
    """Whether each round has --local_updates steps (constant), or that many on average, fewer while
    the learning rate is high and more as --lr_schedule lowers it, in inverse proportion to its
    square (quadratic; Gu et al. 2024): a better model for the same communication. The last round
    has three to eight times as many as the average, which `fedrun plan` says: --timeout must leave
    it the time."""
    sync: Literal["round", "epoch"] = "round"
    """When clients receive the global model: at the start of every round, or only of every epoch
    (epoch), to reproduce a study in which the server averaged models that no client received."""
    prox_mu: float = 0.0
    """Weight mu of FedProx's term (mu/2) |w - w_t|^2 in the clients' loss, which keeps a client's
    model w near the global one w_t. No effect at --local_updates 1, where w is w_t."""
    personal: str | None = None
    """Parameters that never leave a client, each of which keeps and trains its own: names or
    patterns with *, separated by commas (*norm*,lm_head.weight); all others are averaged. none: all
    of them are."""
    client_moments: Literal["keep", "reset", "reset_epoch", "average", "average_sqrt",
                            "average_rows"] = "keep"
    """What happens to a client's moments after a round: kept for its next one (keep), set to zero
    (reset; reset_epoch: only at the start of each epoch), or averaged over the cohort together with
    the updates (average), which sends 24 bytes per parameter instead of 4 (12 with --aggregation
    float). average_sqrt averages the root of AdamW's second moment instead, and Muon's momentum: 12
    bytes (3 with --aggregation int8, 2.6 with int4), on a grid that --grad_clip fixes; it needs
    that flag. average_rows needs it too: clients keep their moments, and average how large AdamW's
    second one is in each row of a parameter, in an embedding of each token: 4 bytes a row, 8 in a
    large cohort (after Liu et al. 2025, FedAdamW)."""
    moments_every: str = "1,1"
    """Rounds from one average of the first moment to the next, and of the second (3,6; one number
    is for both), with --client_moments average_sqrt, or from one average of rows to the next (3),
    with average_rows; the updates are averaged in every round. In between a client keeps its own
    moments; one that missed a round takes up the last averages. Averages of rows, and those that
    are not made in every round, begin with the second round."""
    client_store: Literal["memory", "disk"] = "memory"
    """Where the state of clients that are not training is kept: in the host's memory, or in files
    in the run's folder (disk), so that hundreds of clients take the memory of two."""
    offload: Literal["none", "global"] = "none"
    """What waits in the host's memory beside a GPU: the global model, with the server's own vectors
    and averaged moments (global), 4 bytes of each a parameter; clients' states do so in any case
    (--client_store). The same bits; each client's turn copies the model over twice, with --prox_mu
    each step once more."""
    aggregation: Literal["exact", "float", "int8", "int4"] = "exact"
    """How updates are summed: exact (integers on a grid: the same bits in any number of processes;
    4 bytes a parameter, more for some methods), float (floating point, no bound on an update), int8
    (8 bits, 1.01 bytes a parameter; a client adds its rounding error to its next update), or int4
    (4 bits each way, 0.53 bytes a parameter; the sum is rounded too, and the server adds that error
    to its next sum)."""
    overlap: bool = False
    """Send a round's sum while clients train the next round. Each client starts that one from its
    own part of the sum; the others' parts come one round late (Kale et al. 2025). What is recorded
    and saved after a round is the model without that round's own update, except after the last.
    Takes 4 bytes a parameter more (1 with int8), and 4 in each client's state."""
    client_clip: str | None = None
    """Longest update of a client, in L2 norm: a longer one is scaled down to it, so that no client
    can move the model further however it trained. A number (1e-6 to 1e6), or the median of the
    round's norms (median), for which each worker keeps its clients' updates until all have trained:
    4 bytes a parameter and client."""
    eval_clients: bool = False
    """At each evaluation also evaluate the own model of each client that trains in that round, as
    its training leaves it (client_val_ppls)."""
    client_holdout: float | None = None
    """Share of each client's sequences, the last of its shard, that it does not train on (0.05):
    --eval_clients, which it needs, evaluates its own model on them too (client_own_ppls). none: all
    are trained on."""
    save_client_deltas: bool = False
    """Whenever parameters of the global model and their change are saved for plots, save them of
    each client too that trains in that round. Of Mamba-2 alone."""
    server: Literal["dedicated", "colocated"] = "dedicated"
    """Under torchrun: rank 0 is only the server (dedicated), or a worker too (colocated), which
    uses every process for training."""

    not_in_results: ClassVar[frozenset[str]] = RunConfig.not_in_results | {
        "server", "client_store", "offload", "dp_dir"}
    only_in_records: ClassVar[frozenset[str]] = RunConfig.only_in_records | {
        "eval_clients", "save_client_deltas"}

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_clients >= 1, "--num_clients", self.num_clients, "an integer >= 1")
        if self.cohort is not None:
            whole = self.cohort >= 1 and float(self.cohort).is_integer()
            shown = int(self.cohort) if whole else self.cohort  # as it was typed
            require(0 < self.cohort < 1 or (whole and self.cohort <= self.num_clients), "--cohort",
                    shown, f"an integer in [1, {self.num_clients}] (--num_clients), or a "
                    "share in (0, 1)")
            require(self.sync == "round", "--cohort", shown,
                    "none with --sync epoch, where all clients train in every round")
        require(self.local_updates >= 1, "--local_updates", self.local_updates, "an integer >= 1")
        for given, why in ((self.sync == "epoch", "--sync epoch"), (self.extend, "--extend"), (
                self.client_moments == "reset_epoch", "--client_moments reset_epoch"), (
                self.dp == "example", "--dp example, which counts steps of equal rounds")):
            require(self.local_updates_schedule == "constant" or not given,
                    "--local_updates_schedule", self.local_updates_schedule, f"constant with {why}")
        require(0 <= self.prox_mu < math.inf, "--prox_mu", self.prox_mu, ">= 0")
        require(self.prox_mu == 0 or self.sync == "round", "--prox_mu", self.prox_mu,
                "0 with --sync epoch, where clients do not know the global model")
        rows = self.client_moments == "average_rows"
        periods = re.fullmatch("([1-9][0-9]{0,5})(,[1-9][0-9]{0,5})?", self.moments_every)
        require(periods is not None and (not rows or periods[2] in (None, f",{periods[1]}")),
                "--moments_every", self.moments_every, "an integer >= 1 with --client_moments "
                "average_rows" if rows else "one or two integers >= 1: 3,6")
        require(not self.averages_moments or self.sync == "round", "--client_moments",
                self.client_moments, "keep, reset or reset_epoch with --sync epoch")
        require(self.client_moments != "reset_epoch" or self.cohort is None, "--client_moments",
                self.client_moments, "keep, reset or average with --cohort, where a client may not "
                "train in an epoch's first round")
        require(self.grad_clip is not None or self.dp == "example" or self.client_moments not in (
            "average_sqrt", "average_rows"), "--grad_clip", "none",
                f"a number > 0 with --client_moments {self.client_moments}, whose grid it fixes")
        require(self.moments_dtype == "fp32" or not self.averages_moments, "--moments_dtype",
                self.moments_dtype, f"fp32 with --client_moments {self.client_moments}, which takes"
                " moments as they are")
        if self.local_optimizer == "muon":
            require(self.client_moments != "average", "--client_moments", "average",
                    "average_sqrt, keep, reset, reset_epoch or average_rows with --local_optimizer "
                    "muon")
            require(not self.averaged_moments or self.personal is None, "--personal", self.personal,
                    f"none with --local_optimizer muon and --client_moments {self.client_moments}")
            require(not self.averaged_moments or self.muon_momentum >= self.beta1,
                    "--muon_momentum", self.muon_momentum, f"at least --beta1 {self.beta1} with "
                    f"--client_moments {self.client_moments}")
            require(not {"exp_avg", "exp_avg_sq"} & {*self.strategy.inputs}, "--local_optimizer",
                    "muon", f"adamw for {self.method}, which takes AdamW's moments")
        if self.sends_few_bits:
            self._check_few_bits()
        check_client_clip(self)
        check_overlap(self)
        check_sites(self)
        self.strategy.check(self)
        check_privacy(self)
        check_own(self)

    @property
    def cohort_size(self) -> int:
        """Number of clients that train in a round."""
        if self.cohort is None:
            return self.num_clients
        share = self.cohort * self.num_clients if self.cohort < 1 else self.cohort
        return max(1, round(share))

    @property
    def measures_own_models(self) -> bool:
        """With --personal the global model is that of no client."""
        return self.personal is not None and self.eval_clients

    @property
    def averaged_moments(self) -> dict[str, int]:
        """The moments (see CLIENT_VECTORS) that are averaged besides the method's vectors, and the
        rounds from one average to the next."""
        if self.client_moments == "average_sqrt":
            periods = [int(period) for period in self.moments_every.split(",")]
            return {"momentum": periods[0], "rms": periods[-1]}
        return {"exp_avg": 1, "exp_avg_sq": 1} if self.client_moments == "average" else {}

    @property
    def rows_every(self) -> int | None:
        """The rounds from one average of rows to the next; None: none are averaged."""
        if self.client_moments != "average_rows":
            return None
        return int(self.moments_every.split(",")[0])

    @property
    def averages_moments(self) -> bool:
        """Whether clients average anything of their moments."""
        return bool(self.averaged_moments or self.rows_every)

    @property
    def longest_update(self) -> float | None:
        """The number that --client_clip gives, if it gives one."""
        return None if self.client_clip in (None, MEDIAN) else float(self.client_clip or 0)

    @property
    def clips_to_median(self) -> bool:
        """Whether the round's norms say to which norm updates are clipped."""
        return self.client_clip == MEDIAN

    @property
    def keeps_moments(self) -> bool:
        """Whether a client has moments of its own from one round to the next."""
        if self.client_moments == "average_sqrt":
            return set(self.averaged_moments.values()) != {1} or self.sends_few_bits
        return self.client_moments in ("keep", "reset_epoch", "average_rows")

    @property
    def keeps_states(self) -> bool:
        """Whether a client keeps anything from one round to the next besides its place in its text,
        which follows from the rounds in which it trained. Sites keep a file of each client in any
        case."""
        return (self.keeps_moments or self.sends_few_bits or self.sync == "epoch"
                or self.sites is not None or self.overlap or self.personal is not None)

    @property
    def sends_few_bits(self) -> bool:
        """Whether updates are rounded to so few bits that each client keeps what it has not sent.
        """
        return self.aggregation in ("int8", "int4")

    def _check_few_bits(self) -> None:
        """int8 and int4 sum nothing but updates from the global model whose weights are known
        before the round, and only of a limited number of clients."""
        given = self.aggregation
        fits = set(self.strategy.sums) == {"delta"} and not self.strategy.weight_headroom
        require(fits, "--aggregation", given,
                f"exact or float for {self.method} ({given} carries only updates)")
        require(self.client_moments != "average", "--client_moments", "average",
                "keep, reset, reset_epoch, average_sqrt or average_rows with "
                f"--aggregation {given}")
        most = INT8_COHORT if given == "int8" or self.averaged_moments else INT4_COHORT
        beside = " and averaged moments" if given == "int4" and self.averaged_moments else ""
        require(self.cohort_size <= most, "--cohort", self.cohort_size,
                f"at most {most} clients in a round with --aggregation {given}{beside}")
        require(self.sync == "round", "--sync", self.sync, f"round with --aggregation {given}")

    def warnings(self) -> list[str]:
        """One line for each setting that works but is probably a mistake (see unused.py too)."""
        found = self.strategy.warnings(self.local_updates)
        if self.client_moments == "reset" and self.local_updates == 1:
            found.append("--client_moments reset with --local_updates 1 makes every step "
                         "AdamW's first one, which is sign descent")
        return found

    @property
    def name(self) -> str:
        method = "federated" if self.method == "fed_avg" else self.method
        return self.run_name or (f"{method}_config_{self.config_name}_lu_{self.local_updates}"
                                 f"_seed_{self.seed}")
