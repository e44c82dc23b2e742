"""Masks: what a site adds to its vector, and what cancels in the sum over all sites.

    session = Session(name, identity, pinned)      # draws a nonce and an X25519 key (RFC 7748)
    offer = session.offer(run, nonces, plan)       # with the nonces of all sites
    session.agree(offers)                          # with the offers of all sites
    session.mask(round, "vector", 32).add_to(vector)

What a site signs holds the fresh nonces of all: offers of another start do not verify. HKDF-SHA256
(RFC 5869) makes a key of a pair's secret, and of that one for each sum; those of a round are
forgotten when a later one begins. A sum's key makes integers in Z_2^32 or Z_2^64, the keystream of
AES-256-CTR (NIST SP 800-38D), which the first of the two sites adds and the other subtracts.
"""

import os
from collections.abc import Mapping

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedrun.common.errors import InputError
from fedrun.secure import FEWEST_SITES, ForgedSignature, Replayed, WrongMembers
from fedrun.secure.identity import Identity, derive, frame, verify

PIECE = 1 << 17  # bytes of a stream that are made at once, and stay in the processor's cache
Offer = tuple[bytes, bytes]  # an X25519 key, and the signature of the site
Keys = list[tuple[bool, bytes]]  # for each other site: whether this one adds the stream, and a key


class Mask:
    """The mask of one vector of one site. It can be added once."""

    def __init__(self, keys: Keys, bits: int) -> None:
        self._types = {32: ("<u4", "<i4"), 64: ("<u8", "<i8")}[bits]  # little-endian everywhere
        # Counter mode within GCM, twice as fast as alone. No key makes another stream: one nonce.
        self._streams = [(adds, Cipher(algorithms.AES256(key), modes.GCM(bytes(12))).encryptor())
                         for adds, key in keys]

    def add_to(self, vector: np.ndarray) -> None:
        """Add the mask modulo 2^bits, in place, in any thread; vector: (size,), contiguous, of
        integers with as many bits. Replayed the second time."""
        if vector.ndim != 1 or vector.dtype.str not in self._types:
            raise TypeError(f"{vector.dtype}, {vector.ndim} dimensions: must be {self._types}, 1")
        words, streams, self._streams = vector.view(self._types[0]), self._streams, []
        if not streams:
            raise Replayed("this mask was added already")
        zeros, memory = memoryview(bytes(PIECE)), bytearray(PIECE + 15)  # `update_into` wants more
        made = np.frombuffer(memory, self._types[0], PIECE // words.itemsize)
        for part in np.split(words, range(len(made), len(words), len(made))):
            for adds, stream in streams:
                stream.update_into(zeros[:part.nbytes], memory)
                (np.add if adds else np.subtract)(part, made[:len(part)], out=part)


class Session:
    """A site's part in one start: its nonce, offer, keys and masks, each of them once."""

    def __init__(self, name: str, identity: Identity, pinned: Mapping[str, bytes]) -> None:
        """pinned: public keys of all sites, this one too, in the order of the file of the sites."""
        if len(pinned) < FEWEST_SITES:
            raise WrongMembers(f"{len(pinned)} sites: a secure sum needs {FEWEST_SITES}")
        if pinned.get(name) != identity.public or len(set(pinned.values())) < len(pinned):
            raise InputError(f"{name}: must have the key that is here, and no two sites the same")
        self._name, self._identity, self._pinned = name, identity, dict(pinned)
        self._key: X25519PrivateKey | None = X25519PrivateKey.generate()
        self._agreement, self._keys, self._round, self.nonce = b"", Keys(), 0, os.urandom(32)
        self._made = set[tuple[int, str]]()

    def offer(self, run: str, nonces: Mapping[str, bytes], plan: bytes) -> Offer:
        """This site's key, signed for this start. Raises WrongMembers, Replayed. plan: digest of
        all that decides the sums: settings, sizes, sites, versions, first model."""
        self._require_all(nonces)
        if (self._agreement or self._key is None or len(set(nonces.values())) < len(nonces)
                or nonces[self._name] != self.nonce):
            raise Replayed(f"{self._name}: the nonces of this start are not all fresh")
        self._agreement = frame(run, frame(*nonces), frame(*nonces.values()), plan)
        public = self._key.public_key().public_bytes_raw()
        return public, self._identity.sign("offer", self._agreement, self._name, public)

    def agree(self, offers: Mapping[str, Offer]) -> None:
        """Make the keys shared with the others. Raises WrongMembers, ForgedSignature, Replayed."""
        key, self._key = self._key, None
        if key is None or not self._agreement:
            raise Replayed(f"{self._name}: keys are made once a start, after its offer")
        self._require_all(offers)
        for name, (public, signature) in offers.items():
            verify(name, self._pinned[name], signature, "offer", self._agreement, name, public)
        salt, keys = frame(self._agreement, *(public for public, _ in offers.values())), Keys()
        for other in offers.keys() - {self._name}:
            pair = [name for name in offers if name in (other, self._name)]
            try:
                secret = key.exchange(X25519PublicKey.from_public_bytes(offers[other][0]))
            except ValueError:  # a point of small order
                raise ForgedSignature(f"{other}: offers a key that makes no secret") from None
            made = HKDF(SHA256(), 32, salt, frame("pair", *pair)).derive(secret)
            keys.append((pair[0] == self._name, made))
        self._keys = keys

    def mask(self, number: int, name: str, bits: int) -> Mask:
        """The mask of the sum `name` of round `number`, in Z_2^bits (32 or 64). Replayed if it was
        made before, or a later round's was."""
        if number < self._round or (number, name) in self._made or not self._keys:
            raise Replayed(f"round {number}, {name}: this mask was made already, or has no key")
        while self._round < number:
            self._keys = [(adds, derive(key, "next round")) for adds, key in self._keys]
            self._round += 1
        self._made.add((number, name))
        return Mask([(adds, derive(key, "sum", str(number), name, str(bits)))
                     for adds, key in self._keys], bits)

    def _require_all(self, sites: Mapping[str, object]) -> None:
        if list(sites) != list(self._pinned):
            raise WrongMembers(f"{', '.join(sites)} would take part, not {', '.join(self._pinned)}")
