"""Texts as one run of code points, and a table of what each character is: what the kernels of this folder read.

texts = Texts.of(["ab", "c"])          # points [97, 98, 99], offsets [0, 2, 3]
classes()[ord("a")] & ALPHABETIC       # not 0
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import regex

from data.kernels import table

SPACE, LINE, ALPHABETIC, MARK, LETTER, LOWER, UPPER, DIGIT = (1 << i for i in range(8))
PREFIX, SUFFIX, QUOTE, ICON, CURRENCY, STOP, PUNCTUATION, BEFORE_DOT, HAN, FACE = (1 << i for i in range(8, 18))
"""What a character is. MARK: means nothing alone (datatrove's list); STOP: ends a sentence; PUNCTUATION: Unicode's P; HAN: Chinese;
FACE: may begin an emoticon or a short form."""

LIMIT = 0x33480  # no character beyond has a meaning here; the table is 840 kB and texts use a few kB of it
_MARKS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~«´»–—’“”„…∶━►、。〈〉《》「」【】！％（），．１：；？～"
_PUNCTUATION = "…,:;!?¿؟¡()[]{}<>_#*&。？！，、；：～·।،۔؛٪"
_QUOTES = "'\"”“`‘´’‚„»«「」『』（）〔〕【】《》〈〉⟦⟧"
_CURRENCY = "$£€¥฿₽﷼₴" + "".join(map(chr, range(0x20A0, 0x20C0)))


@dataclass(frozen=True)
class Texts:
    """Texts as one run of code points."""

    points: np.ndarray
    """uint32 `[characters]`"""
    offsets: np.ndarray
    """int64 `[texts + 1]`: text i is points[offsets[i]:offsets[i + 1]]"""

    @staticmethod
    def of(texts: Sequence[str]) -> "Texts":
        points = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        offsets = np.zeros(len(texts) + 1, dtype=np.int64)
        np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)), out=offsets[1:])
        return Texts(points, offsets)


@table
def classes() -> np.ndarray:
    """uint32 `[LIMIT]`: the classes of every character, or-ed."""
    points = np.arange(LIMIT, dtype=np.uint32)
    points[0xD800:0xE000] = 0xFFFF  # surrogates are no characters
    characters = points.view("<U1")
    everything = "".join(characters[points != 0xFFFF].tolist())  # NUL is dropped by numpy, which no class but MARK misses
    found = np.zeros(LIMIT, dtype=np.uint32)

    def mark(kind: int, which: str | np.ndarray) -> None:
        found[[ord(c) for c in which] if isinstance(which, str) else which] |= np.uint32(kind)

    categories = np.array([unicodedata.category(c)[0] + (unicodedata.category(c)[1:] if ord(c) else "") for c in map(chr, range(LIMIT))])
    alphabetic, upper, lower = np.char.isalpha(characters), np.char.isupper(characters), np.char.islower(characters)
    letters = alphabetic.copy()
    letters[0x3000:0x3040] = True  # spaCy takes the marks of Chinese for letters
    mark(SPACE, np.array([chr(i).isspace() for i in range(LIMIT)]))
    mark(LINE, "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")
    mark(ALPHABETIC, alphabetic)
    mark(LETTER, letters)
    mark(LOWER, letters & ~upper)
    mark(UPPER, letters & ~lower)
    mark(DIGIT, "0123456789")
    stops = "".join(regex.findall(r"\p{Sentence_Terminal}", everything))
    mark(STOP, stops)
    mark(MARK, _MARKS + stops + "៖៙៚" + "".join(map(chr, [*range(9), 11, 12, *range(13, 32), *range(127, 160)])))
    mark(PUNCTUATION, np.char.startswith(categories, "P"))
    icons = categories == "So"
    mark(ICON, icons)
    mark(QUOTE, _QUOTES)
    mark(CURRENCY, _CURRENCY)
    mark(PREFIX, "§%=—–" + _PUNCTUATION + _QUOTES + _CURRENCY)
    mark(PREFIX, icons)
    mark(SUFFIX, "—–" + _PUNCTUATION + _QUOTES)
    mark(SUFFIX, icons)
    mark(BEFORE_DOT, "0123456789%²-+|" + _PUNCTUATION + _QUOTES)
    mark(BEFORE_DOT, letters & ~upper)
    mark(
        HAN,
        np.array([0x3400 <= i < 0x4DC0 or 0x4E00 <= i < 0xA000 or 0xF900 <= i < 0xFB00 or 0x20000 <= i < 0x33480 for i in range(LIMIT)]),
    )
    mark(FACE, "():;=[]<>8xX'’")
    return found
