"""Independent scorers: text in, a number out, by published word lists that no stage trains on.

    scores = SCORERS["afinn"](["a wonderful film", "dull"])         # [4.0, -2.0]

Whoever optimises a reward model learns its mistakes too. A scorer with other mistakes tells whether the answers got better.
"""

from collections.abc import Callable
from functools import cache
from typing import Any


def afinn(texts: list[str]) -> list[float]:
    """Sum of the ratings, -5 to 5, of the English words of a text that are among AFINN-165's 3,382; no words, 0.0.

    Nielsen 2011, "A new ANEW: evaluation of a word list for sentiment analysis in microblogs", arXiv:1103.2903.
    """
    return [float(_afinn().score(text)) for text in texts]


def vader(texts: list[str]) -> list[float]:
    """VADER's compound score, -1 to 1: a word list of human ratings with rules for negation, emphasis and "but".

    Hutto and Gilbert 2014, "VADER: a parsimonious rule-based model for sentiment analysis of social media text", ICWSM.
    """
    return [float(_vader().polarity_scores(text)["compound"]) for text in texts]


SCORERS: dict[str, Callable[[list[str]], list[float]]] = {"afinn": afinn, "vader": vader}


@cache
def _afinn() -> Any:
    from afinn import Afinn

    return Afinn()


@cache
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
