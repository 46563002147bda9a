"""The kernels that measure texts, against plain Python."""

import numpy as np
import plain_signals
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.characters import Texts
from data.signals import SIGNALS, measure
from data.words import split

# Alphabets that meet the rules' conditions often: marks, short forms, units, line breaks of all kinds, other scripts.
PIECES = st.sampled_from(
    "the be to a. Mr. U.S. I'm don't cannot cant it’s 10km 5% 8) : ) :) ( [ ] { # - -- — … ... .. . , ; ? ! \" ' ‘ ’ + = / < > _ * ~ @ |"
    " http://a.bc/d?e www.x.org a@b.de 127.0.0.1 x.Y Co 3 42 é Ünder 你好 中 。 ☃ $ $5 5$ € km lorem ipsum Lorem K Ⅷ ß ª".split()
)
GAPS = st.sampled_from(["", "", " ", " ", "  ", "\n", "\n\n", "\n \n", "\t", "\r\n", "\r", "\x0b", "\x85", "\u2028", "\u00a0", "\u3000"])
TEXTS = st.lists(st.tuples(PIECES, GAPS), max_size=60).map(lambda pairs: "".join(piece + gap for piece, gap in pairs))
FEW = st.lists(st.tuples(st.sampled_from(["a", "b", "cd", "-", "."]), st.sampled_from([" ", " ", "\n", "\n\n"])), max_size=120).map(
    lambda pairs: "".join(piece + gap for piece, gap in pairs)
)


def words_of(text: str) -> list[str]:
    found, at = [], 0
    for length in split(Texts.of([text])).lengths:
        while text[at].isspace():
            at += 1
        found.append(text[at : at + int(length)])
        at += int(length)
    return found


@given(TEXTS | st.text(max_size=40) | st.text(alphabet="ab'’.,-/:=()<8D…3k", max_size=20))
@settings(max_examples=200, deadline=None)
@example("https://a.bc/d (see http://e.fg). 8) I'm 10km... Mr. O'Neil's and/or well-known—or")
def test_words_are_those_of_the_rules_in_plain_python(text: str) -> None:
    assert words_of(text) == plain_signals.words(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [  # as spacy.blank("en") of 3.8 splits them
        ("Dr. Smith didn't go to the U.S. (he's ill).", "Dr. Smith did n't go to the U.S. ( he 's ill ) ."),
        ("10km e.g. the well-known and/or a/b", "10 km e.g. the well - known and/or a / b"),
        ("http://foo.com/a?b=1 a.b@c.de x.Y def f(self):", "http://foo.com/a?b=1 a.b@c.de x. Y def f(self ):"),
        ("foo-a. bar (8) x)8)", "foo - a. bar ( 8) x)8 )"),
        ('cannot I’ve 9am Well... \'em "No!"', 'can not I ’ve 9 am Well ... \'em " No ! "'),
    ],
)
def test_words_as_spacy_splits_them(text: str, words: str) -> None:
    assert words_of(text) == words.split()


@given(st.lists(TEXTS | FEW | st.text(max_size=60), min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_signals_are_those_of_plain_python(texts: list[str]) -> None:
    assert measure(texts).to_pylist() == [plain_signals.signals(text) for text in texts]


@given(st.text(alphabet="天地玄黄 \na", min_size=14, max_size=200))
@settings(max_examples=100, deadline=None)
def test_repetition_of_chinese(text: str) -> None:
    of_text = plain_signals.signals(text)
    assert measure([text]).to_pylist() == [of_text]


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["one", "two", "three.", "\n"], size=int(n))) for n in rng.integers(0, 400, 50)]
    together = measure(texts).to_pylist()
    assert together == [measure([text]).to_pylist()[0] for text in texts]
    assert measure([]).num_rows == 0
    assert measure([]).column_names == list(SIGNALS)
