"""The recipe's section `data.quality`: which rules a text must keep. They stand in data/rules.py alone; this shows them as keys.

quality = Quality().rules()      # what data/ works with
"""

from typing import TYPE_CHECKING, Any

from pydantic import create_model, model_validator

from data import rules
from rlhf.recipe_base import Section, key


def _section(rule_set: rules.RuleSet) -> type[Section]:
    """A section with a key per rule; null turns a rule off."""
    keys: dict[str, Any] = {
        rule.name: (int | float | None, key(rule.threshold, rule.meaning, source=rule_set.source, values="null turns the rule off"))
        for rule in rule_set.rules
    }
    if rule_set.section == "c4":
        lines = rules.C4_LINES
        keys |= {
            "min_line_words": (int, key(lines.min_line_words, "Lines with fewer words are taken out.", unit="words", ge=0)),
            "max_word_characters": (
                int,
                key(lines.max_word_characters, "Lines with a longer word are taken out.", unit="characters", ge=1),
            ),
            "terminal_punctuation": (
                bool,
                key(lines.terminal_punctuation, "Lines that do not end with . ? ! or a quotation mark are taken out; FineWeb keeps them."),
            ),
        }
    return create_model(rule_set.section.title().replace("_", ""), __base__=Section, **keys)


_SECTIONS = {rule_set.section: _section(rule_set) for rule_set in rules.RULE_SETS.values()}


class _Choice(Section):
    by_language: dict[str, list[str]] = key(
        {code: list(names) for code, names in rules.BY_LANGUAGE.items()},
        "Rule sets by language code (`roundhouse data rules`); `other` stands for the rest, which is dropped without it.",
    )
    min_language_score: float = key(
        0.65, "Texts whose language is less certain are dropped; 0 keeps all.", unit="fraction", ge=0, le=1, source="arXiv:2406.17557"
    )

    @model_validator(mode="after")
    def _known(self) -> "_Choice":
        for names in self.by_language.values():
            for name in names:
                if name not in rules.RULE_SETS:
                    raise ValueError(f"by_language: there is no rule set {name!r} (there are {', '.join(rules.RULE_SETS)})")
        return self

    def rules(self) -> rules.Quality:
        """The same for data/, which knows nothing of recipes."""
        given = {section: getattr(self, section).model_dump() for section in _SECTIONS}
        lines = {name: given["c4"].pop(name) for name in rules.C4_LINES.__dataclass_fields__}
        return rules.Quality(
            by_language={code: tuple(names) for code, names in self.by_language.items()},
            thresholds=given,
            min_language_score=self.min_language_score,
            c4_lines=rules.C4Lines(**lines),
        )


_KEYS: dict[str, Any] = {
    rule_set.section: (_SECTIONS[rule_set.section], key(_SECTIONS[rule_set.section](), f"{rule_set.name}. {rule_set.about}"))
    for rule_set in rules.RULE_SETS.values()
}
_QUALITY: Any = create_model("Quality", __base__=_Choice, **_KEYS)


if TYPE_CHECKING:

    class Quality(_Choice):
        """For the type checker, which cannot look into `create_model`."""

else:
    Quality = _QUALITY


def unused_rules(quality: Any) -> dict[tuple[str, ...], str]:
    """The sections of rule sets that no language is held against, and why they idle, for `data.quality` as it stands in a file."""
    chosen = quality.get("by_language", rules.BY_LANGUAGE) if isinstance(quality, dict) else {}
    if not isinstance(chosen, dict) or not isinstance(quality, dict):
        return {}
    named = {name for names in chosen.values() if isinstance(names, (list, tuple)) for name in names}
    return {(s.section,): f"data.quality.by_language names no {s.name}" for s in rules.RULE_SETS.values() if s.name not in named}
