"""The signals of one text in plain Python, written from their definitions: what the kernels are held against."""

import re
import unicodedata
from collections import Counter

import regex

from data.signals import SIGNALS, STOP_WORDS
from data.special_words import ABBREVIATIONS, MOST_SPECIAL, UNITS, emoticons, short_forms

PUNCTUATION = "…,:;!?¿؟¡()[]{}<>_#*&。？！，、；：～·।،۔؛٪"
QUOTES = "'\"”“`‘´’‚„»«「」『』（）〔〕【】《》〈〉⟦⟧"
CURRENCY = "$£€¥฿₽﷼₴" + "".join(map(chr, range(0x20A0, 0x20C0)))
MEANINGLESS = set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~«´»–—’“”„…∶━►、。〈〉《》「」【】！％（），．１：；？～៖៙៚")
BREAKS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"

SPECIAL = {w: [w] for w in ABBREVIATIONS.split()} | {f"{c}.": [f"{c}."] for c in "abcdefghijklmnopqrstuvwxyzäöü"}
SPECIAL |= {face: [face] for face in emoticons()}
SPECIAL |= {word.replace("'", "’"): [word.replace("'", "’")] for word in SPECIAL} | short_forms()


def letter(c: str) -> bool:
    return c.isalpha() or "\u3000" <= c < "\u3040"


def lower(c: str) -> bool:
    return letter(c) and not c.isupper()


def upper(c: str) -> bool:
    return letter(c) and not c.islower()


def digit(c: str) -> bool:
    return c in "0123456789"


def icon(c: str) -> bool:
    return unicodedata.category(c) == "So"


def stop(c: str) -> bool:
    return regex.fullmatch(r"\p{Sentence_Terminal}", c) is not None


def prefix(s: str) -> int:
    if s[0] in "§%=—–" + PUNCTUATION + QUOTES + CURRENCY or icon(s[0]):
        return 1
    dots = len(s) - len(s.lstrip("."))
    return dots if dots > 1 else int(s[0] == "+" and not (len(s) > 1 and digit(s[1])))


def suffix(s: str) -> int:
    if not s:
        return 0
    last, before = s[-1], s[-2:-1]
    dots = len(s) - len(s.rstrip("."))
    if dots:
        known = before and (before in "0123456789%²-+|" + PUNCTUATION + QUOTES or lower(before))
        return dots if dots > 1 else int(bool(known) or (len(s) > 2 and upper(s[-2]) and upper(s[-3])))
    if last == "…":
        return 2 if before == "…" else 1
    if last in "—–" + PUNCTUATION + QUOTES or icon(last):
        return 1
    if s[-2:] in ("'s", "'S", "’s", "’S"):
        return 2
    if before and digit(before) and (last == "+" or last in CURRENCY):
        return 1
    tail = re.search(r"(?<=[0-9])[^0-9]+$", s)
    return len(tail[0]) if tail and tail[0] in UNITS.split() else 0


def infix(s: str, i: int) -> int:
    rest = s[i:]
    if rest.startswith(".."):
        return len(rest) - len(rest.lstrip("."))
    if s[i] == "…" or icon(s[i]):
        return 1
    if i == 0 or len(rest) < 2:
        return 0
    before, c, after = s[i - 1], s[i], rest[1]
    if c in "+-*^" and digit(before) and (digit(after) or after == "-"):
        return 1
    if c == ".":
        return int((lower(before) or before in QUOTES) and (upper(after) or after in QUOTES))
    if c == ",":
        return int(letter(before) and letter(after))
    if letter(before) or digit(before):
        for mark in ("-", "–", "—", "--", "---", "——", "~", ":", "<", ">", "=", "/"):
            if rest.startswith(mark) and len(rest) > len(mark) and letter(rest[len(mark)]):
                return len(mark)
    return 0


HOST = "A-Za-z0-9\u00a1-\uffff"


def address(s: str) -> bool:
    scheme = re.match(r"(?:[^\W_]|[+\-._]){2,}?://", s)
    rest = s[scheme.end() :] if scheme else s
    place = re.match(r"[^/?#]*", rest)[0].rpartition("@")[2]
    place = re.sub(r":[0-9]{2,5}$", "", place)
    if re.fullmatch(r"[0-9]+(\.[0-9]+){3}", place):
        return True
    labels = place.split(".")
    inner = all(re.fullmatch(f"[{HOST}](?:[{HOST}_-]*[{HOST}])?", label) for label in labels[:-1])
    return len(labels) > 1 and inner and len(labels[-1]) > 1 and all(lower(c) for c in labels[-1])


def pieces(s: str) -> list[str]:
    front, back = [], []
    size = -1
    while s and len(s) != size:
        if s in SPECIAL:
            break
        size = len(s)
        p = prefix(s)
        q = suffix(s[p:])
        if p and p < size and s[p:] in SPECIAL:
            q = 0
        elif q and s[: size - q] in SPECIAL:
            p = 0
        front += [s[:p]] if p else []
        back += [s[size - q :]] if q else []
        s = s[p : size - q]
    middle = []
    if s in SPECIAL:
        middle = SPECIAL[s]
    elif s:
        cuts = [(i, infix(s, i)) for i in range(len(s))]
        if any(n for _, n in cuts) and address(s):
            middle = [s]
        else:
            start = i = 0
            while i < len(s):
                n = infix(s, i)
                if n and i:
                    middle += [s[start:i]] if i > start else []
                    middle.append(s[i : i + n])
                    start = i + n
                i += max(n, 1)
            middle += [s[start:]] if start < len(s) else []
    found = front + middle + back[::-1]
    joined, k = [], 0
    while k < len(found):
        several = ["".join(found[k : k + m]) for m in (4, 3, 2) if k + m <= len(found)]
        whole = [word for word in several if SPECIAL.get(word) == [word]]
        if whole and (found[k][0] in "():;=[]<>8xX'’" or found[k + 1] == "."):
            n = next(m for m in (4, 3, 2) if "".join(found[k : k + m]) == whole[0])
        else:
            n = 1
        joined.append("".join(found[k : k + n]))
        k += n
    return joined


def words(text: str) -> list[str]:
    return [word for chunk in text.split() for word in pieces(chunk)]


def sentences(line: str) -> int:
    """Sentences of one line, stripped."""
    count, ended = 0, False
    for gap, chunk in re.findall(r"(\s*)(\S+)", line.strip()):
        if count and ended and gap not in ("", " "):
            count, ended = count + 1, False
        for word in pieces(chunk):
            stops = len(word) == 1 and stop(word)
            if count == 0 or (ended and not stops and not all(unicodedata.category(c)[0] == "P" for c in word)):
                count, ended = count + 1, False
            ended |= stops
    return count


def duplicates(parts: list[str]) -> tuple[int, int]:
    again = [p for i, p in enumerate(parts) if p in parts[:i]]
    return len(again), sum(map(len, again))


def top(words: list[str], n: int) -> int:
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    if not grams:
        return 0
    most, count = Counter(grams).most_common(1)[0]
    return len(" ".join(most)) * count


def repeated(words: list[str], n: int) -> int:
    seen, i, characters = set(), 0, 0
    while i <= len(words) - n:
        gram = tuple(words[i : i + n])
        characters += sum(map(len, gram)) if gram in seen else 0
        i += n if gram in seen else 1
        seen.add(gram)
    return characters


def han(c: str) -> bool:
    return any(a <= ord(c) < b for a, b in ((0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0x20000, 0x33480)))


def signals(text: str) -> dict[str, int]:
    found = words(text)
    full = [w for w in found if not all(c in MEANINGLESS or stop(c) or (unicodedata.category(c) == "Cc" and c not in "\t\n") for c in w)]
    lines = text.splitlines()
    between = text.split("\n")
    filled = [line for line in between if line.strip()]
    parts = re.split(r"\n+", text) if text else []
    paragraphs = re.split(r"\n{2,}", text.strip()) if text.strip() else []
    chinese = sum(map(han, text))
    packed = "".join(text.split())
    grams = [packed[i : i + 13] for i in range(len(packed) - 12)] if chinese and 10 * chinese >= 3 * len(text) else []
    counts = Counter(grams)
    return {
        "characters": len(text),
        "words": len(found),
        "full_words": len(full),
        "full_word_characters": sum(map(len, full)),
        "alphabetic_words": sum(any(c.isalpha() for c in w) for w in found),
        "stop_words": len(set(STOP_WORDS) & set(found)),
        "hashes": text.count("#"),
        "ellipses": text.count("...") + text.count("…"),
        "lines": len(lines),
        "bullet_lines": sum(line.lstrip().startswith(("•", "-")) for line in lines),
        "ellipsis_lines": sum(line.rstrip().endswith(("...", "…")) for line in lines),
        "longest_line": max(map(len, between)),
        "newlines": text.count("\n"),
        "line_characters": len(text.replace("\n", "")),
        "parts": len(parts),
        "duplicate_parts": duplicates(parts)[0],
        "duplicate_part_characters": duplicates(parts)[1],
        "paragraphs": len(paragraphs),
        "duplicate_paragraphs": duplicates(paragraphs)[0],
        "duplicate_paragraph_characters": duplicates(paragraphs)[1],
        **{f"top_{n}_gram_characters": top(found, n) for n in (2, 3, 4)},
        **{f"duplicate_{n}_gram_characters": repeated(found, n) for n in range(5, 11)},
        "filled_lines": len(filled),
        "punctuated_lines": sum(stop(line[-1]) for line in filled),
        "short_lines": sum(len(line) <= 30 for line in filled),
        "duplicate_line_characters": duplicates(filled)[1],
        "sentences": sum(map(sentences, lines)),
        "lorem_ipsum": len(re.findall(r"(?=lorem ipsum)", text, re.IGNORECASE | re.ASCII)),
        "curly_brackets": text.count("{"),
        "letters": sum(c.isalpha() or digit(c) for c in text),
        "han": chinese,
        "grams_of_13": len(grams),
        "repeated_grams_of_13": sum(n for n in counts.values() if n > 1),
    }


assert max(map(len, SPECIAL)) <= MOST_SPECIAL
assert set(signals("a")) == set(SIGNALS)
