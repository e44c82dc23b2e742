"""Known answers: of the library, of fedrun's use of it, and of the naive second implementation."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedrun.secure.identity import Identity, derive
from fedrun.secure.masks import PIECE, Mask
from fedrun.secure.noise import Keystream
from tests.support import naive_crypto as naive

BASE = (9).to_bytes(32, "little")


def test_x25519_of_rfc_7748() -> None:
    """Section 5.2, first vector, and the exchange of section 6.1."""
    scalar = bytes.fromhex("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4")
    point = bytes.fromhex("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c")
    result = "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"
    key, public = X25519PrivateKey.from_private_bytes(scalar), X25519PublicKey.from_public_bytes
    assert key.exchange(public(point)).hex() == naive.x25519(scalar, point).hex() == result

    alice = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    bob = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    of_alice = "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    of_bob = "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    secret = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    for private, own, other in ((alice, of_alice, of_bob), (bob, of_bob, of_alice)):
        key = X25519PrivateKey.from_private_bytes(private)
        assert key.public_key().public_bytes_raw().hex() == naive.x25519(private, BASE).hex() == own
        point = bytes.fromhex(other)
        assert key.exchange(public(point)).hex() == naive.x25519(private, point).hex() == secret


def test_hkdf_of_rfc_5869() -> None:
    """Appendix A.1."""
    secret, salt, info = bytes([0x0b] * 22), bytes(range(13)), bytes(range(0xf0, 0xfa))
    key = "077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5"
    made = ("3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"
            "34007208d5b887185865")
    assert HKDF(SHA256(), 42, salt, info).derive(secret).hex() == made
    assert naive.extract(salt, secret).hex() == key
    assert naive.expand(bytes.fromhex(key), info, 42).hex() == made
    assert derive(bytes.fromhex(key), "a", b"b") == naive.expand(bytes.fromhex(key),
                                                                 naive.framed("a", "b"))


def test_aes_256_in_counter_mode_of_nist_sp_800_38a() -> None:
    """Appendix F.5.5."""
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    plain = bytes.fromhex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
                          "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710")
    made = bytes.fromhex("601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
                         "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6")
    assert Cipher(algorithms.AES256(key), modes.CTR(counter)).encryptor().update(plain) == made
    stream = naive.keystream(key, 64, int.from_bytes(counter, "big"))
    assert bytes(a ^ b for a, b in zip(plain, stream, strict=True)) == made


def test_the_first_block_of_a_mask() -> None:
    """McGrew & Viega, "The Galois/Counter Mode of Operation", appendix B, test case 14."""
    vector = np.zeros(4, np.int32)
    Mask([(True, bytes(32))], 32).add_to(vector)
    assert vector.tobytes().hex() == "cea7403d4d606b6e074ec5d3baf39d18"
    wide = np.zeros(2, np.int64)
    Mask([(False, bytes(32))], 64).add_to(wide)
    assert (-wide).tobytes() == vector.tobytes()


@pytest.mark.parametrize("size", [1, 5, PIECE // 4 + 1, 200_003])
def test_a_mask_is_the_keystream_of_plain_counter_mode(size: int) -> None:
    """From the counter at which GCM begins, 2 (NIST SP 800-38D, sections 7.1 and 6.2), and on over
    the pieces in which it is made."""
    key, vector = bytes(range(32)), np.zeros(size, np.int32)
    Mask([(True, key)], 32).add_to(vector)
    plain = Cipher(algorithms.AES256(key), modes.CTR((2).to_bytes(16, "big"))).encryptor()
    assert vector.tobytes() == plain.update(bytes(4 * size))


def test_chacha20_of_rfc_8439() -> None:
    """Section 2.3.2, whose block is the second of its nonce's, and appendix A.1, vectors 1 and 2.
    Over many blocks the two implementations agree."""
    key, nonce = bytes(range(32)), bytes.fromhex("000000090000004a00000000")
    block = ("10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
             "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e")
    assert Keystream(key, nonce).read(128)[64:].hex() == block
    assert naive.chacha20(key, nonce, 64, counter=1).hex() == block
    zero = ("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
            "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
            "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
            "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f")
    assert Keystream(bytes(32), bytes(12)).read(128).hex() == zero
    assert naive.chacha20(bytes(32), bytes(12), 128).hex() == zero
    stream, size = Keystream(key, nonce), 40_000
    assert b"".join(map(stream.read, (1, 63, 0, 1000, size))) == naive.chacha20(
        key, nonce, size + 1064)


@pytest.mark.parametrize(("private", "public", "message", "signature"), [
    ("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
     "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a", "",
     "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
     "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"),
    ("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
     "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c", "72",
     "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
     "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00")])
def test_ed25519_of_rfc_8032(private: str, public: str, message: str, signature: str) -> None:
    """Section 7.1, tests 1 and 2."""
    assert Identity(bytes.fromhex(private)).public.hex() == public
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(private))
    assert key.sign(bytes.fromhex(message)).hex() == signature
