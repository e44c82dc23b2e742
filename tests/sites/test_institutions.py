"""launch/sites.md followed from an empty folder: institutions train, lose a site and the server,
and end in the model of one process that has all of their text. Nothing of a site's text, of its
tokens, of where it lies, or of its terms leaves it, and with terms that are not masked the same
search finds them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

from tests.sites.capture import captured, streams
from tests.sites.institutions import NAMES, Institution, blocks, institutions
from tests.sites.search import Search, files, windows
from tests.sites.telling_fedrun import TERMS
from tests.support.runs import Outcome, execute, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SITES = NAMES[1:]
LIMIT = 300  # seconds for a run
TEXT = "letters-of-{site}.txt"
ON_THE_PAGE = "--tokenizer bpe:4096 --rounds 100 --local_updates 8 --checkpoint_freq 10"
TINY = ("--config tiny --tokenizer bpe:400 --rounds 8 --local_updates 2 --checkpoint_freq 2 "
        "--val_freq 2 --lr 2e-3 "
        "--sequence_length 32 --batch_size 2 --dtype fp32 --device cpu --timeout 60")


def made_up(seed: int, sentences: int = 400) -> str:
    """Sentences of common words in an order that nobody else has."""
    words = sorted({word for text in topics.values() for word in re.findall("[a-z]{4,9}", text)})
    rng = np.random.default_rng(seed)
    return "\n".join(" ".join(rng.choice(words, 12)) + "." for _ in range(sentences)) + "\n"


@pytest.fixture(scope="module")
def found() -> Iterator[dict[str, Institution]]:
    """Institutions with text of their own and, from step 4 of the page, keys and the file of the
    sites."""
    with institutions() as made:
        made["server"].give("public/tale.txt", made_up(0).encode())
        for number, name in enumerate(SITES, 1):
            made[name].give(f"text/{TEXT.format(site=name)}", made_up(number).encode())
        init, key, add = (block for block in blocks("bash") if block.startswith("fedrun sites"))
        server = made["server"]
        server.must(init)
        for name in SITES:
            (public,) = re.findall(r"^ed25519:\S+$", made[name].must(key.replace("north", name)),
                                   re.MULTILINE)
            add = add.replace(f"{name.upper()}_KEY", public)
        server.must(add)
        sites = (server.folder / "sites.yaml").read_bytes()
        for name in SITES:
            made[name].give("sites.yaml", sites)
            assert made[name].must("fedrun sites show") == server.must("fedrun sites show")
        yield made


def start(found: Mapping[str, Institution], name: str, script: str) -> None:
    """Steps 5 and 6 of the page."""
    *_, of_site, of_server = (block for block in blocks("bash") if "export" in block)
    found[name].give("run.sh", script.encode())
    given = of_server if name == "server" else of_site.replace("north", name)
    found[name].start_here(f"{given}\nexec sh run.sh {NAMES.index(name)}")


def script_of(name: str, *changes: tuple[str, str]) -> str:
    """The page's run.sh for a little run."""
    (script,) = blocks("sh")
    for old, new in ((ON_THE_PAGE, TINY), ("--run_name federation", f"--run_name {name}"),
                     ("-m fedrun fed", "-m tests.sites.telling_fedrun fed"), *changes):
        assert old in script
        script = script.replace(old, new)
    return script


def said(found: Mapping[str, Institution]) -> str:
    return "\n".join(f"== {name}\n{one.said}" for name, one in found.items())


def until_over(found: Mapping[str, Institution], name: str) -> Outcome:
    """Wait until a run has ended everywhere."""
    server = found["server"]
    wait_until(lambda: f"done: results/{name}" in server.said, LIMIT, lambda: said(found))
    wait_until(lambda: not any(one.running for one in found.values()), 60, lambda: said(found))
    return Outcome(0, server.said, server.folder / "results" / name)


@pytest.fixture(scope="module")
def masked(found: dict[str, Institution], tmp_path_factory: pytest.TempPathFactory
           ) -> tuple[Outcome, dict[str, Path]]:
    """A run that loses a site and then its server, with --secure_sum; and what was captured."""
    with captured({name: one.machine for name, one in found.items()},
                  tmp_path_factory.mktemp("captured")) as captures:
        script = script_of("masked")
        for name in NAMES:
            start(found, name, script)
        wait_until(lambda: "round 4/" in found["server"].said, LIMIT, lambda: said(found))
        found["south"].kill()
        start(found, "south", script)
        wait_until(lambda: "round 6/" in found["server"].said, LIMIT, lambda: said(found))
        found["server"].kill()
        start(found, "server", script)
        run = until_over(found, "masked")
    assert run.output.count("resuming from step") >= 2
    return run, captures


def searched_for(found: Mapping[str, Institution], rounds: int) -> Search:
    """A search for what no site shows to anybody, as far as it is not public, after a run of so
    many rounds."""
    search = Search()
    for name in SITES:
        folder = found[name].folder
        text = folder / "text" / TEXT.format(site=name)
        assert search.add("text", windows(text.read_bytes(), 24, 1)) > 10_000
        for path in (text, text.with_name("*.txt"), folder / name / "identity.pem"):
            assert search.add("path", windows(str(path).encode(), 16, 1))
        for cached in (folder / name).rglob("train.bin"):
            tokens = np.fromfile(cached, np.uint16)
            assert search.add("tokens", windows(tokens, 16, 2)) > 1000
            assert search.add("wide tokens", windows(tokens.astype(np.int32), 32, 4)) > 1000
        # A round that is repeated after a kill has the term that it had.
        terms = {term.read_bytes() for term in (folder / TERMS).iterdir()}
        terms = {term for term in terms if len(term) == max(map(len, terms))}
        assert len(terms) == rounds
        values = np.frombuffer(b"".join(terms), np.int32)
        assert search.add("term", windows(values, 64, 64)) > 1000 * rounds
        for dtype in (np.int64, np.float32):
            search.add("wide term", windows(values.astype(dtype), 64, 64))
    server = found["server"].folder
    search.forget((server / "public" / "tale.txt").read_bytes())
    search.forget(str(server / "public" / "tale.txt").encode())
    for cached in server.rglob("*.bin"):
        search.forget(cached.read_bytes())
        search.forget(np.fromfile(cached, np.uint16).astype(np.int32).tobytes())
    return search


def everything(found: Mapping[str, Institution], captures: Mapping[str, Path]
               ) -> Iterator[tuple[str, bytes]]:
    """What others than its owner have seen of a site: all that passed any interface, and the
    server's files."""
    for name, capture in captures.items():
        yield from ((f"{name}: {where}", data) for where, data in streams(capture))
    yield from files(found["server"].folder)
    yield "said", found["server"].said.encode()


def test_kills_and_a_tunnel_change_no_bit(found: dict[str, Institution], tmp_path: Path,
                                          masked: tuple[Outcome, dict[str, Path]]) -> None:
    run, _ = masked
    base = found["server"].folder
    flags = ["fed_avg", "--sites", str(base / "sites.yaml"), "--site_data",
             str(base.parent / "{site}" / "text" / "*.txt"), "--dataset",
             str(base / "public" / "*.txt"), *TINY.split(), "--data_dir", str(tmp_path),
             "--cache_dir", str(tmp_path / "cache"), "--run_name", "simulated"]
    code, output = execute([sys.executable, "-m", "fedrun", *flags], LIMIT)
    assert code == 0, output
    assert run.bits == Outcome(code, output, tmp_path / "simulated").bits


def test_nothing_leaves_a_site(found: dict[str, Institution],
                               masked: tuple[Outcome, dict[str, Path]]) -> None:
    search = searched_for(found, 8)
    assert search.find_in(everything(found, masked[1])) == {}
    for name in SITES:  # where all of it is
        there = search.find_in(files(found[name].folder))
        assert {kind for one in there.values() for kind in one} >= {"text", "tokens", "term"}


def test_without_masks_the_search_finds_the_terms(
        found: dict[str, Institution], masked: tuple[Outcome, dict[str, Path]], tmp_path: Path
        ) -> None:
    for name in SITES:
        found[name].must(f"rm -r {TERMS}")
    changes: Sequence[tuple[str, str]] = ((" --secure_sum", ""), ("--rounds 8", "--rounds 2"))
    with captured({name: one.machine for name, one in found.items()}, tmp_path) as captures:
        for name in NAMES:
            start(found, name, script_of("shown", *changes))
        until_over(found, "shown")
    hits = searched_for(found, 2).find_in(everything(found, captures))
    assert {kind for one in hits.values() for kind in one} == {"term"}
    # Where it passes, and nowhere outside the tunnel.
    assert {where.split()[1] for where in hits} == {"fedrun"}
    assert {where.split(":")[0] for where in hits} >= set(SITES)
