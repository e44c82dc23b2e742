"""Finds the files of a dataset, their kind, and the split that each belongs to.

All files in a folder are read, at any depth and through links, except

    hidden files, __pycache__ and the like, virtual environments, folders of runs
    files that are neither text (see text_files.py) nor tables (see table_files.py)
    all but the most frequent kind, if there are text and tables, or tables of several kinds
    README.md and files that `datasets` writes to describe a dataset, unless there is only such text
    files whose names name no split, if others are named after train and another split

A file belongs to a split if its name or a folder's is the split's name: train.txt, test/,
dev-00000-of-00002; or if there are names that differ only in the split's name: wiki.train.txt and
wiki.test.txt. On its own, train_journey.txt is not a split. Files that match a pattern given by the
user are all train rows.
"""

from __future__ import annotations

import glob
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from fedrun.common.errors import InputError
from fedrun.data.dataset_card import find_configuration, listed_data_files, matches_pattern
from fedrun.data.table_files import KINDS
from fedrun.data.text_files import UNREADABLE, DataFile, is_text, printable

KIND_PREFERENCE = ["parquet", "arrow", "json", "csv", "text"]  # if counts are equal
DESCRIPTION_FILES = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json",
                "state.json"}  # fmt: skip
SPLITS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"),
          "test": ("test", "testing", "eval", "evaluation")}  # fmt: skip
SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}
SPLIT_WORD = re.compile(rf"(?<![^-._ ])({'|'.join(SPLIT_OF)})(?![^-._ \d])")
SHARD_NAME = re.compile(r"(.+?)[-._ ]?\d+([-._ ]of[-._ ]\d+)?(-[0-9a-f]{6,})?")
SPLIT_NAME_ENDINGS = {*KINDS, "", ".txt", ".text", ".raw", ".tokens"}  # not .py, a program
RUN_FILES = {"config.json", "events.jsonl"}  # a folder with both is the folder of a run
NAMES_IN_MESSAGES = 3  # of a list that may be long


@dataclass
class FoundFiles:
    """The files of a dataset that are read, and those that are left out."""

    folder: bool
    """Whether the dataset is a folder."""
    splits: dict[str, list[DataFile]] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Names of files, by the reason why they are left out."""
    other_kinds: set[str] = field(default_factory=set)
    """The reasons of those that are of other kinds than the files that are read."""
    doubtful: list[DataFile] = field(default_factory=list)
    """Files of the train split whose names contain the name of another split."""

    def leave_out(self, reason: str, files: Iterable[object]) -> None:
        self.left_out.setdefault(reason, []).extend(str(file) for file in files)

    def summary(self, used: Iterable[str]) -> str:
        """One line about the files that are read for the splits in `used`, and those left out."""
        used = list(used)
        parts = [f"{split}: {_counts_by_ending(files)}" for split, files in self.splits.items()
                 if split in used]
        parts += [f"not read: {len(files)} in the split {split} ({first_of(files)})"
                  for split, files in self.splits.items() if split not in used]
        parts += [f"not read: {len(names)} {reason} ({first_of(names)})"
                  for reason, names in self.left_out.items() if names]
        if self.doubtful:
            parts.append(f"read as train rows, since only whole names are splits: "
                         f"{first_of(self.doubtful)}")
        return "; ".join(parts)

    def describe_other_kinds(self) -> str:
        """For an error about the kind of files that was chosen: the files of other kinds."""
        return "".join(f"; not read: {len(names)} {reason} ({first_of(names)})"
                       for reason, names in self.left_out.items() if reason in self.other_kinds)


def first_of(names: Iterable[object]) -> str:
    """For a message: the first NAMES_IN_MESSAGES names, and the number of the others."""
    listed = [n.name.as_posix() if isinstance(n, DataFile) else str(n) for n in names]
    others = len(listed) - NAMES_IN_MESSAGES
    return ", ".join(map(printable, listed[:NAMES_IN_MESSAGES])) + (
        f", and {others} more" if others > 0 else "")


def _counts_by_ending(files: list[DataFile]) -> str:
    endings = Counter("".join(file.name.suffixes[-2:]) if file.plain_name != file.name
                      else file.name.suffix for file in files)
    kinds = [f"{count} {ending or 'without an ending'}" for ending, count in endings.most_common()]
    return f"{len(files)} file{'s' * (len(files) != 1)} ({', '.join(kinds[:5])}" \
           f"{', ...' * (len(kinds) > 5)})"


# ---- listing files ------------------------------------------------------------------------------

def folder_of(dataset: str) -> tuple[Path, str | None] | None:
    """The folder that `dataset` names and the CONFIG of FOLDER:CONFIG; None if not a folder."""
    path = Path(os.path.expanduser(dataset))
    if path.is_dir():
        return path.resolve(), None
    before, colon, config = dataset.rpartition(":")
    path = Path(os.path.expanduser(before))
    return (path.resolve(), config) if colon and before and config and path.is_dir() else None


def matching_files(pattern: str) -> list[Path]:
    """The files that match a path or a pattern, sorted."""
    pattern = os.path.expanduser(pattern)
    if os.path.isfile(pattern):
        return [Path(pattern)]
    found = sorted(Path(match) for match in glob.iglob(pattern, recursive=True))
    if not found:  # parts at the beginning that exist are taken literally: 'texts[v2]/*.txt'
        parts, base = Path(pattern).parts, Path()
        literal = 0
        while literal < len(parts) and (base / parts[literal]).exists():
            base, literal = base / parts[literal], literal + 1
        rest = str(Path(*parts[literal:]))
        found = sorted(base / match for match in glob.iglob(rest, root_dir=base, recursive=True))
    return [file for file in found if file.is_file()]


def files_below(folder: Path, skipped: list[str] | None = None) -> list[Path]:
    """The files below a folder, sorted by their paths as strings.

    Links are followed except those to a parent folder; no folder is entered twice.

    Args:
        skipped: collects the names of folders that are not entered and of special files.
    Raises:
        OSError: a folder cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    found: list[Path] = []
    folders, links = [folder], list[Path]()  # links last: a folder is listed under its own name
    while folders or links:
        current = folders.pop() if folders else links.pop()
        status = current.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(current) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
        names = {entry.name for entry in visible}
        if current != folder and ("pyvenv.cfg" in names or names >= RUN_FILES):
            if skipped is not None:
                skipped.append(f"{current.relative_to(folder).as_posix()}/")
            continue
        for entry in sorted(visible, key=lambda entry: entry.name, reverse=True):
            path = current / entry.name
            if path.is_dir():
                above = entry.is_symlink() and current.resolve().is_relative_to(path.resolve())
                if not entry.name.startswith("__") and not above:
                    (links if entry.is_symlink() else folders).append(path)
            elif path.is_file():
                found.append(path)
            elif skipped is not None:
                skipped.append(path.relative_to(folder).as_posix())
    return sorted(found, key=lambda path: path.as_posix())


def _members(path: Path, name: PurePath) -> Iterator[DataFile]:
    """The file itself, or if it is an archive, the files in it."""
    if path.suffix.lower() != ".zip":
        yield DataFile(path, name)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info.filename for info in archive.infolist() if not info.is_dir()]
    except UNREADABLE as error:
        raise InputError(f"{printable(path)}: cannot be read: {error}") from error
    def files_first(member: str) -> list[tuple[bool, str]]:
        *folders, last = PurePath(member).parts
        return [*((True, folder) for folder in folders), (False, last)]

    for member in sorted(members, key=files_first):
        if not any(part.startswith((".", "__")) for part in PurePath(member).parts):
            yield DataFile(path, name / member, member)


# ---- choosing files -----------------------------------------------------------------------------

def discover(dataset: str, encoding: str | None, tables_only: bool, extra_split: str | None
             ) -> FoundFiles:
    """Find the files of a folder, a pattern or a path, by split.

    Args:
        dataset: the value of --dataset.
        encoding: of text without a byte-order mark; None: UTF-8.
        tables_only: prefer tables to text, because the user asks for columns.
        extra_split: the name of a split in addition to the usual ones.
    Raises:
        InputError: a file cannot be read, or no file is text or a table.
    """
    located = folder_of(dataset)
    found = FoundFiles(located is not None)
    explicit: dict[str, list[DataFile]] | None = None
    if located is None:
        files = [member for path in matching_files(dataset)
                 for member in _members(path, Path(path.name))]
    else:
        folder, configuration = located
        inside, patterns = find_configuration(folder, configuration)
        folder /= inside
        skipped: list[str] = []
        try:
            paths = files_below(folder, skipped)
        except OSError as error:
            raise InputError(f"{printable(error.filename or folder)}: {error.strerror}") from error
        found.leave_out("special files, or folders of runs or environments", skipped)
        files = [member for path in paths for member in _members(path, path.relative_to(folder))]
        if patterns is None:
            files = _without_descriptions(files, found)
        else:
            explicit = {split: [file for pattern in wanted for file in files
                                if matches_pattern(file.name.as_posix(), pattern)]
                        for split, wanted in patterns.items()}
            named = {file for part in explicit.values() for file in part}
            found.leave_out("not named by the configuration",
                            (file.name.as_posix() for file in files if file not in named))
            files = [file for file in files if file in named]
    files = _of_one_kind(files, found, encoding, tables_only)
    if not files:
        left_out = [name for names in found.left_out.values() for name in names]
        raise InputError(
            "no file can be read: must be text (UTF-8, or see --encoding) or .jsonl, .json, .csv, "
            ".tsv, .parquet, .arrow files, also as .gz, .bz2, .xz, .zst or in .zip; "
            + (f"found {first_of(left_out)}" if left_out else "there is no file"))
    if explicit is not None:
        readable = set(files)
        found.splits = {SPLIT_OF.get(split, split): kept for split, part in explicit.items()
                        if (kept := [file for file in part if file in readable])}
    elif located is None:
        found.splits = {"train": files}
    else:
        _assign_splits(files, found, extra_split)
    return found


def _without_descriptions(files: list[DataFile], found: FoundFiles) -> list[DataFile]:
    """Leave out descriptions of a dataset, and .arrow files that a saved dataset does not list."""
    described = [file for file in files if file.name.name in DESCRIPTION_FILES]
    rest = [file for file in files if file.name.name not in DESCRIPTION_FILES]
    readmes = [file for file in rest if file.name.name == "README.md"]
    others = [file for file in rest if file not in readmes]
    if others and not any(file.suffix == ".md" for file in others):
        described, rest = described + readmes, others
    if not rest:
        return files
    found.leave_out("describing the dataset", (file.name.as_posix() for file in described))
    unlisted = {file for state in described if state.name.name == "state.json"
             for file in rest if file.suffix == ".arrow" and file.path.parent == state.path.parent
             and file.path.name not in listed_data_files(state.path)}
    found.leave_out("not part of the saved dataset", (f.name.as_posix() for f in unlisted))
    return [file for file in rest if file not in unlisted]


def _of_one_kind(files: list[DataFile], found: FoundFiles, encoding: str | None, tables_only: bool
                 ) -> list[DataFile]:
    """The files of the kind with the most frequent ending, which is the rule of `datasets`."""
    kinds: dict[DataFile, str] = {}
    for file in files:
        if file.suffix in KINDS:
            kinds[file] = KINDS[file.suffix]
        elif is_text(file, encoding):
            kinds[file] = "text"
        else:
            found.leave_out("not text", [file.name.as_posix()])
    counts = Counter((file.suffix, kind) for file, kind in kinds.items())
    tables = {ending: count for ending, count in counts.items() if ending[1] != "text"}
    ranked = tables if tables_only and tables else counts
    if not ranked:
        return []
    best = max(ranked, key=lambda key: (ranked[key], -KIND_PREFERENCE.index(key[1])))[1]
    for kind in sorted(set(kinds.values()) - {best}):
        reason = f"of {kind}, fewer than of {best} (name them to read them)"
        found.other_kinds.add(reason)
        found.leave_out(reason, (file.name.as_posix() for file, other in kinds.items()
                                 if other == kind))
    return [file for file in files if kinds.get(file) == best]


# ---- splits -------------------------------------------------------------------------------------

def _assign_splits(files: list[DataFile], found: FoundFiles, extra_split: str | None) -> None:
    """Set `found.splits`; see the top of this file for the rules."""
    named = _splits_by_name(files, extra_split)
    splits: dict[str, list[DataFile]] = {}
    for file in files:
        splits.setdefault(named.get(file, ""), []).append(file)
    rest = splits.pop("", [])
    if rest and "train" in splits and len(splits) > 1:
        found.leave_out("in no split, unlike others",
                        (file.name.as_posix() for file in rest))
    elif rest:
        found.doubtful = [file for file in rest for _, name in [*_path_names(file)][-1:]
                          if {SPLIT_OF[word] for word in SPLIT_WORD.findall(name)} - {"train"}]
        order = {file: number for number, file in enumerate(files)}
        splits["train"] = sorted([*splits.get("train", []), *rest], key=order.__getitem__)
    found.splits = {split: splits[split] for split in
                    sorted(splits, key=lambda s: (s not in SPLITS, list(SPLITS).index(s)
                                                  if s in SPLITS else 0, s))}


def _splits_by_name(files: list[DataFile], extra_split: str | None) -> dict[DataFile, str]:
    """The split of each file that has one by name; the name of the outermost folder decides."""
    # By folder and name with * in place of a split: the splits that stand there.
    pairs: dict[tuple[PurePath, str], set[str]] = {}
    shards: set[tuple[PurePath, str]] = set()
    for file in files:
        for parent, name in _path_names(file):
            for word in SPLIT_WORD.finditer(name):
                pairs.setdefault((parent, name[:word.start()] + "*" + name[word.end():]),
                                 set()).add(SPLIT_OF[word[1]])
            if shard := SHARD_NAME.fullmatch(name):
                shards.add((parent, shard[1]))
    named: dict[DataFile, str] = {}
    for file in files:
        for parent, name in _path_names(file):
            shard = SHARD_NAME.fullmatch(name)
            whole = shard[1] if shard else name
            if extra_split and extra_split in (name, whole):
                named[file] = extra_split
            elif split := SPLIT_OF.get(name) or SPLIT_OF.get(whole):
                named[file] = split
            elif shard and shard[2] and (parent, "train") in shards:
                named[file] = whole  # random-00000-of-00003 beside train-00000-of-00010
            else:
                for word in SPLIT_WORD.finditer(name):
                    if len(pairs[parent, name[:word.start()] + "*" + name[word.end():]]) > 1:
                        named.setdefault(file, SPLIT_OF[word[1]])
            if file in named:
                break
    return named


def _path_names(file: DataFile) -> Iterator[tuple[PurePath, str]]:
    """Parent and name of each folder of a file, outermost first, and then of the file itself."""
    for folder in [*file.name.parents][-2::-1]:
        yield folder.parent, folder.name.lower()
    if file.suffix in SPLIT_NAME_ENDINGS:
        yield file.name.parent, file.plain_name.stem.lower()
