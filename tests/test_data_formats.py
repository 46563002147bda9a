"""Every spelling of a conversation, a ranking and a question says the same; what is none of them is told."""

from typing import Any

import pytest

from data.formats import conversation, document, question, ranking
from data.reading import Broken

HI, HELLO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
BE_KIND = {"role": "system", "content": "Be kind"}


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": [BE_KIND, HI, HELLO]}, [BE_KIND, HI, HELLO]),
        ({"messages": [{"from": "human", "content": "Hi"}, {"from": "assistant", "content": "Hello"}]}, [HI, HELLO]),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, [HI, HELLO]),
        ({"conversations": [{"from": "system", "value": "Be kind"}, {"from": "human", "value": "Hi"}]}, [BE_KIND, HI]),
        ({"conversations": [{"from": "human", "value": "Hi"}], "system": "Be kind"}, [BE_KIND, HI]),
        ({"instruction": "Hi", "output": "Hello"}, [HI, HELLO]),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, [HI, HELLO]),
        ({"instruction": "Add", "input": "1, 2", "output": "3"}, [{"role": "user", "content": "Add\n\n1, 2"}, HELLO | {"content": "3"}]),
        ({"prompt": "Hi"}, [HI]),
        ({"prompt": [HI], "messages": None}, [HI]),
        # as parquet gives them: every message has every field
        ({"messages": [{"role": None, "from": "human", "value": None, "content": "Hi"}]}, [HI]),
        ({"messages": [{"role": "user", "content": "e\u0301\r\n"}]}, [{"role": "user", "content": "é\n"}]),
    ],
)
def test_conversations(record: dict[str, Any], messages: list[dict[str, str]]) -> None:
    assert conversation(record) == messages


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"messages": []},
        {"messages": "Hi"},
        {"messages": [HI, "Hello"]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": 7, "content": "Hi"}]},
        {"messages": [{"role": "user", "content": ["Hi"]}]},
        {"conversations": [{"from": None, "value": "Hi"}]},
        {"instruction": "Hi"},
        {"instruction": ["Hi"], "output": "Hello"},
        {"prompt": 7},
        {"prompt": " "},
    ],
)
def test_what_is_no_conversation_is_told(record: dict[str, Any]) -> None:
    with pytest.raises(Broken, match="is needed"):
        conversation(record)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [HI]}, ([HI], None)),
        ({"prompt": "Hi", "answer": "42"}, ([HI], "42")),
        ({"prompt": "Hi", "answer": 42}, ([HI], "42")),
        ({"prompt": "Hi", "answer": 0.5}, ([HI], "0.5")),
        ({"prompt": "Hi", "answer": None}, ([HI], None)),
        ({"instruction": "Hi", "output": "Hello", "answer": "x"}, ([HI], "x")),
    ],
)
def test_questions(record: dict[str, Any], expected: tuple[Any, Any]) -> None:
    assert question(record) == expected


@pytest.mark.parametrize("answer", [["42"], True, {"is": 42}])
def test_an_answer_is_a_text_or_a_number(answer: object) -> None:
    with pytest.raises(Broken, match='"answer" must be a text or a number'):
        question({"prompt": "Hi", "answer": answer})


GOOD, BAD = HELLO | {"content": "Good"}, HELLO | {"content": "Bad"}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [HI], "chosen": "Good", "rejected": "Bad"},
        {"prompt": "Hi", "chosen": "Good", "rejected": "Bad"},
        {"instruction": "Hi", "input": "", "chosen": "Good", "rejected": "Bad"},
        {"prompt": "Hi", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [HI], "chosen": [HI, GOOD], "rejected": [HI, BAD]},
        {"chosen": [HI, GOOD], "rejected": [HI, BAD]},
        {"chosen": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Good"}], "rejected": [HI, BAD]},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Good", "rejected": "\n\nHuman: Hi\n\nAssistant: Bad"},
        {"messages": [HI], "ranked": ["Good", "Bad"], "scores": None, "chosen": None},
        {"messages": [HI], "ranked": [[GOOD], [BAD]]},
        {"ranked": [[HI, GOOD], [HI, BAD]], "scores": [1, 0]},
    ],
)
def test_rankings(record: dict[str, Any]) -> None:
    assert ranking(record) == ([HI], ["Good", "Bad"], [1.0, 0.0])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [HI], "chosen": "Good"}, 'no "rejected": a text is needed'),
        ({"chosen": "Good", "rejected": "Bad"}, '"chosen" does not end with a message of the assistant'),
        ({"chosen": [HI, GOOD], "rejected": [HI]}, '"rejected" does not end with a message of the assistant'),
        ({"chosen": [HI, GOOD], "rejected": [BE_KIND, HI, BAD]}, 'before the answer in "rejected" is not the prompt'),
        ({"messages": [BE_KIND], "chosen": [HI, GOOD], "rejected": [HI, BAD]}, 'before the answer in "chosen" is not the prompt'),
        ({"chosen": [GOOD], "rejected": [BAD]}, "no prompt"),
        ({"messages": [HI], "chosen": "Good", "rejected": "Bad", "margin": 10**400}, "one number each is needed"),
        ({"messages": [HI], "chosen": "Good", "rejected": "Bad", "margin": float("nan")}, "one number each is needed"),
    ],
)
def test_what_is_no_ranking_is_told(record: dict[str, Any], message: str) -> None:
    with pytest.raises(Broken, match=message):
        ranking(record)


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"text": "a", "target": "b"}, ("", "a")),
        ({"source": "a", "target": "b", "category": "c"}, ("a", "b")),
        ({"source": None, "target": "b", "text": None}, ("", "b")),
        ({"source": ["a"], "target": "b"}, ("", None)),
        ({"source": "a"}, ("", None)),
        ({}, ("", None)),
    ],
)
def test_documents(record: dict[str, Any], text: tuple[str, str | None]) -> None:
    assert document(record) == text
