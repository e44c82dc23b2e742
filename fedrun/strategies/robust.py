"""What the robust methods share: they see the single updates of a round, and hold where F of its
clients send anything at all.

Every client counts the same, whatever it says of its text: a weight is a claim too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fedrun.common.errors import require
from fedrun.strategies.base import ServerRound, Strategy

if TYPE_CHECKING:
    from torch import Tensor


def require_kept_updates(config: Any) -> None:
    """InputError, naming the flag, for settings of a run that do not go with a method which keeps
    its clients' updates until all have trained."""
    method = config.method
    require(config.aggregation == "exact", "--aggregation", config.aggregation,
            f"exact with {method}")
    require(config.sync == "round", "--sync", config.sync, f"round with {method}")
    require(not config.averages_moments, "--client_moments", config.client_moments,
            f"keep, reset or reset_epoch with {method}: an average of moments is not robust")


@dataclass(frozen=True)
class Robust(Strategy):
    """A rule over the updates of a round, in place of their weighted mean.

    Updates are whole steps of the round's grid, and a rule makes the mean of those that it takes:
    in every element of the middle ones (`trimmed`), or of the clients that it chooses by their
    distances (`by_distance`). So its result depends on no order.
    """

    byzantine: int = 1
    """How many clients of a round may be wrong, broken or hostile (F). The method holds against
    these, and needs more clients the more they are."""

    by_distance: ClassVar[bool] = False
    """Whether `choose` is asked, with the distances between updates."""

    @property
    def fewest(self) -> int:
        """The fewest clients of a round for which the rule holds."""
        return 2 * self.byzantine + 1

    def trimmed(self, clients: int) -> int:
        """How many of the updates of this many clients are cut off in each element: so many of the
        lowest, and as many of the highest."""
        return 0

    def choose(self, distances: Sequence[Sequence[int]]) -> list[int]:
        """The clients whose updates are taken, by their places; all, unless a method chooses.
        distances: the squared one between each two, in grid steps, exact."""
        return list(range(len(distances)))

    def check(self, config: Any) -> None:
        super().check(config)
        method = config.method
        require(self.byzantine >= 1, "--byzantine", self.byzantine, "an integer >= 1")
        require(config.cohort_size >= self.fewest, "--byzantine", self.byzantine,
                f"such that {method} has {self.fewest} clients in a round, which are "
                f"{config.cohort_size} (--num_clients, --cohort)")
        single = f"with {method}, which has to see single updates"
        require(not config.secure_sum, "--secure_sum", "true", f"false {single}")
        require(config.sites is None, "--sites", config.sites, f"none {single}")
        require(config.dp == "none", "--dp", config.dp, f"none {single}")
        require_kept_updates(config)

    def plan_weights(self, shard_tokens: Sequence[int], round_tokens: int) -> list[float]:
        return [1 / len(shard_tokens)] * len(shard_tokens)

    def refuse_count(self, clients: int) -> str:
        if clients >= self.fewest:
            return ""
        return (f"--byzantine {self.byzantine} needs {self.fewest} clients whose updates are "
                f"finite and within the bound, and there are {clients}")

    def server_update(self, model: Tensor, state: Mapping[str, Tensor], mean: Mapping[str, Tensor],
                      context: ServerRound) -> None:
        model.add_(mean["delta"])
