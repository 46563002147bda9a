"""The fast way to tokenize: gigatoken (extra `fast-tokens`), with tiktoken's ids or not at all.

    fast = of(tokenizer, texts)                         # None where it is not installed, does not know the pattern, or disagrees
    ids = fast.encode("some text")                      # uint32 [t], as tokenizer.encode, or None: ask tiktoken

It is young, so it has to prove itself in every process: on NASTY and on the first of the texts it shall encode its ids
must be tiktoken's. Where they are not, a warning says on which text, and tiktoken does the work. English and code run at 90 to 150 MB/s on
a core, where tiktoken does 7 to 15; Chinese poems at 7 to 14, for it remembers words, and a run of ideographs is seldom seen twice.

Its Unicode is one version newer than tiktoken's: letters of 2025 are none to tiktoken, which cuts words elsewhere. So what Python's own
table, which is older than both, does not know goes to tiktoken (`tests/test_data_fast_tokens.py` tries all characters but most ideographs).
"""

import logging
import tempfile
import unicodedata
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import psutil

from data.encodings import rank_file

PATTERNS = {"r50k_base": "gpt2", "cl100k_base": "gpt4", "o200k_base": "o200k"}  # ours -> its names
WORTH = 1 << 18  # characters: opening it takes as long as tiktoken takes for a few MB, so short batches do not ask for it
PROOF = 1 << 16  # characters of the actual texts that are compared: 4 ms of tiktoken
GROWTH = 512 << 20  # bytes: it remembers every word it has seen, without a bound (240 MB of random words: 1.5 GiB), so it is opened anew
NASTY = (
    "",
    " ",
    "\n",
    "\r\n \r\n\t \x00\x01\x7f\x85\u00a0\u2003\u2028\u2029\u3000 \ufeff  x",
    "it's IT'S it'S we'Ll I'vE 'tis 'ſ 'ſoft they'rE'd o''clock '' 's's's",
    "1 12 123 1234 12345.678e-9 ١٢٣٤ १२३ ௧௨ ⅷ ½ ²³ ㊿ 𝟘𝟙𝟚 3rd v1.2.3-rc1",
    "naïve café e\u0301 \u0301 n\u0303\u0303 ﬁ ﬀ ẞß ĲŁ ǅ ʰ ª º İı Σς",
    "中文字符，没有空格。日本語のかなカナ々〆 한국어 조선말 한 ไทยไม่มีช่องว่าง ລາວ မြန်မာ ខ្មែរ བོད་",
    "नमस्ते दुनिया বাংলা தமிழ் తెలుగు ಕನ್ನಡ മലയാളം සිංහල العربيّة فارسی עִבְרִית ܣܘܪܝܝܐ አማርኛ ქართული Հայերեն Ελληνικά Кириллица ᏣᎳᎩ ᠮᠣᠩᠭᠣᠯ",
    "👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 #️⃣ \U0010ffff \ue000 \ufffd \ufffe 𠀀𪛖 𝔘𝔫𝔦 \u200b\u200d\u202e\u2060",
    "<|endoftext|><|user|><|end|> <|fim_prefix|><|endofprompt|> <s></s>[INST] <0x0A> \\n\\u4e2d",
    "def f(x):\n    return x**2  # comment\n\n\n\tif a!=b and c<=d: print('%s' % \"q\")\r\n\r\n//***--->{}[]();;==!!??..…「」",
    "https://example.org/a?b=c&d=%20e#f user@example.org /usr/lib64/x.so.6 CamelCaseWordsXMLHttp snake_case_words ALLCAPS",
    "a" * 300 + " " * 300 + "A" * 70 + "\n" * 50 + "=" * 130 + "中" * 90 + "'" * 9 + "\t" * 33 + "0" * 100,
    "123\U00010947's \u088f's",  # letters of Unicode 17: should Python's table know them one day, this tells
    "word  two   three    \n   four \n\n five\t\tsix \r seven\n",
)


def _new(character: str) -> bool:
    return unicodedata.category(character) in ("Cn", "Cs")  # unassigned; half a surrogate pair


UNSURE = np.array([_new(chr(unit)) for unit in range(1 << 16)])  # by unit of UTF-16: look closer (10 ms to make)


class Slow(Protocol):
    """What it has to know of the tokenizer whose work it does (`data.tokenizers.BytePairTokenizer`)."""

    name: str
    ranks: dict[bytes, int]
    pattern: str
    fingerprint: str

    def encode(self, text: str) -> list[int]: ...


class Fast:
    """gigatoken on one vocabulary, on the caller's thread alone. Raises OSError when no temporary file can be written."""

    def __init__(self, ranks: dict[bytes, int], pattern: str) -> None:
        dense = {token: i for i, token in enumerate(sorted(ranks, key=ranks.__getitem__))}  # it refuses ids with holes between them
        ids = np.array(sorted(ranks.values()), np.uint32)
        self.ids = None if len(ids) == ids[-1] + 1 else ids
        self.file, self.pattern = rank_file(dense), PATTERNS[pattern]
        self._open()

    def _open(self) -> None:
        from gigatoken.gigatoken_rs import BPETokenizer

        with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:  # it reads files alone
            file.write(self.file)
            file.flush()
            # Without special tokens: it would recognise them in ordinary text.
            self.backend = BPETokenizer.from_tiktoken(file.name, self.pattern, {})
        self.memory = psutil.Process().memory_info().rss

    def encode(self, text: str) -> np.ndarray | None:
        """Ids of a text, uint32 `[t]`; None when a character in it is too new."""
        if not text.isascii():
            units = UNSURE[np.frombuffer(text.encode("utf-16-le", "surrogatepass"), "<u2")]
            if units.any() and (any(map(_new, set(text)))):
                return None
        found = self.backend.encode(text)
        return found if self.ids is None else self.ids[found]

    def forget(self) -> None:
        """Open it anew when this process has grown by GROWTH meanwhile."""
        if psutil.Process().memory_info().rss > self.memory + GROWTH:
            self._open()


_opened: dict[str, Fast | None] = {}  # by fingerprint, of this process


def of(tokenizer: Slow, texts: Sequence[str]) -> Fast | None:
    """The fast way for this tokenizer, opened and proven once per process, when there is work enough (WORTH) for the first time."""
    if tokenizer.fingerprint not in _opened and sum(map(len, texts)) >= WORTH:
        _opened[tokenizer.fingerprint] = opened(tokenizer, texts)
    fast = _opened.get(tokenizer.fingerprint)
    if fast is not None:
        fast.forget()
    return fast


def opened(tokenizer: Slow, texts: Sequence[str]) -> Fast | None:
    """gigatoken for this tokenizer, when it is there and gives tiktoken's ids on NASTY and on the first PROOF characters of `texts`."""
    try:
        import gigatoken  # noqa: F401
    except ImportError:
        return None
    if tokenizer.pattern not in PATTERNS:
        return None
    left, proof = PROOF, list(NASTY)
    for text in texts:
        proof.append(text[:left])
        left -= len(text)
        if left <= 0:
            break
    try:
        fast = Fast(tokenizer.ranks, tokenizer.pattern)
        found = ((text, fast.encode(text)) for text in proof)
        wrong = next((text for text, ids in found if ids is not None and ids.tolist() != tokenizer.encode(text)), None)
    except (ValueError, OSError) as error:
        logging.getLogger(__name__).warning("gigatoken cannot run the vocabulary %r (%s): tiktoken does it", tokenizer.name, error)
        return None
    if wrong is not None:
        logging.getLogger(__name__).warning("gigatoken's ids are not tiktoken's, for instance for %.80r: tiktoken does the work", wrong)
        return None
    return fast
