"""Statistics of shards: divergence, the table and the figure of `fedrun partition`."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy.spatial.distance import jensenshannon

from fedrun import cli
from fedrun.data.partition import client_shards
from fedrun.data.shard_stats import describe_shards, js_divergence, token_counts
from fedrun.data.tokens import TokenData
from fedrun.plots.partition import partition_figure
from tests.support.made_data import made

# ---- divergence ---------------------------------------------------------------------------------

counts = st.lists(st.integers(0, 1000), min_size=5, max_size=5).filter(any)


@given(counts, counts)
def test_divergence_is_scipys_distance_squared(p: list[int], q: list[int]) -> None:
    ours = js_divergence(np.array(p), np.array(q))
    assert 0 <= ours <= 1 + 1e-12
    assert abs(ours - jensenshannon(p, q, base=2) ** 2) < 1e-9


def test_the_statistics_follow_from_the_sequences() -> None:
    data = made([30] * 40)
    document = data.documents.of_sequences(*data.train.shape)
    shards = client_shards(data, 3, "dirichlet", 0.5, 0.5, 0)
    for shard, held in zip(shards, describe_shards(data, shards), strict=True):
        there = data.train[shard].ravel().tolist()
        assert token_counts(data, shard).tolist() == [there.count(t) for t in range(50)]
        assert (held.sequences, held.tokens) == (len(shard), 4 * len(shard))
        assert held.documents == len(set(document[shard].tolist()))
        assert held.topics.tolist() == [
            4 * sum(data.topics.of_document[d] == t for d in document[shard]) for t in range(3)]
        whole = np.bincount(data.train.ravel(), minlength=50)
        assert abs(held.divergence - jensenshannon(np.bincount(there, minlength=50), whole, base=2)
                   ** 2) < 1e-9
        assert 0 < held.divergence_at_random < 1
    everything = describe_shards(data, [np.arange(len(data.train))])[0]
    assert everything.divergence == everything.divergence_at_random == pytest.approx(0, abs=1e-12)


# ---- the tool -----------------------------------------------------------------------------------

def test_the_tool_prints_and_plots_the_statistics(cache_dir: Path, tmp_path: Path,
                                                  pydocs_tokens: TokenData,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--dataset", "pydocs", "--tokenizer", "bpe:4096", "--sequence-length", "128",
             "--partition", "dirichlet", "--alpha", "0.1", "--size-skew", "0.5", "--num_clients",
             "5", "--cache_dir", str(cache_dir), "--out", str(tmp_path)]
    assert cli.main(["partition", *flags]) == 0
    out = capsys.readouterr().out
    shards = client_shards(pydocs_tokens, 5, "dirichlet", 0.1, 0.5, 0)
    found = describe_shards(pydocs_tokens, shards)
    for client, (shard, held) in enumerate(zip(shards, found, strict=True)):
        line = next(line for line in out.splitlines() if line.strip().startswith(f"{client} "))
        for number in (f"{len(shard):,}", f"{len(shard) * 128:,}", f"{held.divergence:.3f}"):
            assert number in line.split()
    stem = "partition_pydocs_5_clients_dirichlet_alpha_0.1_skew_0.5"
    assert (tmp_path / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / f"{stem}.svg").read_text()
    assert cli.main(["partition", *flags, "--num_clients", "9000"]) == 2
    assert re.search(r"^fedrun: error: --num_clients 9000: .*\n\Z", capsys.readouterr().err, re.M)


def test_the_figure_draws_the_statistics() -> None:
    data = made([30] * 40)
    held = describe_shards(data, client_shards(data, 4, "dirichlet", 0.5, 0.5, 0))
    figure = partition_figure(held, ["one", "two", "three"], "a title")
    assert isinstance(figure, Figure)
    bars, points = figure.axes
    rectangles = [bar for bar in bars.patches if isinstance(bar, Rectangle)]
    heights = np.array([bar.get_height() for bar in rectangles]).reshape(3, 4)
    np.testing.assert_array_equal(heights, np.array([h.topics for h in held]).T)
    np.testing.assert_allclose(np.asarray(points.lines[0].get_ydata()),
                               np.array([h.divergence for h in held]))
    np.testing.assert_allclose(np.asarray(points.lines[1].get_ydata()),
                               np.array([h.divergence_at_random for h in held]))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:3] == ["C  three", "B  two", "A  one"]
