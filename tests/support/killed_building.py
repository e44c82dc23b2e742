"""Builds an entry of the token cache over and over, killed (SIGKILL) at one point after the other.

    python -m tests.support.killed_building TEXT TOKENIZER CACHE MAX_TOKENS POINT ...

MAX_TOKENS may be none. A point is `mark:N`, before it is said the Nth time how far a stage is;
`torn:N`, when half of the Nth block is in the file of the token ids; `manifest` or `rename`, before
these. A child builds in CACHE/POINT and is killed there; then this process builds, which goes on
where the child was. Prints for each point the number of blocks that this process tokenised.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from fedrun.data import building, partial_entry, tokenising_pool
from fedrun.data.partial_entry import PartialEntry
from fedrun.data.text_options import TextOptions
from fedrun.data.tokenising_process import Encoder
from fedrun.data.tokens import prepare

BLOCK_BYTES = 3000
encoded, mark, patch = Encoder.encoded, PartialEntry.mark, setattr


def die(*_: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL does not return")


def arm(point: str) -> None:
    """Let this process die at a point."""
    fault, _, number = point.partition(":")
    seen = 0

    def counted() -> bool:
        nonlocal seen
        seen += 1
        return seen == int(number)

    def mark_or_die(partial: PartialEntry, *said: Any) -> None:
        if counted():
            die()
        mark(partial, *said)

    def encode_or_die(encoder: Encoder, *given: Any) -> tuple[np.ndarray, np.ndarray]:
        ids, counts = encoded(encoder, *given)
        if counted():
            split = "validation" if (encoder.tokenizer.parents[1] / "validation.bin").exists() \
                else "train"
            with (encoder.tokenizer.parents[1] / f"{split}.bin").open("ab") as file:
                file.write(ids[:len(ids) // 2].tobytes() + b"\1")
            die()
        return ids, counts

    if fault == "mark":
        patch(PartialEntry, "mark", mark_or_die)
    elif fault == "torn":
        patch(Encoder, "encoded", encode_or_die)
    elif fault == "manifest":
        patch(building, "write_manifest", die)
    else:
        assert fault == "rename"
        patch(Path, "rename", die)


def main(text: str, tokenizer: str, cache: str, max_tokens: str, *points: str) -> None:
    options = TextOptions(max_tokens=None if max_tokens == "none" else int(max_tokens))
    tokenising_pool.BLOCK_BYTES = BLOCK_BYTES
    partial_entry.RECORD_SECONDS = 0.0
    for point in points:
        folder = Path(cache) / point
        if (child := os.fork()) == 0:
            arm(point)
            prepare(text, tokenizer, 16, folder, options)
            os._exit(1)  # the point is behind the end
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"{point}: not killed, {status}"
        assert not list(folder.glob("tokens/*/entry.json")), f"{point}: an entry that is torn"
        blocks = 0

        def count(encoder: Encoder, *given: Any) -> tuple[np.ndarray, np.ndarray]:
            nonlocal blocks
            blocks += 1
            return encoded(encoder, *given)

        patch(Encoder, "encoded", count)
        prepare(text, tokenizer, 16, folder, options)
        patch(Encoder, "encoded", encoded)
        print(point, blocks)


if __name__ == "__main__":
    main(*sys.argv[1:])
