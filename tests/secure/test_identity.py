"""Keys in files, public keys as text, and signatures that serve for one thing alone."""

from __future__ import annotations

import base64
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrun.common.errors import InputError
from fedrun.secure import ForgedSignature
from fedrun.secure.identity import Identity, derive, frame, public_key, public_text, verify
from tests.support import naive_crypto


def test_a_key_in_a_file(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = Identity.create(tmp_path / "key")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    again = Identity.load(tmp_path / "key")
    assert again.public == made.public
    assert again.sign("offer", "message") == made.sign("offer", "message")
    assert Identity.create(tmp_path / "other").public != made.public


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    made = Identity.create(tmp_path / "key")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("key", "link"):
        with pytest.raises(FileExistsError):
            Identity.create(tmp_path / name)
    assert Identity.load(tmp_path / "key").public == made.public
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o644, 0o666, 0o610])
def test_a_key_that_others_could_read_or_change(tmp_path: Path, mode: int) -> None:
    Identity.create(tmp_path / "key")
    (tmp_path / "key").chmod(mode)
    with pytest.raises(InputError, match=r"^/.*/key: must be .* for its owner alone"):
        Identity.load(tmp_path / "key")


@pytest.mark.parametrize("content", [
    b"", b"\n", bytes(32), b"A" * 43 + b"=" + b"\n" + b"A" * 100, b"ssh-ed25519 AAAA", b"A" * 42,
    b"-----BEGIN PRIVATE KEY-----\n", b"A" * 43 + b"!", "ä".encode() * 30])
def test_a_file_without_a_key(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    (tmp_path / "key").chmod(0o600)
    with pytest.raises(InputError, match=r"^/.*/key: must be a key's file") as refused:
        Identity.load(tmp_path / "key")
    assert not content.strip() or content.decode(errors="replace") not in str(refused.value)


def test_what_is_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name in ("pipe", "."):
        with pytest.raises(InputError, match="not a regular file"):
            Identity.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        Identity.load(tmp_path / "none")


def test_public_keys_as_text(tmp_path: Path) -> None:
    public = Identity.create(tmp_path / "key").public
    text = public_text(public)
    assert len(text) == len("ed25519:") + 44
    assert public_key(text) == public
    for wrong in ("", "ed25519:", text[:-1], text + "=", text + "\n", " " + text, text[8:],
                  "ed25519:" + text, text.replace("ed25519", "Ed25519"), text[:-4] + "====",
                  public_text(public + b"0"), public_text(public[:31]),
                  text[:20] + "\n" + text[20:],
                  text[:20] + "ä" + text[21:], "ed25519:" + "A" * 42 + "B="):
        with pytest.raises(InputError, match="must be a public key"):
            public_key(wrong)
    with pytest.raises(InputError) as refused:
        public_key("x" * 10_000)
    assert len(str(refused.value)) < 200


def test_a_signature_is_for_one_purpose_and_one_message(tmp_path: Path) -> None:
    identity, other = Identity.create(tmp_path / "a"), Identity.create(tmp_path / "b")
    signature = identity.sign("offer", "run", b"nonce")
    verify("north", identity.public, signature, "offer", "run", b"nonce")
    verify("north", identity.public, signature, "offer", b"run", "nonce")  # the same bytes
    for key, purpose, message in (
            (other.public, "offer", ("run", b"nonce")),
            (identity.public, "proof", ("run", b"nonce")),
            (identity.public, "offer", ("run", b"nonc")), (identity.public, "offer", ("runnonce",)),
            (identity.public, "offer", ("runn", b"once")), (identity.public, "offer", ()),
            (identity.public, "offerrun", (b"nonce",)), (bytes(31), "offer", ("run", b"nonce")),
            (identity.public, "offer", ("run", b"nonce", b""))):
        with pytest.raises(ForgedSignature, match=f"^north: its {purpose} is not signed by ed2"):
            verify("north", key, signature, purpose, *message)


PARTS = st.lists(st.binary(max_size=12), max_size=4)


@given(PARTS, PARTS)
def test_frames_are_equal_only_if_the_parts_are(one: list[bytes], other: list[bytes]) -> None:
    assert (frame(*one) == frame(*other)) == (one == other)
    assert frame(*one, frame(*other)) != frame(*one, *other)


def test_keys_for_different_purposes_differ() -> None:
    labels = [(), ("",), ("a",), ("a", "b"), ("ab",), ("b", "a"), ("sum", "1", "23"),
              ("sum", "12", "3")]
    assert len({derive(bytes(32), *label) for label in labels}) == len(labels)
    assert derive(bytes(32), "a") != derive(bytes(31) + b"\1", "a")


def test_a_tag_is_the_hmac_of_a_message_under_a_key_of_its_own(tmp_path: Path) -> None:
    mine, other = Identity.create(tmp_path / "mine"), Identity.create(tmp_path / "other")
    raw = base64.b64decode((tmp_path / "mine").read_bytes())
    expected = naive_crypto.expand(naive_crypto.expand(raw, frame("tags")), frame("one", b"two"))
    assert mine.tag("one", b"two") == expected == Identity.load(tmp_path / "mine").tag("one", "two")
    assert len({expected, mine.tag("onetwo"), mine.tag("one", "two", ""), other.tag("one", "two"),
                mine.tag()}) == 5
