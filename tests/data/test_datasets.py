"""Which files of a dataset are read, from which splits, and what their rows are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fedrun.data import cache_entry, tokens
from fedrun.data.text_options import TextOptions
from fedrun.flags import resolve
from tests.support.texts import files_in, lines, load, write

# ---- which files --------------------------------------------------------------------------------

def test_no_file_is_taken_for_a_split_by_a_part_of_its_name(tmp_path: Path) -> None:
    names = ["garden.txt", "harbour.txt", "paris.txt", "test_results.txt", "train_journey.txt",
             "winter.txt"]
    corpus = load(write(tmp_path / "diary", *names))
    assert files_in(corpus.train + corpus.validation) == names
    assert len(corpus.train) + len(corpus.validation) == 240
    assert "train: 6 files (6 .txt)" in corpus.read
    assert "read as train rows, since only whole names are splits: test_results.txt" in corpus.read
    pattern = load(tmp_path / "diary" / "*.txt")
    assert [row.rstrip("\n") for row in pattern.train] == corpus.train
    assert [row.rstrip("\n") for row in pattern.validation] == corpus.validation


@pytest.mark.parametrize(("names", "train", "validation"), [
    (["train.txt", "validation.txt"], ["train.txt"], ["validation.txt"]),
    (["train/a.txt", "train/b/c.txt", "dev/a.txt", "unseen/a.txt"],
     ["train/a.txt", "train/b/c.txt"], ["dev/a.txt"]),
    (["dev/x.txt", "paris.txt"], ["paris.txt"], ["dev/x.txt"]),
    (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "val-00000-of-00001.jsonl",
      "random-00000-of-00001.jsonl"],
     ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"], ["val-00000-of-00001.jsonl"]),
    (["data/random-00000-of-00001.jsonl", "data/train-00000-of-00001.jsonl"],
     ["data/train-00000-of-00001.jsonl"], ["data/train-00000-of-00001.jsonl"]),
    (["wiki.test.txt", "wiki.train.txt", "wiki.valid.txt"], ["wiki.train.txt"],
     ["wiki.valid.txt"]),
    (["train.txt", "notes.txt"], ["notes.txt", "train.txt"], ["train.txt"]),
    (["test.py", "train.py"], ["test.py", "train.py"], ["train.py"]),
])
def test_splits_are_named_by_whole_names(tmp_path: Path, names: list[str], train: list[str],
                                         validation: list[str]) -> None:
    corpus = load(write(tmp_path / "set", *names))
    assert files_in(corpus.train) == train
    assert files_in(corpus.validation) == validation
    unread = set(names) - set(train) - set(validation)
    assert all(name in corpus.read.partition("not read")[2] for name in unread)


@pytest.mark.parametrize("name", ["a.md", "a.TXT", "a.py", "a.rst", "LICENSE"])
def test_text_is_read_whatever_its_name_ends_in(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "texts [v2]", name, f"deep/{name}")
    corpus = load(folder)
    assert files_in(corpus.train) == [name, f"deep/{name}"]
    assert files_in(load(folder / name).train) == [name]
    assert files_in(load(f"{folder}/*").train) == [name]
    assert len(load(folder / name).train) == 38


def test_the_current_folder_is_a_dataset_and_nothing_is_none(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write(tmp_path / "here", "a.txt", "results/run/lock.txt"))
    for name in ("config.json", "events.jsonl"):
        (tmp_path / "here" / "results" / "run" / name).write_text("{}")
    corpus = load(".")
    assert (corpus.name, files_in(corpus.train)) == ("here", ["a.txt"])
    assert "folders of runs or environments (results/run/)" in corpus.read
    for empty in ("", " "):
        with pytest.raises(ValueError, match=r"--dataset is empty .*'\.' is the current one"):
            load(empty)
        with pytest.raises(ValueError, match="--dataset is empty"):
            resolve("fed_avg", {"dataset": empty})


def test_links_are_followed_once_and_never_up(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "far.txt")
    folder = write(tmp_path / "set", "near/a.txt")
    os.symlink(tmp_path / "elsewhere", folder / "away")
    os.symlink(tmp_path / "elsewhere", folder / "again")
    os.symlink("../..", folder / "near" / "up")
    os.symlink("nowhere", folder / "broken")
    os.mkfifo(folder / "pipe")
    corpus = load(folder)
    assert files_in(corpus.train) == ["far.txt", "near/a.txt"]
    assert corpus.documents.sources == ["again", "near"]
    assert "pipe" in corpus.read.partition("not read")[2]
    assert "broken" in corpus.read.partition("not read")[2]


def test_unreadable_files_are_left_out_and_reported(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", "a.txt", "b.txt", "c.jsonl", "README.md", ".hidden.txt",
                   "__pycache__/d.txt")
    (folder / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    corpus = load(folder)
    assert files_in(corpus.train) == ["a.txt", "b.txt"]
    for reported in ("train: 2 files (2 .txt)", "not read: 1 not text (photo.png)",
                 "1 of json, fewer than of text (name them to read them) (c.jsonl)",
                 "1 describing the dataset (README.md)"):
        assert reported in corpus.read
    assert files_in(load(folder / "c.jsonl").train) == ["c.jsonl"]
    notes = load(write(tmp_path / "notes", "README.md", "other.md"))
    assert files_in(notes.train) == ["README.md", "other.md"]


def test_a_folder_without_text_says_what_was_looked_for_and_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    for dataset in (tmp_path, tmp_path / "photo.png"):
        with pytest.raises(ValueError, match=r"--dataset .*: no file can be read: must be text "
                                             r".*\.jsonl.*; found photo.png"):
            load(dataset)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"--dataset .*empty: the folder has no files"):
        load(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"--dataset .*missing.txt: no such file, folder or name"):
        load("corpus/missing.txt")
    with pytest.raises(ValueError, match=r"--dataset aaa.*: File name too long"):
        load("a" * 5000)


def test_files_that_may_not_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                              ) -> None:
    folder = write(tmp_path / "set", "a.txt", "deep/b.txt")

    def refuse(path: object, *args: object, **kwargs: object) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as locked:
        locked.setattr(Path, "open", refuse)
        with pytest.raises(ValueError, match=rf"--dataset {folder}: {folder}/a\.txt: cannot be "
                                             "read: Permission denied"):
            load(folder)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=rf"--dataset {folder}: .*set: Permission denied"):
        load(folder)


def test_configurations_are_named_after_the_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", "en/a.jsonl", "fr/one.jsonl", "fr/two.jsonl")
    assert files_in(load(f"{folder}:en").train) == ["en/a.jsonl"]
    with pytest.raises(ValueError, match=r"no configuration de: .* the folders are en, fr"):
        load(f"{folder}:de")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: english\n  data_files: en/*.jsonl\n- config_name: french\n"
        "  data_files:\n  - split: train\n    path: fr/one.jsonl\n  - split: test\n"
        "    path: [fr/two.jsonl]\n---\n# A dataset\n")
    assert files_in(load(f"{folder}:english").train) == ["en/a.jsonl"]
    french = load(f"{folder}:french", validation_split="test")
    assert (files_in(french.train), files_in(french.validation)) == (
        ["fr/one.jsonl"], ["fr/two.jsonl"])
    assert french.name == "set:french"
    with pytest.raises(ValueError, match=r"several configurations \(english, french\)"):
        load(folder)
    with pytest.raises(ValueError, match="no configuration de; the configurations are english"):
        load(f"{folder}:de")
    (folder / "README.md").write_text("---\nconfigs:\n- data_dir: fr\n---\n")
    assert files_in(load(folder).train) == ["fr/one.jsonl", "fr/two.jsonl"]
    (folder / "README.md").write_text("---\nconfigs:\n- data_dir: ../..\n---\n")
    with pytest.raises(ValueError, match=r"the data_dir \.\./\.\. of default is outside"):
        load(folder)
    (folder / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(ValueError, match=r"README\.md: its YAML block cannot be read"):
        load(folder)
    (folder / "README.md").write_bytes(b"---\nNotes: of \xe9: all\n---\n")
    assert len(files_in(load(folder).train)) == 3


def test_how_text_is_read_is_part_of_the_caches_key_and_logged_at_every_start(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fedrun")
    choices: list[dict[str, Any]] = [
        {}, {"text_column": "text"}, {"encoding": "latin-1"}, {"val_fraction": 0.1},
        {"validation_split": "test"}, {"partition": "column:user"}, {"hold_out": False},
        {"row_separator": "none"}, {"max_tokens": 9}, {"stream": True}]
    names = {cache_entry.entry_name("pydocs", "bpe:400", TextOptions(**choice))
             for choice in choices}
    assert len(names) == len(choices)
    assert TextOptions().key == [None, None, None, None, "", True], \
        "the key of text that was tokenised before --row_separator existed"
    folder = write(tmp_path / "set", "a.txt", "b.txt", "c.json")
    for _ in ("cold", "warm"):
        caplog.clear()
        tokens.prepare(str(folder), "bpe:300", 16, tmp_path)
        assert caplog.messages[-2].startswith(
            "read from set: train: 2 files (2 .txt); not read: 1 of json")


# ---- encodings ----------------------------------------------------------------------------------

def test_other_encodings_are_named_with_file_place_and_way_out(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", "a.txt")
    (folder / "b.txt").write_bytes(("x\n" * 9 + "café\n").encode("latin-1"))
    for dataset in (folder, folder / "b.txt", folder / "*.txt"):
        with pytest.raises(ValueError, match=r"b\.txt: not UTF-8 text \(byte 0xe9 at position 21, "
                                             r"line 10\); try --encoding latin-1"):
            load(dataset)
    assert load(folder, encoding="latin-1").validation[-1] == "café"
    (folder / "b.txt").write_bytes(b"x\n" * (1 << 20) + b"caf\xe9")
    with pytest.raises(ValueError, match=r"byte 0xe9 at position 2097155, line 1048577"):
        load(folder)
    (folder / "b.txt").write_bytes("and here\n".encode("utf-16-le") * 9)
    with pytest.raises(ValueError, match=r"b.txt: not UTF-8 .*--encoding utf-16-le"):
        load(folder)
    with pytest.raises(ValueError, match="--encoding latin-one: must be an encoding known"):
        resolve("fed_avg", {"encoding": "latin-one"})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le"])
def test_a_byte_order_mark_sets_the_encoding_and_is_not_text(tmp_path: Path, encoding: str) -> None:
    text = "".join(f"{line} café\n" for line in lines("it"))
    (tmp_path / "a.txt").write_bytes(("\ufeff" + text).encode(encoding))
    assert load(tmp_path / "a.txt").train == text.splitlines(keepends=True)[:38]
    (tmp_path / "a.csv").write_bytes(("\ufefftext\n" + text).encode(encoding))
    assert load(tmp_path / "a.csv").train == text.splitlines()[:38]
