"""--dp example on the workers: noise that hides each sequence in the gradients of its client.

The first worker shares a secret of the run with the others, at its start. Each client's key of a
round is made of that, of the parameters and moments that it starts from, and its place in the run;
`PrivateGradient` makes the keys of its steps from that one. Before anything is made of what the
clients of a round have trained, the first worker notes in the log what the round costs: nothing if
the same was noted before a kill, the same again if anything has changed.

At sites of their own all of that is each site's: its secret, and the log of what its clients have
paid. The others hear no more than whether the round is in it.

    noise.begin(client, round)                  # before its training: the key of its first step
    noise.note_steps(client)                    # after it
    noise.add_to(aggregator, plan, model)       # workers <-> workers; before the sum
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fedrun.aggregation.base import Aggregator
from fedrun.data.sites import Sites
from fedrun.distributed.data_plane import DataPlane
from fedrun.federation.client import Client
from fedrun.federation.messages import RoundPlan
from fedrun.federation.noise import WORDS, Noise, bytes_of, words_of
from fedrun.federation.noise_keeper import Keeper
from fedrun.federation.private_gradient import PrivateGradient
from fedrun.federation.secure_sum import SecureSum
from fedrun.federation.site_keys import digest_of
from fedrun.federation.site_noise import require_noise_of_all, signed
from fedrun.privacy.example_level import ExampleLevel
from fedrun.training.params import FlatParams


class SequenceNoise(Noise):
    """A worker's part in hiding the sequences of its clients."""

    def __init__(self, level: ExampleLevel, plane: DataPlane, keeper: Keeper | None,
                 flat: FlatParams, sites: Sites | None = None, secure: SecureSum | None = None
                 ) -> None:
        """Workers: the run's secret, from the first of them, or of the site, which has the keeper.
        sites, secure: of the run, with --sites and --secure_sum."""
        super().__init__(level, plane, keeper)
        self.gradients, self._sites, self._secure = PrivateGradient(level, flat), sites, secure
        own = [0] * WORDS if keeper is None else words_of(keeper.secret())
        self._secret = bytes_of(self._sum(own))

    def _sum(self, words: Sequence[int]) -> list[int]:
        """Workers: over those that share a secret."""
        plane = self._plane
        return plane.sum_in_site(signed(words)) if plane.of_site else plane.sum_words(words)

    def begin(self, client: Client, number: int) -> None:
        """Before the steps of a client in round `number`, from where the worker's parameters and
        the client's moments are."""
        from fedrun.secure.noise import NoiseKey

        state = {name: digest_of(tensor) for name, tensor in client.optimizer.state.items()}
        self.gradients.begin(NoiseKey(self._secret).round_key({
            "client": client.index, "round": number, "steps done": client.steps_done,
            "parameters": digest_of(client.flat.vector), **state}))

    def note_steps(self, client: Client) -> None:
        """After them: the last key, which all that they were made of went into, stands for them."""
        self.note(client.index, self.gradients.key.hex())

    def add_to(self, aggregator: Aggregator, plan: RoundPlan, model: Tensor) -> None:
        """Workers: on return the round is in the log. The terms have their noise already.

        RoundRefused on all of them if it is not: then nothing may be summed.
        """
        if not self._plane.of_site:
            self._keys(plan, model)
            return
        assert self._sites is not None
        terms, self._terms = self._sum(self._terms), [0] * WORDS
        _, refused = self._released(plan, model, terms)
        require_noise_of_all(self._plane, self._sites, self._secure, refused)
