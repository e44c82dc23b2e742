"""Tokenising a text file of some size, beside `datasets.map` with as many processes.

    python -m tests.benchmarks.corpus 50 200 --folder DIR    # MB of text; minutes; markdown
    python -m tests.benchmarks.corpus 30 --folder DIR --reading    # what reading takes beside it

The text is made from ../shared/data/books: the books over and over, each time with other numbers in
them. Memory is the proportional set size of the process and of those that it starts, sampled five
times a second; what it takes after a megabyte of text, with all libraries and the tokenizer, is
subtracted. Each side has a process of its own. DIR needs six times the room of the text.

--reading: the text in eight files of each kind, read as a corpus is, and then all of an entry of
the cache. Processor seconds; since one process reads and all cores tokenise, the share that reading
has of the elapsed time is worked out for several numbers of cores.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import os
import re
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.common import Side, answer, machine, seconds

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
HEADER = """\
| text (MB) | side | processes | seconds | MB/s | memory above the tokenizer's (MiB) |
|---|---|---|---|---|---|"""
SMALL = 1  # MB
KINDS = ("txt", "jsonl", "jsonl.gz", "parquet")
SHARDS = 8
CORES = (2, 8, 32)
READING = f"""\
| files | text (MB) | reading (CPU s) | tokenising (CPU s) | \
{" | ".join(f"share on {cores} cores" for cores in CORES)} |
|---|---|---|---|{"---|" * len(CORES)}"""


def write_text(path: Path, megabytes: int) -> None:
    """Books without end; their full stops are numbered, so that no two passes are alike."""
    books = sorted((DATA / "books").rglob("*.txt"))
    assert books, f"no books in {DATA / 'books'}"
    number, left = 0, megabytes * 10**6
    with path.open("w", encoding="utf-8") as file:
        while left > 0:
            for book in books:
                parts = re.split(r"(?<=\.)\s", book.read_text(encoding="utf-8", errors="replace"))
                text = "".join(f"{part} {number + n}\n" for n, part in enumerate(parts))
                number += len(parts)
                left -= file.write(text[:left])
                if left <= 0:
                    break


def ours(tokenizer: str, folder: Path) -> dict[str, Callable[[], Any]]:
    from fedrun.data.tokens import prepare

    def run(name: str) -> float:
        return seconds(lambda: prepare(str(folder / f"{name}.txt"), tokenizer, 1024, folder / name))

    return {"small": lambda: run("small"), "large": lambda: run("large")}


def theirs(tokenizer: str, folder: Path, processes: int) -> dict[str, Callable[[], Any]]:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    loaded = AutoTokenizer.from_pretrained(tokenizer)

    def read_and_map(name: str) -> None:
        rows = datasets.load_dataset("text", data_files=str(folder / f"{name}.txt"), split="train",
                                     cache_dir=str(folder / "theirs"), keep_linebreaks=True)
        rows.map(lambda batch: {"ids": loaded(batch["text"])["input_ids"]}, batched=True,
                 remove_columns="text", num_proc=processes if name == "large" else 1)

    def run(name: str) -> float:
        return seconds(lambda: read_and_map(name))

    return {"small": lambda: run("small"), "large": lambda: run("large")}


class Watch:
    """The most memory that a process and those below it take during a `with` block, in MiB."""

    def __init__(self, process: int) -> None:
        self.process, self.peak = psutil.Process(process), 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def now(self) -> float:
        found = 0
        for each in (self.process, *self.process.children(recursive=True)):
            try:
                found += each.memory_full_info().pss
            except psutil.Error:  # it has ended
                continue
        return found / 2**20

    def _look(self) -> None:
        while not self._over.wait(0.2):
            self.peak = max(self.peak, self.now())

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def measure(side: str, megabytes: int, tokenizer: str, folder: Path, processes: int) -> None:
    started = Side("tests.benchmarks.corpus", "--side", side, "--tokenizer", tokenizer, "--folder",
                   str(folder), "--processes", str(processes), threads=processes)
    started.ask("small")
    watch = Watch(started.process.pid)
    before = watch.now()
    with watch:
        took = started.ask("large")
    started.close()
    print(f"| {megabytes} | {side} | {processes} | {took:.1f} | {megabytes / took:.1f} "
          f"| {watch.peak - before:.0f} |", flush=True)


def write_shards(text: Path, folder: Path, kind: str) -> None:
    """The lines of a text, in SHARDS files of a kind."""
    import pyarrow
    import pyarrow.parquet

    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    folder.mkdir()
    for n in range(SHARDS):
        part = lines[n * len(lines) // SHARDS:(n + 1) * len(lines) // SHARDS]
        path = folder / f"{n}.{kind}"
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": part}), path)
        elif kind == "txt":
            path.write_text("".join(part), encoding="utf-8")
        else:
            content = "".join(json.dumps({"text": line}) + "\n" for line in part).encode()
            path.write_bytes(gzip.compress(content) if kind.endswith(".gz") else content)


def processor_seconds(work: Callable[[], object]) -> float:
    """Of this process and of those that it starts and waits for."""
    def so_far() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(each.ru_utime + each.ru_stime for each in used)

    before = so_far()
    work()
    return so_far() - before


def compare_reading(megabytes: int, tokenizer: str, folder: Path) -> None:
    from fedrun.data.corpora import load_corpus
    from fedrun.data.stored_rows import RowFiles
    from fedrun.data.tokens import prepare

    print(f"\n{READING}")
    write_text(folder / "small.txt", SMALL)
    prepare(str(folder / "small.txt"), tokenizer, 1024, folder / "small")  # imports, as it is used
    write_text(folder / "large.txt", megabytes)
    (folder / "rows").mkdir()
    for kind in KINDS:
        shards = folder / kind.replace(".", "_")
        write_shards(folder / "large.txt", shards, kind)
        reading = processor_seconds(functools.partial(
            load_corpus, str(shards), RowFiles(folder / "rows")))
        whole = processor_seconds(functools.partial(
            prepare, str(shards), tokenizer, 1024, folder / f"{shards.name}-cache"))
        shares = (reading / (reading + (whole - reading) / cores) for cores in CORES)
        print(f"| 8 .{kind} | {megabytes} | {reading:.2f} | {whole - reading:.1f} | "
              f"{' | '.join(f'{share:.0%}' for share in shares)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("megabytes", type=int, nargs="*")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tokenizer", default=str(DATA / "gpt2"))
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--ours_alone", action="store_true")
    parser.add_argument("--reading", action="store_true")
    parser.add_argument("--side", choices=["fedrun", "datasets"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        os.environ.pop("TOKENIZERS_PARALLELISM", None)
        answer(ours(args.tokenizer, args.folder) if args.side == "fedrun" else
               theirs(args.tokenizer, args.folder, args.processes))
        return
    print(f"{machine()}; {time.strftime('%Y-%m-%d')}; Python {sys.version.split()[0]}")
    if args.reading:
        for megabytes in args.megabytes:
            folder = args.folder / f"reading-{megabytes}"
            folder.mkdir(parents=True)
            try:
                compare_reading(megabytes, args.tokenizer, folder)
            finally:
                shutil.rmtree(folder)
        return
    print(f"\n{HEADER}")
    for megabytes in args.megabytes:
        for side in ("fedrun",) if args.ours_alone else ("fedrun", "datasets"):
            folder = args.folder / f"corpus-{megabytes}-{side}"
            folder.mkdir(parents=True)
            try:
                write_text(folder / "small.txt", SMALL)
                write_text(folder / "large.txt", megabytes)
                measure(side, megabytes, args.tokenizer, folder, args.processes)
            finally:
                shutil.rmtree(folder)


if __name__ == "__main__":
    main()
