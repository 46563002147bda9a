"""Cleaning is a function of one text: off it changes nothing but form, twice is once, and what it finds is what a slower way finds."""

import re
import unicodedata

import ftfy.badness
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import cleaning, pii
from data.cleaning import Cleaning, cleaned, normalise

ALL = Cleaning(control=True, boilerplate=True, pii=pii.KINDS)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
# Texts made of what the finders look for, and of what they must not take for it
PIECES = (
    *("jane.doe+x@mail.corp.com", "@", "a@b", "8.8.8.8", "10.0.0.1", "1.2.3.4.5", "2606:4700:4700::1111", "fe80::1", "12:30:45"),
    *("(212) 555-0199", "212-555-0199", "+49 30 901820", "+86 138 1234 5678", "13812345678", "010-62345678", "3.14159265358979"),
    *("11010519491231002X", "110105194912310021", "Cookie policy", "JavaScript", "隐私", "é", "\u0301", "\r\n", "\n", "\r", "\x00", "\x85"),
    *("\ufeff", " ", ".", "-", ":", "1", "x", "，"),
)
MADE = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@given(text=ANY_TEXT | MADE)
def test_off_is_the_normal_form_and_on_changes_nothing_when_done_twice(text: str) -> None:
    assert cleaned(text, Cleaning()) == normalise(text) == unicodedata.normalize("NFC", text.replace("\r\n", "\n"))
    once = cleaned(text, ALL)
    assert cleaned(once, ALL) == once
    assert once == unicodedata.normalize("NFC", once)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\u2028\u2029]", once)
    assert not any("javascript" in line.lower() or "cookie policy" in line.lower() for line in once.split("\n"))


@settings(max_examples=300)
@given(text=MADE)
def test_the_hint_misses_nothing(text: str) -> None:
    for kinds in [*((kind,) for kind in pii.KINDS), pii.KINDS]:
        expected = text.encode()
        for kind in (kind for kind in pii.KINDS if kind in kinds):
            for finder in pii._FINDERS[kind]:
                expected = pii._replaced(expected, *finder)
        assert pii.without_pii(text.encode(), kinds) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mail Jane.Doe+news@mail.corp.com.", "Mail email@example.com."),
        ("写信给jane@corp.cn吧", "写信给email@example.com吧"),
        ("no @ here, nor a@b", None),
        ("ping 8.8.8.8, http://93.184.215.14:80/", "ping 192.0.2.1, http://192.0.2.1:80/"),
        ("at home 192.168.1.1, 127.0.0.1, 10.1.2.3; v1.2.3.4; 1.2.3.4.5; 999.1.1.1; 08.8.8.8; 224.0.0.1", None),
        ("dig 2606:4700:4700::1111 and 2001:4860:4860:0:0:0:0:8888", "dig 2001:db8::1 and 2001:db8::1"),
        ("fe80::1, ::1, 2001:db8::7, std::vector, 2024-01-01T12:30:45", None),
        ("Call (212) 555-2368, 212-555-2368, 1-212-555-2368 or +1 212.555.2368!", "Call 555-0100, 555-0100, 555-0100 or 555-0100!"),
        ("Tel:+49 30 901820-0", "Tel:555-0100"),
        ("in 1914-1918, 3.14159265358979, 100 200 300, 2015-555-234-0199, ISBN 978-3-16-148410-0", None),
        ("电话13812345678，+86 138 1234 5678，010-62345678", "电话13800138000，13800138000，010-55500100"),
        ("订单113812345678，20230113812345678", None),
        ("身份证11010519900307888X，110105194912310021", None),  # wrong check digits
        ("身份证440308199901101512。", "身份证11010519491231002X。"),
    ],
)
def test_personal_data(text: str, expected: str | None) -> None:
    assert cleaned(text, Cleaning(pii=pii.KINDS)) == (text if expected is None else expected)


def test_only_what_is_asked_for_is_replaced() -> None:
    text = "jane@corp.com 8.8.8.8 13812345678"
    assert cleaned(text, Cleaning(pii=("ip",))) == "jane@corp.com 192.0.2.1 13812345678"
    assert cleaned(text, Cleaning(boilerplate=True)) == text


@given(text=ANY_TEXT | st.text("ÃÂâàÐСвœŒØÙ©€™…‚‘“®°²½╬√≈ß\xa0\x80 aZ.", max_size=8))
def test_what_ftfy_finds_bad_is_not_missed(text: str) -> None:
    if ftfy.badness.is_bad(text):
        assert cleaning._BAD.search(text)


GOOD = (
    "naïve café — “quoted” … œuvre",
    "Привет, мир! Ёлка",
    "人工智能，２０２４年（全角）",
    "Ελλάδα άλφα",
    "שלום עולם",
    "10 × 20 ² °C, £5",
)


@pytest.mark.parametrize("text", GOOD)
def test_repair_undoes_wrong_decodings_and_leaves_the_rest(text: str) -> None:
    assert cleaned(text, Cleaning(repair=True)) == text
    if text[0] in "nПΕ":
        for wrong in ("latin-1", "cp1252"):
            try:
                broken = text.encode().decode(wrong)
            except UnicodeDecodeError:
                continue
            assert cleaned("Ein Satz: " + broken, Cleaning(repair=True)) == "Ein Satz: " + text


def test_html() -> None:
    page = """<html><head><title>T</title><script>var x = 1;</script></head><body><nav><a href="/">Home</a></nav><main><h1>Moons</h1>
        <p>Jupiter has &gt; 90 moons, na&iuml;vely.</p><p>Io is one.</p></main><footer>Impressum</footer></body></html>"""
    text = cleaned(page, Cleaning(html=True))
    assert [line for line in text.split("\n") if line] == ["Moons", "Jupiter has > 90 moons, naïvely.", "Io is one."]
    assert cleaned("", Cleaning(html=True)) == ""


def test_lines_and_control_characters() -> None:
    text = "\ufeffOne\r\ntwo\rthree\x0cfour\u2028five\tsix\x00\x1b[0m\x7f\x93"
    assert cleaned(text, Cleaning(control=True)) == "One\ntwo\nthree\nfour\nfive\tsix[0m"
    text = "Recipes\nPlease enable JavaScript.\nWe use cookies.\nBy entering you accept the TERMS OF USE\n\nBake cookies."
    assert cleaned(text, Cleaning(boilerplate=True)) == "Recipes\n\nBake cookies."
