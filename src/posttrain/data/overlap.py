"""Which texts repeat one another: exact, near (MinHash, then the true Jaccard index) and n-gram overlap with evals.

Works on the hashes of words, all texts at once. Everything is deterministic: hashes do not depend on the process, and the
permutations have a fixed seed.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
"""A text as the 64-bit hash of each of its words."""

NEAR = 0.8
SHINGLE = 5
NGRAM = 13
_SHORTEST = 4
_BANDS, _ROWS_PER_BAND = 16, 4
_COMPARED_PER_BUCKET = 8
_TEXTS_PER_CHUNK = 256
_WORD = re.compile(r"\w+|[^\w\s]", re.UNICODE)
_BASE = np.uint64(0x9E3779B97F4A7C15)
_FILTER_BITS = np.uint64(20)


def words(text: str) -> list[str]:
    """Lower-case words and signs; white space does not count."""
    return _WORD.findall(text.lower())


def normalized(text: str) -> str:
    return " ".join(words(text))


def hash_words(texts: Sequence[str]) -> list[Words]:
    known: dict[str, int] = {}
    return [np.array([known.get(w) or _hash(w, known) for w in words(text)], np.uint64) for text in texts]


def _hash(word: str, known: dict[str, int]) -> int:
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    known[word] = int.from_bytes(digest, "little") | 1  # never 0, so that `or` tells a known word
    return known[word]


def exact_duplicates(texts: Sequence[Words]) -> list[tuple[int, int]]:
    """(later, first) for each text that equals an earlier one up to case and white space."""
    first: dict[bytes, int] = {}
    found = []
    for i, text in enumerate(texts):
        at = first.setdefault(text.tobytes(), i)
        if at != i:
            found.append((i, at))
    return found


def near_duplicates(texts: Sequence[Words], threshold: float = NEAR) -> list[tuple[int, int, float]]:
    """(later, earlier, Jaccard of 5-word shingles) at or above `threshold`; equal texts are left out.

    Source: Broder 1997; 64 hashes in 16 bands of 4, which finds a pair of Jaccard 0.8 with probability 0.9998.
    """
    shingles = [_shingles(text) for text in texts]
    buckets: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    found = []
    for i, bands in _signatures(shingles):
        places = [buckets[place] for place in enumerate(bands)]
        candidates = {other for place in places for other in place}
        scored = ((_jaccard(shingles[i], shingles[j]), -j) for j in candidates if not _equal(texts[i], texts[j]))
        best = max(scored, default=(0.0, 0))
        if best[0] >= threshold:
            found.append((i, -best[1], best[0]))
        for place in places:
            if len(place) < _COMPARED_PER_BUCKET:
                place.append(i)
    return found


def contaminated(rows: Sequence[tuple[Words, Words]], suites: Mapping[str, Sequence[str]]) -> list[tuple[int, str]]:
    """(row, suite) where a row (its prompt, its whole text) shares 13 words in a row with an eval prompt, or holds the
    whole of a shorter one.

    Prompts under 4 words must be the row's prompt. N-grams that many prompts of a suite share are its wording, not its
    items, and are ignored.
    """
    by_length = _eval_grams(suites)
    found: set[tuple[int, str]] = set()
    for i, (prompt, _) in enumerate(rows) if any(size < _SHORTEST for size in by_length) else ():
        wanted = by_length.get(len(prompt), {}) if 0 < len(prompt) < _SHORTEST else {}
        found |= {(i, name) for gram in _ngrams(prompt, len(prompt))[:1].tolist() for name in wanted.get(gram, ())}
    long = [(size, wanted, _filter(wanted)) for size, wanted in by_length.items() if size >= _SHORTEST]
    for start in range(0, len(rows) if long else 0, _TEXTS_PER_CHUNK):
        chunk = [text for _, text in rows[start : start + _TEXTS_PER_CHUNK]]
        owner = np.repeat(np.arange(len(chunk)), [len(text) for text in chunk])
        joined = np.concatenate(chunk)
        for size, wanted, may_be in long:
            grams = _ngrams(joined, size)
            hits = np.flatnonzero(may_be[(grams >> (np.uint64(64) - _FILTER_BITS)).astype(np.intp)])
            # A run of words that crosses from one text into the next is no text's.
            hits = hits[owner[hits] == owner[hits + size - 1]]
            for at, gram in zip(owner[hits].tolist(), grams[hits].tolist(), strict=True):
                found |= {(start + at, name) for name in wanted.get(gram, ())}
    return sorted(found)


def _eval_grams(suites: Mapping[str, Sequence[str]]) -> dict[int, dict[int, set[str]]]:
    """Length → hash of an n-gram → the suites it tells."""
    by_length: defaultdict[int, dict[int, set[str]]] = defaultdict(dict)
    for name, prompts in suites.items():
        counts: Counter[tuple[int, int]] = Counter()
        for own in hash_words(sorted({normalized(prompt) for prompt in prompts})):
            size = min(NGRAM, len(own))
            counts.update((size, gram) for gram in set(_ngrams(own, size).tolist()) if size)
        limit = max(2, len(prompts) // 20)
        for (size, gram), count in counts.items():
            if count <= limit:
                by_length[size].setdefault(gram, set()).add(name)
    return dict(by_length)


def _filter(wanted: Mapping[int, object]) -> NDArray[np.bool_]:
    """By the leading bits of a hash: whether it may be wanted."""
    table = np.zeros(1 << int(_FILTER_BITS), np.bool_)
    leading = np.array(list(wanted), np.uint64) >> (np.uint64(64) - _FILTER_BITS)
    table[leading.astype(np.intp)] = True
    return table


def _ngrams(own: Words, size: int) -> Words:
    """A hash of every run of `size` words; none where the text is shorter."""
    mixed = np.zeros(max(0, len(own) - size + 1), np.uint64)
    for offset in range(size):
        mixed = mixed * _BASE + own[offset : offset + len(mixed)]
    return mixed ^ (mixed >> np.uint64(29))


def _shingles(text: Words) -> Words:
    """The text's 5-word runs, each once. A shorter text is one run."""
    return np.unique(_ngrams(text, min(SHINGLE, len(text)))) if len(text) else text


def _signatures(shingles: Sequence[Words]) -> Iterator[tuple[int, list[int]]]:
    """(text, a number per band) for every text with words: 64 minima, each under its own mixing of the shingles."""
    for start in range(0, len(shingles), _TEXTS_PER_CHUNK):
        places = [i for i in range(start, min(start + _TEXTS_PER_CHUNK, len(shingles))) if len(shingles[i])]
        if not places:
            continue
        joined = np.concatenate([shingles[i] for i in places])
        starts = np.cumsum([0, *(len(shingles[i]) for i in places[:-1])])
        minima = np.stack([np.minimum.reduceat(_mixed(joined ^ salt), starts) for salt in _SALTS])
        bands = np.zeros((_BANDS, len(places)), np.uint64)
        for row in minima.reshape(_BANDS, _ROWS_PER_BAND, -1).swapaxes(0, 1):
            bands = _mixed(bands * _BASE + row)
        yield from zip(places, bands.T.tolist(), strict=True)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = values * _BASE
    return values ^ (values >> np.uint64(32))


_SALTS = np.random.RandomState(20240).randint(1, 1 << 62, size=_BANDS * _ROWS_PER_BAND).astype(np.uint64)


def _equal(a: Words, b: Words) -> bool:
    return len(a) == len(b) and bool((a == b).all())


def _jaccard(a: Words, b: Words) -> float:
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)
