"""More tokens for a vocabulary: the pieces that save most in a corpus, and what makes them reachable.

    growth = Growth(named("gpt2", cache), 5_000)
    tokenizer = growth.learned(batches(texts))              # words are counted on Ray
    tokenizer = named("gpt2", cache).extended(["人工智能"])  # pieces of one's own

New tokens have the highest ranks (`ranks.py`): they join what the old vocabulary has left apart, and never change how it cuts the rest.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import ray
import regex

from data.encodings import PATTERNS
from data.engine import gathered
from data.tokenizers import BytePairTokenizer

TASK_CHARACTERS = 4 << 20  # of text that one task counts the words of
MOST_TASKS = 16  # in flight: what waits for a core lies in the object store
CLOSE = 0.8  # joins at least this share as frequent as the most frequent one are made in one round: they save 99 % of what one by one would


Texts = Sequence[str] | Callable[[], Iterable[str]]
"""Texts of one task, or what reads them there: then the driver does not see them."""


@dataclass(frozen=True)
class Growth:
    """A vocabulary to be made longer by the pieces that save most tokens in texts."""

    base: BytePairTokenizer
    pieces: int

    def learned(self, texts: Iterable[Texts]) -> BytePairTokenizer:
        """The longer tokenizer. Words are counted on a connected Ray; the driver keeps each different word once."""
        return grown(self.base, counted(texts, self.base.pattern), self.pieces)


def counted(texts: Iterable[Texts], pattern: str) -> Counter[str]:
    """How often each word (pre-token of `pattern`) is in the texts, counted by a Ray task for each of `texts`."""
    task = ray.remote(words)
    found: Counter[str] = Counter()
    waiting: list[ray.ObjectRef] = []
    for batch in texts:
        waiting.append(task.remote(batch, pattern))
        if len(waiting) >= MOST_TASKS:
            for counts in gathered("words", [waiting.pop(0)]):
                found.update(counts)
    for counts in gathered("words", waiting):
        found.update(counts)
    return found


def words(texts: Texts, pattern: str) -> Counter[str]:
    """How often each word is in these texts; 12 MB/s."""
    cut = regex.compile(PATTERNS[pattern].tiktoken)
    found: Counter[str] = Counter()
    for text in texts() if callable(texts) else texts:
        found.update(cut.findall(text))
    return found


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in lists of about TASK_CHARACTERS."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= TASK_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def grown(tokenizer: BytePairTokenizer, counts: Counter[str], pieces: int) -> BytePairTokenizer:
    """`tokenizer` with `pieces` more tokens, fewer where the words hold no more: of all that two neighbouring tokens make, always that
    which is made most often. `counts` decides alone, not its order."""
    found = sorted(counts)
    tokens, lengths = tokenizer.encode_flat(found)
    several = lengths > 2  # a word of one token, and the end, has nothing to join
    tokens, lengths = tokens[np.repeat(several, lengths)], lengths[several]
    weights = np.array([counts[word] for word, keep in zip(found, several, strict=True) if keep], np.int64)
    ends = np.zeros(len(tokens), bool)
    ends[np.cumsum(lengths) - 1] = True
    bytes_of = {i: tokenizer.token_bytes(i) for i in np.unique(tokens).tolist()}
    learned: dict[bytes, None] = {}
    for left, right, new in joins(tokens.astype(np.int64), ends, np.repeat(weights, lengths), tokenizer.vocab_size):
        if len(learned) == pieces:
            break
        bytes_of[new] = bytes_of[left] + bytes_of[right]
        learned[bytes_of[new]] = None
    return tokenizer.extended(list(learned))


def joins(tokens: np.ndarray, ends: np.ndarray, weights: np.ndarray, first: int) -> Iterator[tuple[int, int, int]]:
    """(left, right, the id of both together), most useful first, with ids from `first` on, as long as a join is made twice.

    `tokens` int64 `[t]`: words one after the other, each ended by a token where `ends` (bool) is true; `weights` int64 `[t]`: how often
    the word is there. Byte-pair encoding makes one join and counts again. Here all joins make a round that are about as frequent as
    the first (CLOSE) and of which none ends where another begins, so that all of them can be made at once and their counts hold.
    """
    while len(tokens) > 1:
        pair = np.where(ends[:-1] | ends[1:], -1, (tokens[:-1] << 32) | tokens[1:])
        coded = pa.array(pair).dictionary_encode()  # three times as fast as sorting
        kinds, kind = coded.dictionary.to_numpy(), coded.indices.to_numpy()
        counts = np.bincount(kind, weights[:-1], len(kinds)).astype(np.int64)
        counts[kinds < 0] = 0
        order = np.lexsort((kinds, -counts))
        least = max(2, CLOSE * counts[order[0]])
        lefts: set[int] = set()
        rights: set[int] = set()
        made = np.full(len(kinds), -1, np.int64)
        for k in order[: int(np.searchsorted(-counts[order], -least, side="right"))].tolist():
            left, right = int(kinds[k]) >> 32, int(kinds[k]) & 0xFFFFFFFF
            if left not in rights and right not in lefts:
                yield left, right, first
                lefts.add(left)
                rights.add(right)
                made[k] = first
                first += 1
        if not lefts:
            return
        new = np.append(made[kind], -1)
        here = new >= 0
        begins = np.maximum.accumulate(np.where(here & ~np.append(False, here[:-1]), np.arange(len(here)), 0))
        here &= (np.arange(len(here)) - begins) % 2 == 0  # of x x x the first two are joined
        tokens = np.where(here, new, tokens)
        kept = ~np.append(False, here[:-1])
        tokens, ends, weights = tokens[kept], ends[kept], weights[kept]
