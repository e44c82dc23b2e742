"""Public keys as text: what is accepted as one, and how people compare two. Without the package
`cryptography`, so that a wrong file of the sites is refused at once.
"""

from __future__ import annotations

import base64
import hashlib
from contextlib import suppress

from fedrun.common.errors import require

_FIELD_PRIME = 2**255 - 19
# The y coordinates of the eight points of small order, under whose keys anybody can sign.
_ORDER_8 = 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7
_SMALL_ORDER = {0, 1, _FIELD_PRIME - 1, _ORDER_8, _FIELD_PRIME - _ORDER_8}


def require_key(what: str, text: object) -> None:
    """InputError unless this is a public key that only its owner can sign under."""
    encoded = str(text).removeprefix("ed25519:")
    raw = b""
    with suppress(ValueError):
        raw = base64.b64decode(encoded, validate=True)
    require(len(raw) == 32 and f"ed25519:{base64.b64encode(raw).decode()}" == text, what,
            repr(text)[:80], "a public key, ed25519: and 44 characters of base64, as `fedrun sites "
            "key` prints it")
    y = int.from_bytes(raw, "little") & (2**255 - 1)
    require(y < _FIELD_PRIME and y not in _SMALL_ORDER, what, text,
            "a key that `fedrun sites key` has made: under this one anybody could sign")


def fingerprint(key: str) -> str:
    """16 hex digits of the SHA-256 of a public key, in groups of four: to compare by telephone."""
    digits = hashlib.sha256(base64.b64decode(key.removeprefix("ed25519:"))).hexdigest()[:16]
    return " ".join(digits[n:n + 4] for n in range(0, 16, 4))
