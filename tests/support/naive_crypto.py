"""The masks of secure sums once more, slowly, from the standards alone: no library, no fedrun.

X25519 from RFC 7748, HKDF from RFC 5869 (on the standard library's HMAC), ChaCha20 from RFC 8439,
AES-256 from FIPS 197, and counter mode from NIST SP 800-38A, from the counter at which GCM begins
(SP 800-38D).
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Mapping, Sequence

PRIME = 2**255 - 19


def x25519(scalar: bytes, point: bytes) -> bytes:
    """RFC 7748, section 5: the Montgomery ladder."""
    k = int.from_bytes(scalar, "little")
    k = k & ~7 & (2**255 - 1) | 2**254
    x1 = int.from_bytes(point, "little") % 2**255
    x2, z2, x3, z3, swapped = 1, 0, x1, 1, 0
    for t in reversed(range(255)):
        bit = k >> t & 1
        if swapped ^ bit:
            x2, x3, z2, z3 = x3, x2, z3, z2
        swapped = bit
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        aa, bb, da, cb = a * a, b * b, d * a, c * b
        e = aa - bb
        x3, z3 = (da + cb) ** 2 % PRIME, x1 * (da - cb) ** 2 % PRIME
        x2, z2 = aa * bb % PRIME, e * (aa + 121665 * e) % PRIME
    if swapped:
        x2, z2 = x3, z3
    return (x2 * pow(z2, PRIME - 2, PRIME) % PRIME).to_bytes(32, "little")


def extract(salt: bytes, secret: bytes) -> bytes:
    """RFC 5869, section 2.2."""
    return hmac.new(salt, secret, hashlib.sha256).digest()


def expand(key: bytes, info: bytes, length: int = 32) -> bytes:
    """RFC 5869, section 2.3."""
    made, block = b"", b""
    for number in range(1, -(-length // 32) + 1):
        block = hmac.new(key, block + info + bytes([number]), hashlib.sha256).digest()
        made += block
    return made[:length]


def _quarter_round(state: list[int], a: int, b: int, c: int, d: int) -> None:
    """RFC 8439, section 2.1."""
    for x, y, z, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        state[x] = (state[x] + state[y]) % 2**32
        turned = state[z] ^ state[x]
        state[z] = (turned << bits | turned >> 32 - bits) % 2**32


def chacha20(key: bytes, nonce: bytes, length: int, counter: int = 0) -> bytes:
    """RFC 8439, sections 2.3 and 2.4: the keystream from a block on."""
    made = b""
    while len(made) < length:
        start = list(struct.unpack("<16I", b"expand 32-byte k" + key + struct.pack("<I", counter)
                                   + nonce))
        state = start.copy()
        for _ in range(10):
            for n in range(4):
                _quarter_round(state, n, 4 + n, 8 + n, 12 + n)
            for n in range(4):
                _quarter_round(state, n, 4 + (n + 1) % 4, 8 + (n + 2) % 4, 12 + (n + 3) % 4)
        made += struct.pack("<16I", *((a + b) % 2**32 for a, b in zip(start, state, strict=True)))
        counter += 1
    return made[:length]


def _double(a: int) -> int:
    return a << 1 ^ (0x11b if a & 0x80 else 0)


def _times(a: int, b: int) -> int:
    product = 0
    while b:
        product ^= a if b & 1 else 0
        a, b = _double(a), b >> 1
    return product


def _s_box() -> list[int]:
    """FIPS 197, section 5.1.1: the inverse, then the affine map."""
    box = []
    for value in range(256):
        inverse = next((i for i in range(256) if _times(value, i) == 1), 0)
        turned = [inverse << n & 0xff | inverse >> (8 - n) for n in range(5)]
        box.append(turned[0] ^ turned[1] ^ turned[2] ^ turned[3] ^ turned[4] ^ 0x63)
    return box


S_BOX = _s_box()


def _round_keys(key: bytes) -> list[list[int]]:
    """FIPS 197, section 5.2, for 256 bits: 15 keys of 16 bytes."""
    words, constant = [list(key[i:i + 4]) for i in range(0, 32, 4)], 1
    for i in range(8, 60):
        word = words[-1]
        if i % 8 == 0:
            word = [S_BOX[b] for b in word[1:] + word[:1]]
            word[0] ^= constant
            constant = _double(constant)
        elif i % 8 == 4:
            word = [S_BOX[b] for b in word]
        words.append([a ^ b for a, b in zip(words[i - 8], word, strict=True)])
    return [[byte for word in words[i:i + 4] for byte in word] for i in range(0, 60, 4)]


def _encrypt(keys: list[list[int]], block: bytes) -> bytes:
    """FIPS 197, section 5.1; the state lies in the order of the input, column by column."""
    state = [a ^ b for a, b in zip(block, keys[0], strict=True)]
    for number, key in enumerate(keys[1:], 1):
        state = [S_BOX[state[(i + 4 * (i % 4)) % 16]] for i in range(16)]  # bytes, then rows
        if number < 14:
            mixed = []
            for i in range(0, 16, 4):
                a, b, c, d = state[i:i + 4]
                mixed += [_times(2, a) ^ _times(3, b) ^ c ^ d, a ^ _times(2, b) ^ _times(3, c) ^ d,
                          a ^ b ^ _times(2, c) ^ _times(3, d), _times(3, a) ^ b ^ c ^ _times(2, d)]
            state = mixed
        state = [a ^ b for a, b in zip(state, key, strict=True)]
    return bytes(state)


def keystream(key: bytes, length: int, counter: int = 2) -> bytes:
    """AES-256-CTR: the encrypted counters, each of 16 bytes with the highest first."""
    keys = _round_keys(key)
    blocks = (_encrypt(keys, (counter + n).to_bytes(16, "big")) for n in range(-(-length // 16)))
    return b"".join(blocks)[:length]


def framed(*parts: bytes | str) -> bytes:
    made = b""
    for part in ("fedrun 1", *parts):
        raw = part if isinstance(part, bytes) else part.encode("utf-8")
        made += struct.pack(">Q", len(raw)) + raw
    return made


def mask(site: str, private: bytes, publics: Mapping[str, bytes], agreement: bytes, number: int,
         name: str, bits: int, size: int) -> Sequence[int]:
    """The mask of one site for one sum, as integers in [0, 2^bits).

    private: its X25519 key. publics: of all sites, in order. agreement: what all have signed.
    """
    total = [0] * size
    order = list(publics)
    for other in order:
        if other == site:
            continue
        first, second = sorted((site, other), key=order.index)
        secret = x25519(private, publics[other])
        key = expand(extract(framed(agreement, *publics.values()), secret),
                     framed("pair", first, second))
        for _ in range(number):
            key = expand(key, framed("next round"))
        stream = keystream(expand(key, framed("sum", str(number), name, str(bits))),
                           size * bits // 8)
        words = struct.unpack(f"<{size}{'I' if bits == 32 else 'Q'}", stream)
        sign = 1 if first == site else -1
        total = [(t + sign * w) % 2**bits for t, w in zip(total, words, strict=True)]
    return total
