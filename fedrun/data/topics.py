"""Topics of documents, which take the place of class labels in partitions of text.

Documents are counts of token ids, weighted by TF-IDF (Salton & Buckley 1988, logarithmic term
frequency), projected by latent semantic analysis (Deerwester et al. 1990) and grouped by k-means.
Topics are a property of the corpus and do not depend on a run's seed.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedrun.common.errors import one_line
from fedrun.common.files import DamagedFile, read_regular

TOPICS = 10  # few enough to distinguish in a figure, and to be large with 50 documents
FITTED_ON = 10_000  # documents at most that topics are fitted on; the rest are assigned to them
MOST_ENTRIES = 2**26  # of their counts, 8 bytes each; of long documents, fewer are fitted on
DIMENSIONS = 50  # of the projection
TYPICAL = 100  # tokens kept for naming a topic
TOKENS_AT_ONCE = 2**22
DOCUMENTS_AT_ONCE = 2**16  # of which each takes DIMENSIONS numbers
LARGEST = 2**34  # bytes; a larger file is not read


@dataclass(frozen=True)
class Topics:
    """The topic of every document; topic 0 has the most tokens, and so on."""

    of_document: np.ndarray
    """int64, (n_documents,)"""
    typical: np.ndarray
    """int64, (n_topics, <= TYPICAL): each topic's most characteristic token ids, best first."""

    def save(self, path: Path) -> None:
        np.savez(path, of_document=self.of_document, typical=self.typical, sha256=self._sha256())

    @classmethod
    def load(cls, path: Path) -> Topics:
        """Raises FileNotFoundError, or DamagedFile if the content is not what `save` wrote."""
        try:
            with np.load(io.BytesIO(read_regular(path, LARGEST)), allow_pickle=False) as held:
                topics, recorded = cls(held["of_document"], held["typical"]), str(held["sha256"])
        except FileNotFoundError:
            raise
        except Exception as error:  # zipfile, zlib and numpy raise many types
            raise DamagedFile(f"{path} is damaged: {one_line(error)}") from None
        if recorded != topics._sha256():
            raise DamagedFile(f"{path} is damaged: it does not match its checksum")
        return topics

    def _sha256(self) -> str:
        digest = hashlib.sha256()
        for array in (self.of_document, self.typical):
            digest.update(f"{array.dtype.str} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def find_topics(stream: np.ndarray, starts: np.ndarray, vocab_size: int) -> Topics:
    """Group documents into at most TOPICS topics, fewer if there are fewer different documents.

    Takes memory for what topics are fitted on, for a block of documents, and some 40 bytes for each
    document; time for a pass over the stream.

    Args:
        stream: token ids, (n_tokens,)
        starts: where documents begin in it, and its end; int64, (n_documents + 1,)
    """
    from scipy import sparse
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer
    from threadpoolctl import threadpool_limits

    n_documents = len(starts) - 1
    chosen = _to_fit_on(starts, vocab_size)
    # One thread: with more, k-means adds in an order that changes from run to run. errstate: the
    # explained variance, which is not used here, is 0/0 if all documents are equal.
    with threadpool_limits(1), np.errstate(invalid="ignore"):
        counts = sparse.vstack([part for _, part in _counts(stream, starts, vocab_size, chosen)],
                               format="csr")
        words = _distinguishing_tokens(counts)
        if len(words) < 2:  # a text of one token
            return Topics(np.zeros(n_documents, dtype=np.int64), words[None, :TYPICAL])
        tfidf = TfidfTransformer(sublinear_tf=True)
        weighted = tfidf.fit_transform(counts[:, words])
        project = make_pipeline(
            TruncatedSVD(min(DIMENSIONS, *weighted.shape), random_state=0), Normalizer(copy=False))
        groups = KMeans(min(TOPICS, n_documents), n_init=10, random_state=0)
        fitted = groups.fit_predict(project.fit_transform(weighted))
        found = np.empty(n_documents, dtype=np.int64)
        if len(chosen) == n_documents:
            found[:] = fitted
        else:
            for span, part in _counts(stream, starts, vocab_size):
                found[span] = groups.predict(project.transform(tfidf.transform(part[:, words])))
    sizes = np.bincount(found, weights=np.diff(starts))
    largest_first = np.argsort(-sizes, kind="stable")[:np.count_nonzero(sizes)]
    number = np.empty(len(sizes), dtype=np.int64)
    number[largest_first] = np.arange(len(largest_first))
    mean = np.asarray(weighted.mean(axis=0)).ravel()
    apart = np.stack([np.asarray(weighted[fitted == topic].mean(axis=0)).ravel() - mean
                      for topic in largest_first])
    return Topics(number[found], words[np.argsort(-apart, axis=1)[:, :TYPICAL]])


def _to_fit_on(starts: np.ndarray, vocab_size: int) -> np.ndarray:
    """The documents that topics are fitted on, drawn at random; int64, ascending."""
    drawn = np.random.default_rng(0).permutation(len(starts) - 1)[:FITTED_ON]
    entries = np.cumsum(np.minimum(starts[drawn + 1] - starts[drawn], vocab_size))
    return np.sort(drawn[:max(1, int(np.searchsorted(entries, MOST_ENTRIES, side="right")))])


def _counts(stream: np.ndarray, starts: np.ndarray, vocab_size: int,
            chosen: np.ndarray | None = None) -> Iterator[tuple[slice, Any]]:
    """Token counts, a block of documents at a time: a slice of the documents, or of those that are
    chosen, and a sparse matrix (documents in the block, vocab_size)."""
    from scipy import sparse

    bounds = starts if chosen is None else np.append(
        0, np.cumsum(starts[chosen + 1] - starts[chosen]))
    first = 0
    while first < len(bounds) - 1:
        limit = int(np.searchsorted(bounds, bounds[first] + TOKENS_AT_ONCE, side="right")) - 1
        last = max(first + 1, min(limit, first + DOCUMENTS_AT_ONCE))
        cuts = [(int(starts[first]), int(starts[last]))] if chosen is None else [
            (int(starts[one]), int(starts[one + 1])) for one in chosen[first:last]]
        if bounds[last] - bounds[first] > TOKENS_AT_ONCE:  # one long document
            part = sparse.csr_matrix(_count_pieces(stream, *cuts[0], vocab_size)[None])
        else:
            ids = np.concatenate([stream[begin:end] for begin, end in cuts]).astype(np.int32)
            # The tokens of a document are the column indices of its row; duplicates are summed.
            part = sparse.csr_matrix((np.ones(len(ids), np.float32), ids,
                                      bounds[first:last + 1] - bounds[first]),
                                     shape=(last - first, vocab_size))
            part.sum_duplicates()
        yield slice(first, last), part
        first = last


def _count_pieces(stream: np.ndarray, begin: int, end: int, vocab_size: int) -> np.ndarray:
    """How often each token occurs between two positions; float32, (vocab_size,)."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for at in range(begin, end, TOKENS_AT_ONCE):
        counts += np.bincount(stream[at:min(at + TOKENS_AT_ONCE, end)], minlength=vocab_size)
    return counts.astype(np.float32)


def _distinguishing_tokens(counts: Any) -> np.ndarray:
    """The tokens that distinguish documents: those in at least two and at most half of them; all
    tokens if there are fewer than two such."""
    n_documents, vocab_size = counts.shape
    holding = np.bincount(counts.indices, minlength=vocab_size)
    words = np.flatnonzero((holding >= 2) & (2 * holding <= n_documents))
    return words if len(words) > 1 else np.flatnonzero(holding)
