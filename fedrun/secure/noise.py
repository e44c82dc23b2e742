"""The secret noise of differential privacy: a key in a file, one for each round, and their streams.

    key = NoiseKey.open(folder)
    of_round = key.round_key({"run": run, "round": 3, "model": digest})
    stream(of_round, block).read(size)

A round's key is bound to all that the noise protects: with the same binding, as after a kill, it is
the same and shows nothing new; with any other it has nothing to do with it. So a noise is never
added to two different sums, whose difference would be free of it. Who has a key can take its noise
away.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from fedrun.common.errors import InputError
from fedrun.common.files import write_atomic
from fedrun.secure.chain import alone, sync_folder
from fedrun.secure.identity import derive, key_line, read_key

KEY = "noise.key"
BLOCK = 1 << 16  # elements of a vector that share a stream


class NoiseKey:
    """The key that all noise of an owner comes from."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self.name = derive(raw, "name of a noise key").hex()
        """Tells keys apart, and nothing else of them."""

    @classmethod
    def open(cls, folder: Path) -> Self:
        """The key in a folder, which is made with a new key if it has none, whole or not at all.

        Raises:
            InputError: others may read the key, write the folder, or the file holds no key.
            OSError, Busy: it cannot be read or written.
        """
        folder.mkdir(0o700, parents=True, exist_ok=True)
        if folder.stat().st_mode & 0o022:
            raise InputError(f"{folder}: must be a folder that its owner alone may write "
                             "(`chmod 700`)")
        path = folder / KEY
        with alone(path):
            if not path.exists():
                write_atomic(path, key_line(os.urandom(32)), secret=True)
                sync_folder(folder)
            return cls(read_key(path))

    def commitment(self, *data: bytes | str) -> str:
        """What tells data apart, 64 digits; without the key nothing can be learnt from it."""
        return derive(self._raw, "commitment", *data).hex()

    def round_key(self, binding: Mapping[str, str | int]) -> bytes:
        """The key of a round's noise, 32 bytes. binding: all that decides what is released, in any
        order."""
        return derive(self._raw, "round", json.dumps(dict(binding), sort_keys=True))


def noise_name(round_key: bytes) -> str:
    """What names a round's noise in public, 64 digits: two have one name only if they are the
    same."""
    return derive(round_key, "name of a noise").hex()


def share_key(round_key: bytes, name: str) -> bytes:
    """The key of one of several shares of a round's noise, 32 bytes, where one owner draws them."""
    return derive(round_key, "share", name)


def stream(round_key: bytes, block: int) -> "Keystream":
    """The bytes that make the noise of the elements [block * BLOCK, (block + 1) * BLOCK)."""
    return Keystream(derive(round_key, "stream"), block.to_bytes(12, "little"))


class Keystream:
    """The keystream of ChaCha20 (RFC 8439) from block counter 0: up to 256 GiB."""

    def __init__(self, key: bytes, nonce: bytes) -> None:
        """key: 32 bytes; nonce: 12, not used with this key before."""
        self._cipher = Cipher(algorithms.ChaCha20(key, bytes(4) + nonce), None).encryptor()

    def read(self, size: int) -> bytes:
        """The next `size` bytes."""
        return self._cipher.update(bytes(size))
