"""Film-review lines with mean human ratings become conversations, prompts and preference pairs.

    files = build(read_ratings(text))       # {"chat": [...], "preferences": [...], "prompts": [...]}, rows of `data.examples`

10,605 lines of film reviews, each rated by 15 to 29 people from -4 (most negative) to +4, from Hutto & Gilbert,
"VADER", ICWSM 2014. People rated single lines; **the pairs are constructed**: two lines that answer the same request, the
one rated more positive is chosen. What a model learns from them is to write praise, and that can be measured.

Every line is on one side of the split, by the hash of its text, and pairs never cross it.
"""

import hashlib
import html
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from data.cleaning import in_validation, normalise

REQUEST = "Review a film."
REQUEST_WITH = "Review a film: "
HELD_OUT = 0.08
"""Share of the lines held out: some 850, which make some 440 validation pairs."""
LEAST_GAP = 2.0
"""Least difference of mean ratings within a pair, of 8 possible: raters of one line differ with a standard deviation of 0.89 on average."""
MOST_WORDS = 24
"""Longer lines are in no pair: what a policy writes in 32 tokens is as short, and three passes over these cost what two over all do."""
ROUNDS = {"same first word": 2, "bare request": 1}
"""How often lines are shuffled and paired; no line is in more pairs than this."""


@dataclass(frozen=True)
class Snippet:
    text: str
    rating: float

    def place(self, purpose: str) -> int:
        """A number for this text that no other choice depends on: shuffles and picks without a random generator."""
        return int.from_bytes(hashlib.blake2b(f"{purpose}/{self.text}".encode(), digest_size=8).digest(), "big")

    @property
    def split(self) -> str:
        return "validation" if in_validation(self.text, HELD_OUT) else "train"

    def opening(self, words: int) -> str:
        """The first words, at most all but the last."""
        return " ".join(self.text.split()[: max(1, min(words, len(self.text.split()) - 1))])


def read_ratings(text: str) -> list[Snippet]:
    """Lines of `id TAB mean rating TAB text`, without repeated texts. ValueError when a line is not of that form."""
    found: dict[str, Snippet] = {}
    for line in text.splitlines():
        _, rating, words = line.split("\t")
        snippet = Snippet(tidy(words), float(rating))
        found.setdefault(snippet.text, snippet)
    return list(found.values())


def tidy(text: str) -> str:
    """Undo what the source's preparation did to punctuation: entities, LaTeX quotes, dashes that became runs of spaces."""
    text = html.unescape(text).replace("''", '"').replace("`", "'")
    return normalise(re.sub(r" {2,}", " - ", text.strip()))


def build(snippets: list[Snippet]) -> dict[str, list[dict[str, Any]]]:
    """Rows by kind, in an order that depends on the texts alone."""
    snippets = sorted(snippets, key=lambda s: s.place("order"))
    return {"chat": [_conversation(s) for s in snippets], "preferences": _pairs(snippets), "prompts": _prompts(snippets)}


def request(opening: str) -> list[dict[str, str]]:
    """The user's message: any line, or one that begins with `opening`."""
    return [{"role": "user", "content": REQUEST_WITH + opening if opening else REQUEST}]


def _conversation(snippet: Snippet) -> dict[str, Any]:
    place = snippet.place("chat")
    opening = "" if place % 4 == 0 else snippet.opening(1 + place // 4 % 3)
    return {"messages": [*request(opening), {"role": "assistant", "content": snippet.text}], "split": snippet.split}


def _prompts(snippets: list[Snippet]) -> list[dict[str, Any]]:
    """Distinct openings of 1 to 3 words. One that occurs on both sides of the split is a training prompt."""
    splits: dict[str, str] = {}
    for snippet in snippets:
        opening = snippet.opening(1 + snippet.place("prompt") % 3)
        if splits.get(opening) != "train":
            splits[opening] = snippet.split
    return [{"messages": request(opening), "split": split} for opening, split in splits.items()]


def _pairs(snippets: list[Snippet]) -> list[dict[str, Any]]:
    """Lines that share their first word answer "begins with: that word"; those left without a partner answer the bare request."""
    rows = []
    for split in ("train", "validation"):
        groups: dict[str, list[Snippet]] = defaultdict(list)
        for snippet in snippets:
            if snippet.split == split and len(snippet.text.split()) <= MOST_WORDS:
                groups[snippet.opening(1)].append(snippet)
        alone: list[Snippet] = []
        for opening, group in groups.items():
            pairs = _match(group, ROUNDS["same first word"])
            rows += [_pair(opening, a, b, split) for a, b in pairs]
            paired = {snippet for pair in pairs for snippet in pair}
            alone += [snippet for snippet in group if snippet not in paired]
        rows += [_pair("", a, b, split) for a, b in _match(alone, ROUNDS["bare request"])]
    return sorted(rows, key=lambda row: Snippet(row["chosen"] + row["rejected"], 0).place("order"))


def _match(group: list[Snippet], rounds: int) -> list[tuple[Snippet, Snippet]]:
    """So many rounds: shuffle, then give each line the nearest free one that people rated differently enough."""
    pairs: dict[frozenset[Snippet], tuple[Snippet, Snippet]] = {}
    for turn in range(rounds):
        free = sorted(group, key=lambda s: s.place(f"round {turn}"))
        while free:
            first = free.pop()
            partner = next(
                (s for s in reversed(free) if abs(s.rating - first.rating) >= LEAST_GAP and frozenset((s, first)) not in pairs), None
            )
            if partner:
                free.remove(partner)
                pairs[frozenset((first, partner))] = (first, partner)
    return list(pairs.values())


def _pair(opening: str, a: Snippet, b: Snippet, split: str) -> dict[str, Any]:
    better, worse = (a, b) if a.rating > b.rating else (b, a)
    return {"messages": request(opening), "chosen": better.text, "rejected": worse.text, "split": split}
