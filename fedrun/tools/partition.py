"""`fedrun partition ...`: shows which data each client holds, as a table and a figure.

    fedrun partition --dataset pydocs --tokenizer bpe:8192 --num_clients 8 --partition dirichlet
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedrun.common.errors import naming, require
from fedrun.common.log import WARNING, log, print_log
from fedrun.common.terminal import say, visible
from fedrun.config import FederatedConfig
from fedrun.flags import Parser, add_flags, method_flags, resolve
from fedrun.unused import idle

if TYPE_CHECKING:
    from rich.table import Table

    from fedrun.data.shard_stats import ShardStats
    from fedrun.data.tokens import TokenData

# The settings of a federated run that decide its partition.
FLAGS = ("config", "dataset", "text_column", "encoding", "validation_split", "val_fraction",
         "max_tokens", "stream", "tokenizer", "sequence_length", "cache_dir", "num_clients",
         "partition", "alpha", "size_skew", "batch_size", "seed")
TOPIC_WORDS = 3  # at most, in a topic's name
WORD = re.compile(r"\s[^\W\d_]{3,}")  # a whole word as byte-level tokenizers decode it


def main(argv: Sequence[str]) -> int:
    """Print the table and write the figure."""
    parser = Parser(prog="fedrun partition", allow_abbrev=False, description=(
        "Show which data each client holds, as a table and a figure: sequences, documents, topics, "
        "and the Jensen-Shannon divergence of the shard's token unigrams from those of all data."),
        formatter_class=argparse.HelpFormatter)
    known = method_flags("fed_avg")
    add_flags(parser, {name: known[name] for name in FLAGS})
    parser.add_argument("--out", type=Path, metavar="FOLDER",
                        default=Path("results/plots/partition"),
                        help="folder to write the figure to (default: %(default)s)")
    flags = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    out = flags.pop("out")
    config = resolve("fed_avg", flags)
    assert isinstance(config, FederatedConfig)
    require(config.sites is None, "--config", config.config, "one without sites, each of which "
            "deals its own text")
    for line in idle(config).values():
        log(line, WARNING)

    from rich.console import Console

    from fedrun.data.shard_stats import describe_shards
    from fedrun.data.tokens import prepare
    from fedrun.experiment import shards_of
    from fedrun.plots import style
    from fedrun.plots.partition import partition_figure

    print_log(to_stderr=True)
    data = prepare(config.dataset, config.tokenizer, config.sequence_length, config.cache_dir,
                   options=config.text_options)
    held = describe_shards(data, shards_of(config, data).train, config.seed)
    topics = topic_names(data)
    console = Console(markup=False, emoji=False)
    console.print(holdings_table(held, topics, title(config, data)))
    console.print("", topics_table(held, topics), sep="\n")
    figure = partition_figure(held, topics, title(config, data))
    with naming("--out", out):
        say(f"wrote {style.save(figure, out, file_name(config, data))}")
    return 0


def title(config: FederatedConfig, data: TokenData) -> str:
    """The dataset, the number of clients and the partition, in one line."""
    how: str = config.partition
    if config.partition == "dirichlet":
        how += f", alpha {config.alpha:g}"
    if config.size_skew:
        how += f", size skew {config.size_skew:g}"
    return visible(f"{data.fingerprint['dataset']}, {config.num_clients} clients: {how}")


def file_name(config: FederatedConfig, data: TokenData) -> str:
    """The figure's file name, without an extension, made from its title."""
    words = re.findall(r"[\w.]+", title(config, data).replace("size skew", "skew"))
    return "_".join(["partition", *words])


def topic_names(data: TokenData) -> list[str]:
    """A few words that distinguish each topic: 'film, episode, painting'.

    Tokens in a script without spaces; their numbers if they are only parts of characters.
    """
    tokenizer = data.load_tokenizer()
    names = []
    for typical in data.load_topics().typical.tolist():
        decoded = [str(tokenizer.decode([token])) for token in typical]
        words: list[str] = []
        for word in [d.strip().lower() for d in decoded if WORD.fullmatch(d)]:
            if not any(word.startswith(w) or w.startswith(word) for w in words):
                words.append(word)
        whole = [d.strip() for d in decoded if d.strip() and "\ufffd" not in d]
        found = words or list(dict.fromkeys(whole)) or [f"#{token}" for token in typical]
        names.append(visible(", ".join(found[:TOPIC_WORDS])))
    return names


def holdings_table(held: Sequence[ShardStats], topics: Sequence[str], heading: str) -> Table:
    """A table with a row for each client: what it holds, and how far that is from all data."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from fedrun.plots.partition import letter

    table = Table(title=heading, title_justify="left", box=SIMPLE_HEAD, show_edge=False,
                  pad_edge=False, caption_justify="left",
                  caption="bits: Jensen-Shannon divergence of the shard's token unigrams from "
                          "those of all data;\nat random: the same for a random shard of this size")
    for name in ("client", "sequences", "tokens", "documents"):
        table.add_column(name, justify="right")
    table.add_column("largest topics")
    table.add_column("bits", justify="right")
    table.add_column("at random", justify="right")
    for client, h in enumerate(held):
        largest = sorted(range(len(topics)), key=lambda t: -h.topics[t])[:3]
        table.add_row(
            str(client), f"{h.sequences:,}", f"{h.tokens:,}", f"{h.documents:,}",
            " ".join(f"{letter(t)} {h.topics[t] / h.tokens:.0%}" for t in largest if h.topics[t]),
            f"{h.divergence:.3f}", f"{h.divergence_at_random:.3f}")
    return table


def topics_table(held: Sequence[ShardStats], topics: Sequence[str]) -> Table:
    """A table with a row for each topic: its letter, its words, and its tokens."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from fedrun.plots.partition import letter

    table = Table("topic", "typical words", box=SIMPLE_HEAD, show_edge=False,
                  pad_edge=False)
    table.add_column("tokens", justify="right")
    for topic, name in enumerate(topics):
        table.add_row(letter(topic), name, f"{sum(h.topics[topic] for h in held):,}")
    return table
