"""A site's part of the checkpoints: its clients' states, which never leave it.

    SITE_DIR/states/RUN/step_000030/client_0.safetensors  as in any checkpoint, for its own clients
                                    site_0.json           by its first process: what is written here
                                    site_1.json           by its second

Each process of a site writes the files of its clients and, last, a record of them, with their
checksums, the run, the file of the sites, the site's own text and the global model that they go
with. All that leaves the site is a tag of each record, an HMAC that nobody else can make. The
server's manifest holds the tags, and a step can be resumed from if the site still has records with
just these tags, and every file that they name.

The server says in each plan which steps it has or may still complete; a site keeps these, so that
after a kill of anybody at any moment there is a step that all of them have.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from fedrun.common.errors import ErrorCode, InputError, explain
from fedrun.common.files import claim, read_json, write_atomic
from fedrun.common.log import WARNING, log
from fedrun.records.checkpoint import (
    GLOBAL,
    Checkpoint,
    Checksums,
    digests_of,
    discard,
    step_folders,
    step_of,
    valid_checkpoints,
    verify_files,
)
from fedrun.records.folders import Folders
from fedrun.records.run_files import manifest_checksum
from fedrun.records.run_lock import check_ownership, lock_run_dir, release_run_dir

_RECORD = re.compile(r"site_\d+\.json")
Tags = dict[str, list[str]]
"""Tags of a site's records, by step: a number in decimal, as JSON has it."""


class TextChanged(InputError):
    """The text of this site is not the one that its clients were trained on."""

    code: ClassVar[ErrorCode] = "text"


@dataclass(frozen=True)
class SiteCheckpoint(Checkpoint):
    """A checkpoint at a site: its clients' files, and what the server has handed out."""

    files: Checksums
    state: Mapping[str, Tensor] = field(repr=False)
    """The global model and what else is the same on every worker, by name."""

    @property
    def checksums(self) -> Checksums:
        return self.files

    def tensors(self, name: str) -> dict[str, Tensor]:
        return dict(self.state) if name == GLOBAL else super().tensors(name)


@dataclass(frozen=True)
class SiteStates:
    """One process's part of what a site keeps of one run."""

    folders: Folders
    tag: Callable[[bytes], bytes] = field(repr=False)
    """An HMAC under a key that this site alone has: `secure.identity.Identity.tag`."""
    run: str
    """The run's id."""
    sites: str
    """Digest of the file of the sites."""
    text: str = field(repr=False)
    """Digest of this site's own text and of how it is dealt. It stays here."""
    process: int = 0
    """Index of this process among those of the site, which share its folder."""
    processes: int = 1

    def hold(self, token: str) -> None:
        """Before anything is written: the site's first process holds the folders of this run, the
        others write there only while it does. The token is the run's, and new at each start.

        Raises RunDirLocked if processes of an earlier start still live.
        """
        states, clients = self.folders.states, self.folders.clients
        for folder in (states, clients):
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
        if self.process == 0:
            lock_run_dir(states, token)
        for folder in (states, clients):
            claim(folder, lambda: check_ownership(states, token))

    def release(self) -> None:
        """When nothing is written any more."""
        claim(self.folders.clients, None)
        release_run_dir(self.folders.states)

    # ---- writing ---------------------------------------------------------------------------------

    def seal(self, folder: Path, step: int, files: Checksums, state: Mapping[str, Tensor]) -> str:
        """Record what this process has written of a step; returns the record's tag.

        state: on the site's first process the global state after this step, on the CPU, whose
        digests are recorded; {} on the others.
        """
        body = {"step": step, "run": self.run, "sites": self.sites, "text": self.text,
                "files": files, "state": digests_of(state)}
        content = json.dumps(body | {"sha256": manifest_checksum(body)}, indent=1).encode()
        write_atomic(folder / f"site_{self.process}.json", content)
        return self._tag(content)

    def _tag(self, content: bytes) -> str:
        return self.tag(b"checkpoint " + hashlib.sha256(content).digest()).hex()

    def keep(self, steps: Sequence[int]) -> None:
        """Remove all steps but these, which the server's plan names."""
        if self.process == 0:
            for folder in step_folders(self.folders.states):
                if step_of(folder) not in steps:
                    discard(folder)

    # ---- resuming --------------------------------------------------------------------------------

    def held(self) -> Tags:
        """The records that this process can verify, with all files that they name; the processes of
        a site share the work. What is damaged, of another run or under another file of the sites is
        left out, with a warning here.

        Raises TextChanged if the site's text is another than that of a record.
        """
        found: Tags = {}
        for folder in step_folders(self.folders.states):
            for path in self._records(folder)[self.process::self.processes]:
                if tag := self._verified(path):
                    found.setdefault(str(step_of(folder)), []).append(tag)
        return found

    def _records(self, folder: Path) -> list[Path]:
        return sorted(path for path in folder.glob("site_*.json") if _RECORD.fullmatch(path.name))

    def _verified(self, path: Path) -> str:
        """The tag of a record whose files are all there; else empty."""
        try:
            body = self._read(path)
            verify_files(path.parent, body["files"])
            content = path.read_bytes()
        except TextChanged:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            log(f"checkpoint {path.parent} of this site cannot be used: {explain(error) or error}",
                WARNING)
            return ""
        return self._tag(content)

    def _read(self, path: Path) -> dict[str, Any]:
        """A record of this run. InputError, saying why, for any other."""
        body = read_json(path, dict)
        if body.get("sha256") != manifest_checksum(body) or body.get("step") != step_of(
                path.parent):
            raise InputError(f"{path.name} is damaged")
        for name, mine, what in (("run", self.run, "run"), ("sites", self.sites,
                                                            "file of the sites")):
            if body.get(name) != mine:
                raise InputError(f"it is of another {what}")
        if body.get("text") != self.text:
            raise TextChanged(
                f"--site_data: the text of this site has changed since step {body['step']}; with "
                "the text as it was the run resumes, and a new run (--overwrite at the server) "
                "takes it as it is")
        return body

    def open(self, step: int, state: Mapping[str, Tensor]) -> SiteCheckpoint:
        """The checkpoint of a step that is held, with the global state that the server hands out
        for it.

        Raises InputError, without a path, if that is not the state whose digests are recorded here.
        """
        folder, files, digests = self.folders.step(step), Checksums(), dict[str, str]()
        for path in self._records(folder):
            body = self._read(path)
            files |= body["files"]
            digests |= body["state"]
        if digests != digests_of(state):
            raise InputError(f"--resume: the global model that the server hands out for step "
                             f"{step} is not the one that this site has trained with")
        return SiteCheckpoint(folder, step, {}, {}, files, state)


# ---- the server ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Holdings:
    """What the sites say that they hold of a run, at its start."""

    run: str
    """The run's id."""
    tags: Mapping[str, Tags]
    """By site."""
    refusal: str = ""
    """Which site cannot go on with what it holds, and why."""

    @classmethod
    def of(cls, run: str, sites: Sequence[str], reports: Sequence[Tags], refusal: str = ""
           ) -> Holdings:
        """sites: of each rank, "" for the server; reports: of each rank, `SiteStates.held`."""
        tags: dict[str, Tags] = {name: {} for name in sites if name}
        for name, report in zip(sites, reports, strict=True):
            for step, some in report.items() if name else ():
                tags[name].setdefault(step, []).extend(some)
        return cls(run, tags, refusal)

    def lacking(self, found: Checkpoint) -> list[str]:
        """The sites that do not hold a checkpoint of the server's as it was written."""
        return [name for name, tags in found.sites.items() if sorted(tags) != sorted(
            self.tags.get(name, {}).get(str(found.step), []))]

    def newest(self, run_dir: Path) -> Checkpoint | None:
        """The newest valid checkpoint that all sites hold; None if there is none at all yet.

        Raises InputError, naming the sites, if there are some and the sites lack parts of each.
        """
        without: dict[str, list[str]] = {}
        for found in valid_checkpoints(run_dir):
            if not (lacking := self.lacking(found)):
                return found
            log(f"checkpoint {found.folder} is skipped: {', '.join(lacking)} no longer "
                f"{'holds' if len(lacking) == 1 else 'hold'} it", WARNING)
            for name in lacking:
                without.setdefault(name, []).append(str(found.step))
        if without:
            raise InputError("--resume: " + "; ".join(
                f"{name} does not hold step {' or '.join(steps)}" for name, steps in
                without.items()) + f", and no other checkpoint is in {run_dir}; restore the "
                "folders of these sites, or start over with --overwrite")
        return None


def new_run_id() -> str:
    """An id for a run: 32 hexadecimal digits."""
    return secrets.token_hex(16)
