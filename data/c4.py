"""C4's edit of a text: it drops lines that are no sentences.

    c4_lines(["Home | About\nThis is a sentence of a page.\nPlease enable JavaScript."])     # ["This is a sentence of a page."]

Lines lose their outer whitespace and footnote marks ([1], [edit], [citation needed]). A line with "lorem ipsum" or a curly bracket stays
where C4 would drop the whole text for it: the rules of c4@1 are to see it. As datatrove 0.10.1's C4QualityFilter does it.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from data.characters import LIMIT, LINE, SPACE, Texts, classes
from data.kernels import kernel
from data.rules import C4_LINES, C4Lines

_PHRASES = (
    "javascript", "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies",
)  # fmt: skip
_NOTES = ("[edit]", "[citation needed]")


def c4_lines(texts: Sequence[str], lines: C4Lines = C4_LINES) -> list[str]:
    """The texts without the lines that C4 drops; "" where none is left."""
    run = Texts.of(texts)
    points, offsets = _edit(
        run.points, run.offsets, classes(), *_packed, lines.min_line_words, lines.max_word_characters, lines.terminal_punctuation
    )
    data, at = points.tobytes(), (4 * offsets).tolist()
    return [data[a:b].decode("utf-32-le", "surrogatepass") for a, b in pairwise(at)]


def _pack(strings: Sequence[str]) -> np.ndarray:
    """uint32 `[strings, longest]`, padded with 0."""
    packed = np.zeros((len(strings), max(map(len, strings)) + 1), np.uint32)
    for row, string in zip(packed, strings, strict=True):
        row[: len(string)] = [ord(c) for c in string]
    return packed


_packed = (_pack(_PHRASES), _pack(["lorem ipsum"]), _pack(_NOTES))


@kernel
def _is(points, i, table):  # type: ignore[no-untyped-def]
    return table[points[i]] if points[i] < LIMIT else np.uint32(0)


@kernel
def _begins(points, i, end, strings, fold):  # type: ignore[no-untyped-def]
    """The length of the string that stands at i, capital letters taken as small ones if fold; 0 if none does."""
    for row in range(len(strings)):
        k = 0
        while strings[row, k] and i + k < end:
            c = points[i + k]
            if fold and 65 <= c <= 90:
                c += np.uint32(32)
            if c != strings[row, k]:
                break
            k += 1
        if not strings[row, k]:
            return k
    return 0


@kernel
def _edit(points, offsets, table, phrases, lorem, notes, min_words, max_characters, punctuation):  # type: ignore[no-untyped-def]
    out, size, scripts, policies = np.empty(len(points), np.uint32), 0, phrases[:1], phrases[1:]
    out_offsets = np.zeros(len(offsets), np.int64)
    for text in range(len(offsets) - 1):
        at, stop, first = offsets[text], offsets[text + 1], size
        while at < stop:
            end = at
            while end < stop and not _is(points, end, table) & LINE:
                end += 1
            a, b = at, end
            at = end + 1
            while a < b and _is(points, a, table) & SPACE:
                a += 1
            while b > a and _is(points, b - 1, table) & SPACE:
                b -= 1
            words, length, longest = 0, 0, 0
            for i in range(a, b):
                length = 0 if _is(points, i, table) & SPACE else length + 1
                words += length == 1
                longest = max(longest, length)
            if longest > max_characters or words < min_words:
                continue
            start = size
            if start > first:
                out[size] = 10
                size += 1
            line, i = size, a
            while i < b:
                if points[i] == 91:
                    note, k = _begins(points, i, b, notes, False), i + 1
                    while k < b and 48 <= points[k] <= 57:
                        k += 1
                    if k < b and points[k] == 93:
                        note = k + 1 - i
                    if note:
                        i += note
                        continue
                if size > first or not _is(points, i, table) & SPACE:  # the text as a whole begins with no space
                    out[size] = points[i]
                    size += 1
                i += 1
            last = out[size - 1] if size > line else np.uint32(0)
            dots = size - line >= 3 and last == 46 and out[size - 2] == 46 and out[size - 3] == 46
            if punctuation and (dots or not (last == 46 or last == 63 or last == 33 or last == 34 or last == 39)):
                size = start
                continue
            phrase, placeholder, curly, script = False, False, False, False
            for i in range(line, size):
                c = out[i]
                curly |= c == 123
                placeholder |= (c == 108 or c == 76) and _begins(out, i, size, lorem, True) > 0
                if c == 106 or c == 74:
                    script |= _begins(out, i, size, scripts, True) > 0
                elif c == 116 or c == 84 or c == 112 or c == 80 or c == 99 or c == 67 or c == 117 or c == 85:
                    phrase |= _begins(out, i, size, policies, True) > 0
            if not placeholder and (script or (phrase and not curly)):
                size = start
        begin = first
        while size > begin and _is(out, size - 1, table) & SPACE:
            size -= 1
        out_offsets[text + 1] = size
    return out[:size].copy(), out_offsets
