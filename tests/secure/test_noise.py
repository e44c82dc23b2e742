"""The key of the noise in its file, and what comes of it."""

from __future__ import annotations

import base64
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedrun.common.errors import InputError, explain
from fedrun.secure.noise import KEY, NoiseKey, noise_name, stream
from tests.support import naive_crypto
from tests.support.disk import full
from tests.support.runs import ROOT

BINDING: dict[str, str | int] = {"run": "first", "round": 3, "model": "ab", "threads": 1}


def test_a_key_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    before, folder = os.umask(0), tmp_path / "state" / "fedrun"
    try:
        made = NoiseKey.open(folder)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / KEY).stat().st_mode) == 0o600
    content = (folder / KEY).read_bytes()
    again = NoiseKey.open(folder)
    assert (folder / KEY).read_bytes() == content
    assert again.name == made.name
    assert again.round_key(BINDING) == made.round_key(BINDING)
    other = NoiseKey.open(tmp_path / "other")
    assert other.name != made.name
    assert other.round_key(BINDING) != made.round_key(BINDING)


def test_it_is_what_the_standards_make_of_it(tmp_path: Path) -> None:
    """HKDF and ChaCha20 once more, from the file on."""
    made, raw = NoiseKey.open(tmp_path), base64.b64decode((tmp_path / KEY).read_bytes())
    assert len(raw) == 32
    key = naive_crypto.expand(raw, naive_crypto.framed(
        "round", '{"model": "ab", "round": 3, "run": "first", "threads": 1}'))
    assert made.round_key(BINDING) == key
    streamed = naive_crypto.expand(key, naive_crypto.framed("stream"))
    for block in (0, 1, 300):
        nonce = block.to_bytes(12, "little")
        assert stream(key, block).read(200) == naive_crypto.chacha20(streamed, nonce, 200)


def test_another_binding_is_another_noise() -> None:
    """Whatever differs in it; not the order in which it is written down."""
    key = NoiseKey(bytes(32))
    bindings: list[dict[str, str | int]] = [
        BINDING, BINDING | {"round": 4}, BINDING | {"round": "3"}, BINDING | {"model": "ac"},
        BINDING | {"more": ""}, {"run": "first", "round": 3}, {}, BINDING | {"run": "first\0"},
        {"run": 'first", "round": 3'}, {"round": 3, "run": "f", "irst": ""}]
    keys = [key.round_key(binding) for binding in bindings]
    assert len(set(keys)) == len({noise_name(one) for one in keys}) == len(bindings)
    assert key.round_key(dict(reversed(BINDING.items()))) == keys[0]
    assert len({stream(one, block).read(32) for one in keys for block in range(3)}) == 30
    assert stream(keys[0], 1).read(32) == stream(keys[0], 1).read(32)


def test_commitments(tmp_path: Path) -> None:
    """They tell data apart, under one key alone."""
    key, other = NoiseKey(bytes(32)), NoiseKey(bytes(31) + b"1")
    made = {key.commitment("a", b"b"), key.commitment("ab"), key.commitment("a"),
            key.commitment(), other.commitment("ab"), key.name, other.name,
            noise_name(key.round_key({}))}
    assert len(made) == 8
    assert key.commitment("a", b"b") == key.commitment(b"a", "b")
    assert all(len(one) == 64 for one in made)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_key_that_others_could_read(tmp_path: Path, mode: int) -> None:
    NoiseKey.open(tmp_path)
    (tmp_path / KEY).chmod(mode)
    with pytest.raises(InputError, match=r"^/.*/noise.key: must be .* for its owner alo") as found:
        NoiseKey.open(tmp_path)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o720, 0o777])
def test_a_folder_that_others_could_change(tmp_path: Path, mode: int) -> None:
    """They could take the key away, or the log, and the next start would make others."""
    folder = tmp_path / "state"
    folder.mkdir(mode)
    folder.chmod(mode)
    with pytest.raises(InputError, match=r"^/.*/state: must be a folder that its owner alone may"):
        NoiseKey.open(folder)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("content", [b"", b"A" * 40 + b"\n", bytes(32), b"key", b"A" * 43 + b"!"])
def test_a_file_without_a_key(tmp_path: Path, content: bytes) -> None:
    """It is never replaced: the log beside it belongs to the key that was there."""
    (tmp_path / KEY).write_bytes(content)
    (tmp_path / KEY).chmod(0o600)
    with pytest.raises(InputError, match=r"^/.*/noise.key: must be a key's file"):
        NoiseKey.open(tmp_path)
    assert (tmp_path / KEY).read_bytes() == content


def test_what_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError) as refused:
        NoiseKey.open(tmp_path / "file")
    assert explain(refused.value) == f"{tmp_path}/file: File exists"
    os.mkfifo(tmp_path / KEY, 0o600)
    with pytest.raises(InputError, match="not a regular file"):
        NoiseKey.open(tmp_path)


def test_a_full_disk_leaves_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device") as failed:
            NoiseKey.open(tmp_path)
        assert (explain(failed.value) or "").startswith(f"{tmp_path}/{KEY}: No space left on")
    assert [path.name for path in tmp_path.iterdir()] == [f"{KEY}.lock"]
    assert NoiseKey.open(tmp_path).name == NoiseKey.open(tmp_path).name


def test_it_is_never_readable_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor in part: it appears whole, and with its permissions."""
    replace, seen = os.replace, list[tuple[int, int]]()

    def look(source: str, target: Path) -> None:
        status = os.stat(source)
        seen.append((stat.S_IMODE(status.st_mode), status.st_size))
        assert not target.exists()
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    monkeypatch.setattr(os, "fchmod", lambda *_: pytest.fail("permissions are changed"))
    NoiseKey.open(tmp_path)
    assert seen == [(0o600, 45)]


def test_many_starts_at_once_make_one_key(tmp_path: Path) -> None:
    """Threads of this process, and processes."""
    program = "import sys; from pathlib import Path; from fedrun.secure.noise import NoiseKey; " \
              "print(NoiseKey.open(Path(sys.argv[1])).name)"
    processes = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT,
                                  stdout=subprocess.PIPE, text=True) for _ in range(2)]
    with ThreadPoolExecutor(4) as pool:
        names = list(pool.map(lambda _: NoiseKey.open(tmp_path).name, range(8)))
    names += [process.communicate(timeout=60)[0].strip() for process in processes]
    assert len(names) == 10
    assert len(set(names)) == 1
