"""What an aggregation method is: a sum of client terms, then a server update.

The terms of one round are summed over the cohort. The update runs on the workers, from the same sum
to the same bits, so nothing has to be sent back. A method is a frozen dataclass. Its fields are its
flags (the docstring under a field is the flag's help). Its two functions `client_term` and
`server_update` are its algebra, and both are **elementwise**: they are called on matching slices of
the flat vectors, small enough to stay in the cache. Nothing here knows of processes, and nothing
imports torch: tensors bring their own operations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedrun.common.errors import require

if TYPE_CHECKING:
    from torch import Tensor



def adamw_ratio(beta1: float, beta2: float, steps: float = math.inf) -> float:
    """The largest |m| / sqrt(v) of AdamW's moments after this many steps from zero, neither
    corrected for its bias (see aggregation/bounds.py)."""
    ratio = beta1**2 / beta2
    assert ratio < 1
    return (1 - beta1) / math.sqrt((1 - beta2) * (1 - ratio)) * math.sqrt(1 - ratio**steps)


def muon_scale(side: int) -> float:
    """What multiplies Muon's step of a matrix with this longer side: so the root mean square of its
    elements is about 0.2 for any shape, as AdamW's is (Liu et al. 2025, arXiv:2502.16982)."""
    return 0.2 * math.sqrt(side)


@dataclass(frozen=True)
class BoundExponents:
    """The largest element of a vector, as exponents of three quantities known before training: how
    far local steps can move a parameter, the largest element of a gradient, and --grad_clip."""

    update: int = 0
    gradient: int = 0
    clip: int = 0


CLIENT_VECTORS: dict[str, BoundExponents] = {
    "delta": BoundExponents(update=1),
    "gradient": BoundExponents(gradient=1),
    "fisher": BoundExponents(gradient=2),
    "exp_avg": BoundExponents(gradient=1),
    "exp_avg_sq": BoundExponents(gradient=2),
    "momentum": BoundExponents(clip=1),
    "rms": BoundExponents(clip=1)}
"""What a client can report, each as long as the model: its update d_k = w_k - w; the gradient of
its mean loss; its Fisher diagonal; AdamW's two moments, corrected for their bias. The last two, the
first moment and the root of the second of clipped gradients, are for --client_moments average_sqrt
alone, not for methods."""


@dataclass(frozen=True)
class ClientReport:
    """What one client reports of a round besides its vectors."""

    client: int
    tokens: int
    """Tokens in this round's losses. With --dp example 0, or before the client has its weight as
    many as there are on average."""
    loss_sum: float
    """Sum of their losses, in nats; 0 with --dp example."""
    entropy: float | None = None
    """Mean predictive entropy of the trained model, in nats per token; for methods that measure it
    (`holdout_batches`)."""
    weight: float = 0.0
    """The client's weight p_k, not normalised; 0 if it is left out."""
    norm: float | None = None
    """Norm of its update, as it was clipped, or of its gradient; in rounds that are evaluated."""
    clipped: bool = False
    """Whether its update was longer than --client_clip."""
    used: float | None = None
    """How much of its update the round used, from 0 to 1: the factor that clipped it, times the
    share of its elements that a robust rule took, or of its weight beside the client of which the
    most counted; None if nothing could take less than all."""
    noised_norm: float | None = None
    """With --dp example: norm of the gradient of its last step, with its noise."""
    left_out: str = ""
    """Why nothing of this client is in the sum; empty if it is."""
    validation: Sequence[tuple[int, float, int]] = field(default_factory=list)
    """Losses of the client's own model on the validation split (see training/evaluate.py)."""
    on_own: Sequence[tuple[int, float, int]] = field(default_factory=list)
    """The same on what the client holds out of its own text, with --client_holdout."""


@dataclass(frozen=True)
class FisherSettings:
    """How clients estimate their Fisher diagonal; the estimators are in training/fisher.py."""

    estimate: Literal["batch", "sequence", "corrected"] = "batch"
    microbatches: int = 2
    """Parts of a batch, for `corrected`; they must divide the batch."""
    scope: Literal["all", "untied", "mixers"] = "all"
    """Parameters outside the scope have a Fisher diagonal of zero."""

    def gradient_scale(self, batch_size: int, sequence_length: int) -> float:
        """How many times as large as an element of a batch's mean gradient the square root of an
        estimate can be."""
        if self.estimate == "sequence":  # gradients of a sequence's summed loss
            return float(sequence_length - 1)
        if self.estimate == "corrected":
            return math.sqrt(2 * batch_size / self.microbatches)
        return 1.0


@dataclass(frozen=True)
class ServerRound:
    """What a server update may depend on besides the vectors."""

    number: int
    """The round, counted from 1."""
    lr: float = 0.0
    """--lr by its schedule; this and the next four are for methods that run AdamW here."""
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    eps: float = 1e-8
    global_mean: Mapping[str, float] | None = None
    """Means over all elements of the vectors that the method lists in `global_means`."""


@dataclass(frozen=True)
class Strategy:
    """A method of aggregation: what is summed over the clients, and how the model is updated."""

    inputs: ClassVar[tuple[str, ...]] = ("delta",)
    """The client vectors that the terms are made of, by their names in CLIENT_VECTORS. With
    `gradient`, which stands alone, a client computes one gradient at the global model and does not
    train."""
    global_means: ClassVar[tuple[str, ...]] = ()
    """Summed vectors whose mean over all elements the server update needs."""
    diagnostics: ClassVar[tuple[str, ...]] = ()
    """Names of the counts that `count_diagnostics` returns."""
    weight_headroom: ClassVar[int] = 0
    """The weights of a cohort sum to at most 2 to this power (0: to one, known before training)."""

    @property
    def sums(self) -> Mapping[str, BoundExponents]:
        """The vectors that are summed over the cohort, each as long as the model."""
        return {"delta": BoundExponents(update=1)}

    @property
    def state(self) -> Mapping[str, float]:
        """The server's own vectors, which persist from round to round, and their first values."""
        return {}

    @property
    def trains(self) -> bool:
        """Whether clients train; otherwise they compute one gradient at the global model."""
        return "gradient" not in self.inputs

    @property
    def fisher_settings(self) -> FisherSettings:
        """How clients estimate `fisher`, for methods that have it among their inputs."""
        return FisherSettings()

    @property
    def reweighted(self) -> int:
        """How many sums of the same updates a round makes, each with weights that clients work out
        from the mean before it; 0: one sum, with the weights above."""
        return 0

    @property
    def holdout(self) -> float:
        """Fraction of a client's shard that is held out to measure its entropy."""
        return 0.0

    @property
    def holdout_batches(self) -> int:
        """The entropy is measured on at most this many batches of the holdout, or without one of
        the validation split; 0: not measured."""
        return 0

    def check(self, config: Any) -> None:
        """Raise InputError, naming the flag, for settings of a run that this method cannot have.

        config: the run's FederatedConfig, complete but for this check.
        """
        require(self.trains or self.inputs == ("gradient",), "inputs", self.inputs,
                "gradient alone, or vectors of a client that trains")
        if not self.trains:
            # A client makes no local step, so settings of local training would do nothing, and
            # its own model is the global one of before the round.
            for flag, value in {"local_updates": 1, "client_moments": "keep", "sync": "round",
                                "prox_mu": 0, "grad_clip": None, "moments_dtype": "fp32",
                                "local_optimizer": "adamw", "eval_clients": False,
                                "save_client_deltas": False}.items():
                require(getattr(config, flag) == value, f"--{flag}", getattr(config, flag),
                        f"{value} for {config.method}".lower())
        if "fisher" in self.inputs and self.fisher_settings.estimate == "corrected":
            parts = self.fisher_settings.microbatches
            require(config.batch_size % parts == 0, "--fisher_microbatches", parts,
                    f"a divisor of --batch_size {config.batch_size}")

    def plan_weights(self, shard_tokens: Sequence[int], round_tokens: int) -> list[float]:
        """The part of the cohort's weights p_k that is known before training.

        shard_tokens: of each client of the cohort; round_tokens: the most that a client can train
        on in a round. The cohort's `client_weight`s must sum to at most 2**weight_headroom.
        """
        raise NotImplementedError(f"{type(self).__name__} has no plan_weights")

    def client_weight(self, planned: float, report: ClientReport, entropy_reference: float
                      ) -> float:
        """A client's weight after its training. Weights need not sum to one: the sum of the terms
        is divided by theirs. If this raises a ValueError, the client is left out.

        entropy_reference: what `next_entropy_reference` returned for the previous round.
        """
        return planned

    def next_entropy_reference(self, entropies: Sequence[float]) -> float:
        """A number for the next round's `client_weight`, from this round's entropies."""
        return 0.0

    def first_entropy_reference(self, vocab_size: int, clients: int) -> float:
        """The same for the first round."""
        return 0.0

    def refuse_total(self, total: float) -> str:
        """Why a round whose weights sum to `total` cannot be used; empty if it can."""
        return ""

    def refuse_count(self, clients: int) -> str:
        """Why a round in which this many clients are not left out cannot be used; empty if it can.
        """
        return ""

    def gradient_scale(self, batch_size: int, sequence_length: int) -> float:
        """How many times as large as an element of a batch's mean gradient an element of the
        gradients can be that the method's inputs are made of."""
        if "fisher" in self.inputs:
            return self.fisher_settings.gradient_scale(batch_size, sequence_length)
        return 1.0

    def client_term(self, client: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """What a client adds to the sums, before its weight: one tensor for each name in `sums`.

        `client` holds slices of the vectors in `inputs`.
        """
        return (client["delta"],)

    def server_update(self, model: Tensor, state: Mapping[str, Tensor], mean: Mapping[str, Tensor],
                      context: ServerRound) -> None:
        """Change the global model (and `state`) in place; `mean` may be overwritten.

        `mean[name]` is sum_k p_k term_k / sum_k p_k over the clients that took part.
        """
        raise NotImplementedError(f"{type(self).__name__} has no server_update")

    def count_diagnostics(self, mean: Mapping[str, Tensor], context: ServerRound
                          ) -> Mapping[str, Tensor]:
        """Numbers of elements (0-dim) with some property, by the names in `diagnostics`; the
        history shows them as shares of all elements, `share_NAME`. Called before `server_update`,
        with the same arguments."""
        return {}

    def warnings(self, local_updates: int) -> list[str]:
        """One line for each setting that is accepted but probably not what was intended."""
        return []
