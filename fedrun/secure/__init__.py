"""All cryptography of fedrun, made of the `cryptography` package, and what it refuses, by name:
messages hold names, rounds, paths and public keys, never a secret."""

from fedrun.common.errors import FedrunError

FEWEST_SITES = 3  # in a sum that hides its terms: of two, each would learn the other's


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
