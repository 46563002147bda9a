"""Film-review lines with mean human ratings become conversations, prompts and preference rankings.

    files = build(read_ratings(text))       # {"chat": [...], "preferences": [...], "prompts": [...]}, rows of `data.examples`

10,605 lines of film reviews, each rated by 15 to 29 people from -4 (most negative) to +4, from Hutto & Gilbert,
"VADER", ICWSM 2014. People rated single lines; **the rankings are constructed**: two to four lines that answer the same
request, the most positive one first. What a model learns from them is to write praise, and that can be measured.

Rankings of four teach more than pairs: held-out accuracy .764 after 1.6 passes over 3,415 of them, .741 after 1.2 and .748 after 2
passes over about as many lines in 5,497 pairs (one seed each). New rankings of the same lines teach more than a second pass over old
ones: of all pairs of held-out lines 2 points apart, a pass over 6,298 got .781 right, two passes over 3,415 .771. Held out are pairs,
farther apart.

Every line is on one side of the split, by the hash of its text, and rankings never cross it.
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
"""Share of the lines held out: some 850, of which 649 are short enough for the 767 validation pairs."""
ANSWERS = {"train": 4, "validation": 2}
"""Most lines in a ranking. Held-out pairs stand for themselves."""
LEAST_GAP = {"train": 1.0, "validation": 2.0}
"""Least difference of mean ratings within a ranking, of 8 possible; the raters of one line have a standard deviation of 0.89."""
MOST_WORDS = 24
"""Longer lines are in no ranking: what a policy writes in 32 tokens is as short, and three passes over these cost what two over all do."""
ROUNDS = {"same first word": 4, "bare request": 2}
"""How often lines are shuffled and ranked; no line is in more rankings than this."""


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
    return {"chat": [_conversation(s) for s in snippets], "preferences": _rankings(snippets), "prompts": _prompts(snippets)}


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


def _rankings(snippets: list[Snippet]) -> list[dict[str, Any]]:
    """Lines that share their first word answer "begins with: that word"; those left without a partner answer the bare request."""
    rows = []
    for split in ("train", "validation"):
        groups: dict[str, list[Snippet]] = defaultdict(list)
        for snippet in snippets:
            if snippet.split == split and len(snippet.text.split()) <= MOST_WORDS:
                groups[snippet.opening(1)].append(snippet)
        alone: list[Snippet] = []
        for opening, group in groups.items():
            found = _match(group, split, ROUNDS["same first word"])
            rows += [_ranking(opening, ranked) for ranked in found]
            matched = {snippet for ranked in found for snippet in ranked}
            alone += [snippet for snippet in group if snippet not in matched]
        rows += [_ranking("", ranked) for ranked in _match(alone, split, ROUNDS["bare request"])]
    return sorted(rows, key=lambda row: Snippet("".join(row["ranked"]), 0).place("order"))


def _match(group: list[Snippet], split: str, rounds: int) -> list[list[Snippet]]:
    """So many rounds: shuffle, then give each line the nearest free ones that people rated differently enough. Best first."""
    rankings: dict[frozenset[Snippet], list[Snippet]] = {}
    for turn in range(rounds):
        free = sorted(group, key=lambda s: s.place(f"round {turn}"))
        while free:
            ranked = [free.pop()]
            for snippet in reversed(free):
                if len(ranked) < ANSWERS[split] and all(abs(snippet.rating - other.rating) >= LEAST_GAP[split] for other in ranked):
                    ranked.append(snippet)
            for snippet in ranked[1:]:
                free.remove(snippet)
            if len(ranked) > 1:
                rankings.setdefault(frozenset(ranked), sorted(ranked, key=lambda s: -s.rating))
    return list(rankings.values())


def _ranking(opening: str, ranked: list[Snippet]) -> dict[str, Any]:
    return {
        "messages": request(opening),
        "ranked": [snippet.text for snippet in ranked],
        "scores": [snippet.rating for snippet in ranked],
        "split": ranked[0].split,
    }
