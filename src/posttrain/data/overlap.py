"""Which texts repeat one another: exact, near (MinHash, then the true Jaccard index) and n-gram overlap with evals.

Everything is deterministic: hashes are CRC-32 of words, and the permutations have a fixed seed. Knows only texts.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

NEAR = 0.8
SHINGLE = 5
NGRAM = 13
_SHORTEST = 4
_BANDS, _ROWS_PER_BAND = 16, 4
_COMPARED_PER_BUCKET = 8
_WORD = re.compile(r"\w+|[^\w\s]", re.UNICODE)


def words(text: str) -> list[str]:
    """Lower-case words and signs; white space does not count."""
    return _WORD.findall(text.lower())


def normalized(text: str) -> str:
    return " ".join(words(text))


def exact_duplicates(texts: Sequence[str]) -> list[tuple[int, int]]:
    """(later, first) for each text that equals an earlier one up to case and white space."""
    first: dict[str, int] = {}
    found = []
    for i, text in enumerate(texts):
        at = first.setdefault(normalized(text), i)
        if at != i:
            found.append((i, at))
    return found


def near_duplicates(texts: Sequence[str], threshold: float = NEAR) -> list[tuple[int, int, float]]:
    """(later, earlier, Jaccard of 5-word shingles) at or above `threshold`; equal texts are left out.

    Source: Broder 1997; 64 hashes in 16 bands of 4, which finds a pair of Jaccard 0.8 with probability 0.9998.
    """
    shingles = [_shingles(text) for text in texts]
    buckets: defaultdict[tuple[int, bytes], list[int]] = defaultdict(list)
    normal = [normalized(text) for text in texts]
    found = []
    for i, own in enumerate(shingles):
        if not len(own):
            continue
        signature = _signature(own).reshape(_BANDS, _ROWS_PER_BAND)
        keys = [(band, signature[band].tobytes()) for band in range(_BANDS)]
        candidates = sorted({other for key in keys for other in buckets[key]})
        best = max(((_jaccard(own, shingles[j]), -j) for j in candidates if normal[j] != normal[i]), default=(0.0, 0))
        if best[0] >= threshold:
            found.append((i, -best[1], best[0]))
        for key in keys:
            if len(buckets[key]) < _COMPARED_PER_BUCKET:
                buckets[key].append(i)
    return found


def contaminated(rows: Sequence[tuple[str, str]], suites: Mapping[str, Sequence[str]]) -> list[tuple[int, str]]:
    """(row, suite) where a row (its prompt, its whole text) shares 13 words in a row with an eval prompt, or holds the
    whole of a shorter one.

    Prompts under 4 words must be the row's prompt. N-grams that many prompts of a suite share are its wording, not its
    items, and are ignored.
    """
    by_length = _eval_grams(suites)
    found: list[tuple[int, str]] = []
    for i, (prompt, text) in enumerate(rows):
        hit: set[str] = set()
        own = words(text)
        for size, wanted in by_length.items():
            for gram in [tuple(words(prompt))] if size < _SHORTEST else _ngrams(own, size):
                hit |= wanted.get(gram, set())
        found += ((i, name) for name in sorted(hit))
    return found


def _eval_grams(suites: Mapping[str, Sequence[str]]) -> dict[int, dict[tuple[str, ...], set[str]]]:
    """Length → n-gram → the suites it tells."""
    by_length: defaultdict[int, dict[tuple[str, ...], set[str]]] = defaultdict(dict)
    for name, prompts in suites.items():
        counts: Counter[tuple[str, ...]] = Counter()
        for prompt in {normalized(prompt) for prompt in prompts}:
            counts.update(set(_ngrams(prompt.split(), NGRAM)))
        limit = max(2, len(prompts) // 20)
        for gram, count in counts.items():
            if gram and count <= limit:
                by_length[len(gram)].setdefault(gram, set()).add(name)
    return dict(by_length)


def _ngrams(own: list[str], size: int) -> Iterator[tuple[str, ...]]:
    """All runs of `size` words; a shorter text is one run."""
    if len(own) <= size:
        yield tuple(own)
    else:
        yield from (tuple(own[i : i + size]) for i in range(len(own) - size + 1))


def _shingles(text: str) -> NDArray[np.uint64]:
    """Hashes of the text's 5-word runs, each once. A shorter text is one run."""
    hashes = np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words(text)], np.uint64)
    if not len(hashes):
        return hashes
    size = min(SHINGLE, len(hashes))
    mixed = np.zeros(len(hashes) - size + 1, np.uint64)
    for offset in range(size):
        mixed = mixed * np.uint64(1_000_003) + hashes[offset : offset + len(mixed)]
    return np.unique(mixed >> np.uint64(3))


def _signature(shingles: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """64 minima, each under its own mixing of the shingles' hashes."""
    mixed = (shingles[None, :] ^ _SALTS[:, None]) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return (mixed ^ (mixed >> np.uint64(32))).min(axis=1)


_SALTS = np.random.RandomState(20240).randint(1, 1 << 62, size=_BANDS * _ROWS_PER_BAND).astype(np.uint64)


def _jaccard(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> float:
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)
