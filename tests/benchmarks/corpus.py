"""Tokenising a text file of some size, beside `datasets.map` with as many processes.

    python -m tests.benchmarks.corpus 50 200 --folder DIR    # MB of text; minutes; markdown
    python -m tests.benchmarks.corpus 40 --folder DIR --reading    # what one process does of it
    python -m tests.benchmarks.corpus 1000 --folder DIR --tokenizer words --ours_alone

The text is made from ../shared/data/books: the books over and over, each time with other numbers in
them. Memory is the proportional set size of the process and of those that it starts, sampled five
times a second; what it takes after a megabyte of text, with all libraries and the tokenizer, is
subtracted. Each side has a process of its own. DIR needs six times the room of the text.

--tokenizer words: a word-level one of the books' most frequent words, several times as fast as BPE.

--reading: the text in eight files of each kind, made into an entry of the cache. Processor seconds
of the process that deals out pieces, appends what comes back, and does all else that one process
does, and those of the processes that read and tokenise; for several numbers of cores, the share of
the former in the elapsed time if nothing overlapped. Beside it what reading takes in one process.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import resource
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePath
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
| files | text (MB) | read by one process (CPU s) | the process that asks (CPU s) | the \
others (CPU s) | {" | ".join(f"its share on {cores} cores" for cores in CORES)} |
|---|---|---|---|---|{"---|" * len(CORES)}"""
WORDS = 30_000


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
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    datasets.disable_progress_bars()
    loaded = PreTrainedTokenizerFast(tokenizer_file=tokenizer) if tokenizer.endswith(".json") else \
        AutoTokenizer.from_pretrained(tokenizer)

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


def processor_seconds(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def compare_reading(megabytes: int, tokenizer: str, folder: Path) -> None:
    from fedrun.data.reading import Reading
    from fedrun.data.stored_rows import RowFiles
    from fedrun.data.text_files import DataFile
    from fedrun.data.tokens import prepare

    def by_both() -> tuple[float, ...]:
        return tuple(map(processor_seconds, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))

    print(f"\n{READING}")
    write_text(folder / "small.txt", SMALL)
    prepare(str(folder / "small.txt"), tokenizer, 1024, folder / "small")  # imports, as it is used
    write_text(folder / "large.txt", megabytes)
    (folder / "rows").mkdir()
    for kind in KINDS:
        shards = folder / kind.replace(".", "_")
        write_shards(folder / "large.txt", shards, kind)
        files = [DataFile(path, PurePath(path.name)) for path in sorted(shards.iterdir())]
        start = by_both()
        Reading(None, () if kind == "txt" else ("text",)).read(files, RowFiles(folder / "rows"))
        read = by_both()
        prepare(str(shards), tokenizer, 1024, folder / f"{shards.name}-cache")
        alone = read[0] - start[0]
        one, others = (after - before for after, before in zip(by_both(), read, strict=True))
        shares = (one / (one + others / cores) for cores in CORES)
        print(f"| 8 .{kind} | {megabytes} | {alone:.2f} | {one:.2f} | {others:.1f} | "
              f"{' | '.join(f'{share:.0%}' for share in shares)} |", flush=True)


def word_level(folder: Path) -> str:
    """The file of a tokenizer that cuts at white space and knows the most frequent words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    counts = Counter(word for book in sorted((DATA / "books").rglob("*.txt")) for word in
                     book.read_text(encoding="utf-8", errors="replace").split())
    known = ["<unk>", "\n", *(word for word, _ in counts.most_common(WORDS))]
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(known)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


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
    if args.tokenizer == "words":
        args.tokenizer = word_level(args.folder)
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
