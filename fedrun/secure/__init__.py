"""All cryptography of fedrun, made of the `cryptography` package, and what it refuses, by name:
messages hold names, rounds, paths and public keys, never a secret."""

from fedrun.common.errors import FedrunError

FEWEST_SITES = 3  # in a sum that hides its terms: of two, each would learn the other's

FEWEST_STEPS = 2
"""Local updates of a client in a round whose sum hides its update. One of AdamW from zero moments
has the length of the learning rate in every element, so that the sum, with weights that all know,
has the sign of each client's gradient in it; and of averaged moments after one, each client's
gradient follows."""


def fewest_sites(sums: int) -> int:
    """In a round that makes this many sums of the same vectors, each with other weights. One site's
    terms aside, as many sums as there are others could give away each of these: there has to be one
    more."""
    return max(FEWEST_SITES, sums + 2)


class ForgedSignature(FedrunError):
    """Something was not signed by whom it is said to come from, or not for this start."""


class WrongMembers(FedrunError):
    """Other sites, or fewer, would take part than the file of the sites names."""


class Replayed(FedrunError):
    """A nonce, a key or a mask would be used a second time."""


class RoundChanged(FedrunError):
    """A sum that this site took part in would be repeated with other clients, weights or sites."""
