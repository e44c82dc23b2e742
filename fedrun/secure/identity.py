"""Identities: a long-lived Ed25519 key (RFC 8032) of each site and of the server.

The private key is in a file for its owner alone; public keys, 32 bytes, are pinned in the file of
the sites. What is signed says what it is for, and serves for nothing else.
"""

import base64
import os
from contextlib import suppress
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from fedrun.common.errors import InputError
from fedrun.common.files import open_regular
from fedrun.secure import ForgedSignature


def frame(*parts: bytes | str) -> bytes:
    """The parts as one message: no other parts, or other version of this, give the same bytes."""
    encoded = [part.encode() if isinstance(part, str) else part for part in ("fedrun 1", *parts)]
    return b"".join(len(part).to_bytes(8) + part for part in encoded)


def derive(key: bytes, *label: bytes | str) -> bytes:
    """A key for one purpose, 32 bytes: HKDF-Expand with SHA-256 (RFC 5869)."""
    return HKDFExpand(SHA256(), 32, frame(*label)).derive(key)


def public_text(public: bytes) -> str:
    """A public key as text: `ed25519:` and base64."""
    return f"ed25519:{base64.b64encode(public).decode()}"


def public_key(text: str) -> bytes:
    """The public key in a text. InputError for any other text."""
    with suppress(ValueError):
        public = base64.b64decode(text.removeprefix("ed25519:"), validate=True)
        if len(public) == 32 and public_text(public) == text:
            return public
    raise InputError(f"{text[:80]}: must be a public key, ed25519: and 44 characters of base64")


def verify(owner: str, key: bytes, signature: bytes, purpose: str, *message: bytes | str) -> None:
    """ForgedSignature unless the owner of this key has signed the message for this purpose."""
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, frame(purpose, *message))
    except (InvalidSignature, ValueError):
        raise ForgedSignature(f"{owner}: its {purpose} is not signed by {public_text(key)}, or not "
                              "for this start") from None


def key_line(key: bytes) -> bytes:
    """A private key as the content of its file."""
    return base64.b64encode(key) + b"\n"


def read_key(path: Path) -> bytes:
    """The private key in a file, 32 bytes. InputError, naming the file, if others may read or
    change it, or if it holds no key."""
    with open_regular(path) as file, suppress(ValueError):
        if not os.fstat(file.fileno()).st_mode & 0o077:
            key = base64.b64decode(file.read(100).strip(), validate=True)
            if len(key) == 32:
                return key
    raise InputError(f"{path}: must be a key's file, for its owner alone (`chmod 600`)")


class Identity:
    """The private key of this site, or of the server."""

    def __init__(self, raw: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(raw)
        self.public = self._key.public_key().public_bytes_raw()

    @classmethod
    def create(cls, path: Path) -> Self:
        """A new key, in a new file. FileExistsError: one is never overwritten."""
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(key_line(Ed25519PrivateKey.generate().private_bytes_raw()))
        return cls.load(path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """InputError, naming the file, if others may read or change it, or if it holds no key."""
        return cls(read_key(path))

    def tag(self, *message: bytes | str) -> bytes:  # HMAC-SHA256: only its owner can make it
        return derive(derive(self._key.private_bytes_raw(), "tags"), *message)

    def sign(self, purpose: str, *message: bytes | str) -> bytes:
        return self._key.sign(frame(purpose, *message))
