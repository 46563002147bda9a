"""The independent scorers know good words from bad ones."""

import pytest

from rlhf.scorers import SCORERS


@pytest.mark.parametrize("name", sorted(SCORERS))
def test_scorers(name: str) -> None:
    texts = ["a wonderful, funny film", "a dull and terrible mess", "", "é 🎬", "A WONDERFUL, FUNNY FILM"]
    good, bad, nothing, strange, loud = SCORERS[name](texts)
    assert good > 0 > bad
    assert loud >= good
    assert nothing == strange == 0.0
    assert all(isinstance(score, float) for score in (good, bad, nothing))
    assert SCORERS[name]([]) == []


def test_by_hand() -> None:
    assert SCORERS["afinn"](["good, good, bad", "superb"]) == [3.0, 5.0]
    assert SCORERS["vader"](["good"]) == [0.4404]
