"""Every rule of every set: a text that just passes, one that just fails, and the reason; C4's lines; what other thresholds would drop."""

import json
from math import ceil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.c4 import c4_lines
from data.quality import count, edited, reasons
from data.rules import RULE_SETS, C4Lines, Quality, merged
from data.signals import SIGNALS, measure
from rlhf import recipe_file
from rlhf.errors import RecipeError
from rlhf.what_if import what_if


def said_twice(n: int, share: float, length: int) -> str:
    """n words of one letter, said twice, in a text of `length` characters."""
    words = " ".join("abcdefghij"[:n])
    return f"{words} z {words} ".ljust(length, "y")


def in_lines(*texts: str, n: int, other: str = "line") -> str:
    return "\n".join([*texts, *(f"{other} {i}" for i in range(n - len(texts)))])


def han(n: int) -> str:
    return "".join(chr(0x4E00 + i) for i in range(n))


# rule -> (just passes, just fails)
GOLDEN: dict[str, dict[str, tuple[str, str]]] = {
    "gopher@1": {
        "min_words": ("w " * 50 + ".", "w " * 49 + "."),
        "max_words": ("w " * 100_000, "w " * 100_001),
        "min_mean_word_length": ("abc .", "abc ab ."),
        "max_mean_word_length": ("abcdefghij", "abcdefghij abcdefghijk"),
        "max_hashes": ("# " + "w " * 9, "# " + "w " * 8),
        "max_ellipses": ("… " + "w " * 9, "w... " + "w " * 7),
        "max_bullet_lines": (in_lines(*["- a"] * 9, n=10), in_lines(*[" • a"] * 10, n=10)),
        "max_ellipsis_lines": (in_lines(*["a..."] * 3, n=10), in_lines(*["a… "] * 4, n=10)),
        "min_alphabetic_words": ("a b c d 1", "a b c 1"),
        "min_stop_words": ("the be", "the the The"),
    },
    "gopher_repetition@1": {
        "max_duplicate_paragraphs": ("\n\n".join("aaaabcdefg"), "\n\n".join("aaaaabcdefg")),
        "max_duplicate_paragraph_characters": ("\n\n".join(["x" * 20, "x" * 20, "y" * 56]), "\n\n".join(["x" * 20, "x" * 20, "y" * 55])),
        "max_duplicate_lines": ("\n".join("aaaabcdefg"), "\n\n".join("aaaaabcdefg")),
        "max_duplicate_line_characters": ("\n".join(["x" * 20, "x" * 20, "y" * 58]), "\n".join(["x" * 20, "x" * 20, "y" * 57])),
        "max_top_2_gram": (said_twice(2, 0.2, 30), said_twice(2, 0.2, 29)),
        "max_top_3_gram": (said_twice(3, 0.18, 56), said_twice(3, 0.18, 55)),
        "max_top_4_gram": (said_twice(4, 0.16, 88), said_twice(4, 0.16, 87)),
        **{
            f"max_duplicate_{n}_gram": (said_twice(n, share, ceil(n / share)), said_twice(n, share, ceil(n / share) - 1))
            for n, share in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.1))
        },
    },
    "c4@1": {
        "max_lorem_ipsum": ("lorem, ipsum", "LOREM ipsum"),
        "max_curly_brackets": ("}", "{"),
        "min_sentences": ("One! " * 5, "One! " * 4),
    },
    "fineweb@1": {
        "min_punctuated_lines": (in_lines(*["a."] * 3, n=25), in_lines(*["a."] * 3, n=26)),
        "max_short_lines": (in_lines(*["y" * 30] * 67, n=100, other="x" * 30), in_lines(*["y"] * 68, n=100, other="x" * 30)),
        "max_duplicate_line_characters": ("\n".join(["x" * 10, "x" * 10, "y" * 980]), "\n".join(["x" * 10, "x" * 10, "y" * 979])),
        "max_newlines": ("a\n\n\n" + "a " * 9, "a\n\n\n" + "a " * 8),
    },
    "chinese@1": {
        "min_characters": (han(200), han(199)),
        "min_mean_line_length": (han(9) + "\n", han(8) + "\n"),
        "min_han": (han(3) + "a" * 7, han(29) + "a" * 71),
        "max_repeated_13_grams": (han(18) * 2, han(19) * 2),
    },
    "code@1": {
        "max_line_length": ("y" * 1000, "y" * 1001),
        "max_mean_line_length": ("y" * 100 + "\n" + "z" * 100, "y" * 100 + "\n" + "z" * 101),
        "min_letters": ("a+++", "a++++"),
    },
}
CASES = [(name, rule) for name, rules in GOLDEN.items() for rule in rules]


def only(set_name: str, rule: str) -> Quality:
    """A quality that asks for nothing but this rule."""
    off = {s.section: {r.name: None for r in s.rules if (s.name, r.name) != (set_name, rule)} for s in RULE_SETS.values()}
    return Quality(by_language={"xx": (set_name,)}, thresholds=merged(off))


def test_every_rule_has_its_golden_texts() -> None:
    assert [(s.name, r.name) for s in RULE_SETS.values() for r in s.rules] == CASES


@pytest.mark.parametrize(("set_name", "rule"), CASES)
def test_what_just_passes_and_what_just_fails(set_name: str, rule: str) -> None:
    signals = measure(GOLDEN[set_name][rule])
    assert reasons(signals, ["xx", "xx"], only(set_name, rule)).to_pylist() == [None, f"{set_name}: {rule}"]


def test_published_thresholds() -> None:
    """What a version says never changes."""
    said = {s.name: [r.threshold for r in s.rules] for s in RULE_SETS.values()}
    assert said == {
        "gopher@1": [50, 100_000, 3, 10, 0.1, 0.1, 0.9, 0.3, 0.8, 2],
        "gopher_repetition@1": [0.3, 0.2, 0.3, 0.2, 0.2, 0.18, 0.16, 0.15, 0.14, 0.13, 0.12, 0.11, 0.1],
        "c4@1": [0, 0, 5],
        "fineweb@1": [0.12, 0.67, 0.01, 0.3],
        "chinese@1": [200, 10, 0.3, 0.5],
        "code@1": [1000, 100, 0.25],
    }
    assert {signal for s in RULE_SETS.values() for r in s.rules for signal in (r.signal, r.of) if signal} <= set(SIGNALS)


def test_rules_are_chosen_by_language() -> None:
    texts = ["Too short.", han(300), "x = 1\n" * 9, "Trop court.", "Too short."]
    quality = Quality(by_language={"en": ("gopher@1",), "zh": ("chinese@1",), "code": ("code@1", "gopher@1")})
    why = reasons(measure(texts), ["en", "zh", "code", "fr", "en"], quality, np.array([0.9, 1, 1, 0.9, 0.6], np.float32))
    assert why.to_pylist() == ["gopher@1: min_words", None, "gopher@1: min_words", "language: fr", "language: uncertain"]
    others = Quality(by_language={"en": ("gopher@1",), "other": ()}, min_language_score=0)
    assert reasons(measure(texts), ["en", "zh", "code", "fr", "en"], others, np.zeros(5)).null_count == 3
    assert reasons(measure([]), [], quality).to_pylist() == []


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("  This line ends well. \nThis one does not\n", "This line ends well."),
        ("Two words.\nNow three words.", "Now three words."),
        ("He said it all...\nHe said it all!", "He said it all!"),
        ("Turn on JavaScript, please.\rRead our Privacy Policy now.\u2028It uses  cookies we think.", "It uses  cookies we think."),
        ("It was so. [12] \nIt was so.[edit]\nIt [citation needed] was so.", "It was so.\nIt  was so."),
        ("[1] It was so.", "It was so."),
        ("a " + "b" * 1001 + " c d.\na " + "b" * 1000 + " c d.", "a " + "b" * 1000 + " c d."),
        # What condemns the whole text stays, so that the rules see it.
        ("Use {x} use cookies.\nLorem ipsum with javascript.", "Use {x} use cookies.\nLorem ipsum with javascript."),
        ("", ""),
        ("nothing", ""),
    ],
)
def test_lines_that_c4_drops(text: str, left: str) -> None:
    assert c4_lines(["untouched by its neighbours.", text, ""]) == ["untouched by its neighbours.", left, ""]


def test_lines_without_terminal_punctuation_may_stay() -> None:
    assert c4_lines(["Not a sentence at all\nNo sentence"], C4Lines(terminal_punctuation=False)) == ["Not a sentence at all"]


def test_only_texts_under_c4_are_edited() -> None:
    texts = ["Home page\nThis is a sentence."] * 3
    quality = Quality(by_language={"en": ("c4@1",), "fr": ("gopher@1",)})
    assert edited(texts, ["en", "fr", "de"], quality) == ["This is a sentence.", texts[1], texts[2]]


def test_other_thresholds_are_counted_without_reading_a_text(tmp_path: Path) -> None:
    texts = ["the and " + "word " * n for n in (10, 30, 48, 100)]
    signals = measure(texts)
    columns = {
        "language": pa.array(["en"] * 4),
        "language_score": pa.array([1.0] * 4, pa.float32()),
        "bytes": pa.array(map(len, texts), pa.int64()),
    }
    table = pa.table({**columns, "tokens": pa.array([0, 0, 60, 120], pa.int32()), **{n: signals[n] for n in SIGNALS}})
    for i in range(4):
        pq.write_table(table.slice(i, 1), tmp_path / f"{i}.parquet")
    files = sorted(tmp_path.glob("*.parquet"))

    def counted(**gopher: float) -> dict[str, int]:
        found = count(files, Quality(by_language={"en": ("gopher@1",)}, thresholds=merged({"gopher": gopher})))
        return {reason: documents for reason, (documents, _) in found.items()}

    assert counted() == {"kept": 2, "gopher@1: min_words": 2}
    assert counted(min_words=20) == {"kept": 3, "gopher@1: min_words": 1}
    assert counted(max_words=60, min_words=11) == {"kept": 3, "gopher@1: max_words": 1}
    assert sum(documents for documents, _ in count(files, Quality()).values()) == 4  # all rule sets at once


def test_rules_are_plain_data() -> None:
    """A recipe's sections, the manifest and the list of rules are made of them."""
    assert json.loads(json.dumps(merged()))["fineweb"]["max_short_lines"] == 0.67
    with pytest.raises(KeyError, match=r"gopher\.min_wrods"):
        merged({"gopher": {"min_wrods": 1}})


def test_a_recipe_names_its_rules(recipe_path: Path) -> None:
    recipe = recipe_file.load(recipe_path, ["data.quality.gopher.min_words=20", "data.quality.c4.terminal_punctuation=false"])
    assert recipe.data.quality is not None
    quality = recipe.data.quality.rules()
    assert quality == Quality(thresholds=merged({"gopher": {"min_words": 20}}), c4_lines=C4Lines(terminal_punctuation=False))
    assert recipe_file.load(recipe_path).data.quality is None
    off = recipe_file.load(recipe_path, ["data.quality.gopher.min_words=null"]).data.quality
    assert off is not None
    assert off.rules().thresholds["gopher"]["min_words"] is None


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("data.quality.gopher.min_wrods=20", "did you mean data.quality.gopher.min_words"),
        ("data.quality.by_language={en: [gopher@7]}", r"there is no rule set 'gopher@7' \(there are gopher@1, "),
        ("data.quality={by_language: {en: [gopher@1]}, code: {min_letters: 0}}", "by_language names no code@1"),
    ],
)
def test_a_recipe_that_asks_for_no_such_rule(recipe_path: Path, override: str, complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        recipe_file.load(recipe_path, [override])


def test_what_if(recipe_path: Path, tmp_path: Path) -> None:
    recipe_path.write_text(recipe_path.read_text().replace("data:\n", "data:\n  quality: {by_language: {en: [gopher@1]}}\n"))
    folder = tmp_path / "runs" / "tiny" / "data" / "pretrain" / "documents"
    with pytest.raises(RecipeError, match="has no prepared corpus"):
        what_if(recipe_path, ["data.quality.gopher.min_words=20"])
    folder.mkdir(parents=True)
    texts = ["the and " + "word " * n for n in (30, 100)]
    columns = {"language": pa.array(["en"] * 2), "language_score": pa.array([1.0] * 2, pa.float32()), "tokens": [40, 110]}
    signals = measure(texts)
    pq.write_table(pa.table({**columns, **{n: signals[n] for n in SIGNALS}}), folder / "000000.parquet")
    now, then = what_if(recipe_path, ["data.quality.gopher.min_words=20"])
    assert now == {"kept": (1, 110), "gopher@1: min_words": (1, 40)}
    assert then == {"kept": (2, 150)}
    for override, complaint in (
        ("seed=3", "seed is no rule"),
        ("data.quality.by_language={en: [gopher@1, c4@1]}", "c4@1 takes lines out of the texts"),
    ):
        with pytest.raises(RecipeError, match=complaint):
            what_if(recipe_path, [override])
