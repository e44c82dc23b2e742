"""Sites that agree on keys, all in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from fedrun.secure.identity import Identity
from fedrun.secure.masks import Offer, Session

NAMES = ("north", "south", "east", "west", "centre")


@dataclass
class Sites:
    """Some sites at one start."""

    identities: dict[str, Identity]
    sessions: dict[str, Session] = field(init=False)

    def __post_init__(self) -> None:
        self.pinned = {name: identity.public for name, identity in self.identities.items()}
        self.sessions = {name: Session(name, identity, self.pinned)
                         for name, identity in self.identities.items()}

    @property
    def nonces(self) -> dict[str, bytes]:
        return {name: session.nonce for name, session in self.sessions.items()}

    def offers(self, run: str = "run", plan: bytes = b"plan") -> dict[str, Offer]:
        nonces = self.nonces
        return {name: session.offer(run, nonces, plan) for name, session in self.sessions.items()}

    def agree(self) -> Sites:
        offers = self.offers()
        for session in self.sessions.values():
            session.agree(offers)
        return self

    def again(self) -> Sites:
        """The same sites at another start."""
        return Sites(self.identities)

    def masked(self, vectors: list[np.ndarray], number: int = 1, name: str = "vector"
               ) -> list[np.ndarray]:
        """Copies of the sites' vectors, as they would be sent."""
        made = [vector.copy() for vector in vectors]
        for session, vector in zip(self.sessions.values(), made, strict=True):
            session.mask(number, name, 8 * vector.itemsize).add_to(vector)
        return made


MakeSites = Callable[[int], Sites]
