"""The quality rules by name and version: what is measured, against which threshold, and who says so. Plain data, cheap to import.

    RULE_SETS["gopher@1"].rules[0]         # Rule("min_words", 50, "full_words"): at least 50 words with more than punctuation
    Quality(by_language={"en": ("gopher@1",)}, thresholds=merged({"gopher": {"min_words": 20}}))

A rule holds a signal (signals.py), or its share of another signal, against one number. `min_...` is the least a text must have, `max_...`
the most it may have; null turns the rule off. What a version says never changes: another default or definition is another version.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rule:
    name: str
    """min_... or max_...: which of the two the threshold is."""
    threshold: float
    signal: str
    of: str | None = None
    """The signal is divided by this one (0 / 0 = 0)."""
    meaning: str = ""


@dataclass(frozen=True)
class RuleSet:
    name: str
    """name@version; the name without version is that of its section in a recipe."""
    source: str
    about: str
    rules: tuple[Rule, ...]

    @property
    def section(self) -> str:
        return self.name.partition("@")[0]


@dataclass(frozen=True)
class C4Lines:
    """What C4 drops of a text, line by line (c4.py). No thresholds on signals: another value is another text."""

    min_line_words: int = 3
    """Shorter lines go."""
    max_word_characters: int = 1000
    """Lines with a longer word go."""
    terminal_punctuation: bool = True
    """Lines that do not end with . ? ! or a quotation mark go. FineWeb leaves this out."""


C4_LINES = C4Lines()
_REPETITION = (
    *((f"top_{n}_gram", share, f"the most frequent {n} words in a row") for n, share in ((2, 0.20), (3, 0.18), (4, 0.16))),
    *(
        (f"duplicate_{n}_gram", share, f"repeated {n} words in a row")
        for n, share in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
    ),
)
RULE_SETS: dict[str, RuleSet] = {
    rules.name: rules
    for rules in (
        RuleSet(
            "gopher@1",
            "arXiv:2112.11446, A1.1",
            "English prose: length, words, symbols, lists.",
            (
                Rule("min_words", 50, "full_words", None, "Words, punctuation marks not counted."),
                Rule("max_words", 100_000, "full_words", None, "Words, punctuation marks not counted."),
                Rule("min_mean_word_length", 3, "full_word_characters", "full_words", "Mean characters of a word."),
                Rule("max_mean_word_length", 10, "full_word_characters", "full_words", "Mean characters of a word."),
                Rule("max_hashes", 0.1, "hashes", "words", "Number signs per word."),
                Rule("max_ellipses", 0.1, "ellipses", "words", "Ellipses per word."),
                Rule("max_bullet_lines", 0.9, "bullet_lines", "lines", "Share of lines that begin with a bullet."),
                Rule("max_ellipsis_lines", 0.3, "ellipsis_lines", "lines", "Share of lines that end with an ellipsis."),
                Rule("min_alphabetic_words", 0.8, "alphabetic_words", "words", "Share of words with a letter."),
                Rule("min_stop_words", 2, "stop_words", None, "How many of {the be to of and that have with} occur."),
            ),
        ),
        RuleSet(
            "gopher_repetition@1",
            "arXiv:2112.11446, table A1",
            "Texts that say the same again and again. For languages that put spaces between words.",
            (
                Rule("max_duplicate_paragraphs", 0.3, "duplicate_paragraphs", "paragraphs", "Share of paragraphs that stood before."),
                Rule("max_duplicate_paragraph_characters", 0.2, "duplicate_paragraph_characters", "characters", "Their share of the text."),
                Rule("max_duplicate_lines", 0.3, "duplicate_parts", "parts", "Share of lines that stood before."),
                Rule("max_duplicate_line_characters", 0.2, "duplicate_part_characters", "characters", "Their share of the text."),
                *(
                    Rule(f"max_{name}", share, f"{name}_characters", "characters", f"Share of the text: {what}.")
                    for name, share, what in _REPETITION
                ),
            ),
        ),
        RuleSet(
            "c4@1",
            "arXiv:1910.10683, 2.2",
            "English web pages. Drops lines too, before anything is measured.",
            (
                Rule("max_lorem_ipsum", 0, "lorem_ipsum", None, 'Occurrences of "lorem ipsum".'),
                Rule("max_curly_brackets", 0, "curly_brackets", None, "Opening curly brackets: code, not text."),
                Rule("min_sentences", 5, "sentences", None, "Sentences of the lines that stay."),
            ),
        ),
        RuleSet(
            "fineweb@1",
            "arXiv:2406.17557, 3.5",
            "English web pages: lists, menus, repeated lines.",
            (
                Rule("min_punctuated_lines", 0.12, "punctuated_lines", "filled_lines", "Share of lines that end a sentence."),
                Rule("max_short_lines", 0.67, "short_lines", "filled_lines", "Share of lines of at most 30 characters."),
                Rule(
                    "max_duplicate_line_characters",
                    0.01,
                    "duplicate_line_characters",
                    "line_characters",
                    "Share of lines that stood before.",
                ),
                Rule("max_newlines", 0.3, "newlines", "words", "Newlines per word: a list."),
            ),
        ),
        RuleSet(
            "chinese@1",
            "arXiv:2311.01149, 3.2 (ChineseWebText)",
            # Its lists of forbidden words and its ban on traditional characters are left out. Of 397,687 classical poems 96 % are dropped,
            # all but a few for their length: 4 % with min_characters = 20. Of 1,492 manual pages' troff source 75 %, as not Chinese enough.
            # English rules (Gopher, FineWeb) drop every one of both.
            "Chinese web pages; poems and chat are shorter.",
            (
                Rule("min_characters", 200, "characters", None, "Characters."),
                Rule("min_mean_line_length", 10, "characters", "lines", "Mean characters of a line."),
                Rule("min_han", 0.3, "han", "characters", "Share of Chinese characters."),
                Rule("max_repeated_13_grams", 0.5, "repeated_grams_of_13", "grams_of_13", "Share of 13-character stretches that repeat."),
            ),
        ),
        RuleSet(
            "code@1",
            "arXiv:2107.03374, 3.1 (Codex); arXiv:2305.06161, 3.1 (StarCoder)",
            # Of the 1,758 modules of Python's standard library 1 is dropped; Gopher and FineWeb drop all of them.
            "Programs: not what is generated, minified or data.",
            (
                Rule("max_line_length", 1000, "longest_line", None, "Characters of the longest line."),
                Rule("max_mean_line_length", 100, "line_characters", "lines", "Mean characters of a line."),
                Rule("min_letters", 0.25, "letters", "characters", "Share of letters and digits."),
            ),
        ),
    )
}


def merged(overrides: Mapping[str, Mapping[str, float | None]] | None = None) -> dict[str, dict[str, float | None]]:
    """Section -> rule -> threshold: the defaults, and what is given instead of them."""
    found: dict[str, dict[str, float | None]] = {s.section: {r.name: r.threshold for r in s.rules} for s in RULE_SETS.values()}
    for section, values in (overrides or {}).items():
        unknown = [name for name in values if name not in found.get(section, {})]
        if unknown or section not in found:
            raise KeyError(f"no rule {section}.{unknown[0] if unknown else ''}")
        found[section] |= values
    return found


BY_LANGUAGE: dict[str, tuple[str, ...]] = {
    "en": ("gopher_repetition@1", "gopher@1", "c4@1", "fineweb@1"),
    "zh": ("chinese@1",),
    "code": ("code@1",),
    "other": ("gopher_repetition@1",),
}


@dataclass(frozen=True)
class Quality:
    """What a text must be to be kept."""

    by_language: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict(BY_LANGUAGE))
    """Language code -> its rule sets in order. `other` stands for all that are not named; without it those are dropped."""
    thresholds: Mapping[str, Mapping[str, float | None]] = field(default_factory=merged)
    """Section -> rule -> threshold; None turns the rule off."""
    min_language_score: float = 0.65
    """Texts whose language is less certain are dropped (FineWeb, arXiv:2406.17557); 0 keeps all."""
    c4_lines: C4Lines = C4_LINES

    def sets_of(self, language: str) -> tuple[str, ...] | None:
        """The rule sets for a language; None: its texts are dropped."""
        return self.by_language.get(language, self.by_language.get("other"))
