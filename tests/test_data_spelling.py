"""Bytes per token of several vocabularies are those of plain counting, and a picture shows them."""

import json
from pathlib import Path

import pytest
from test_data_tokenizers import SAMPLE, TRAINED
from test_data_vocabulary import CHINESE, GROWN

from data import reading
from data.errors import DataError
from data.spelling import Spelled, spelling
from rlhf import charts

ENGLISH = ["Four score and seven years ago our fathers brought forth on this continent a new nation.", "We the people."]


@pytest.mark.usefixtures("ray_session")
def test_every_source_and_language_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "RANGE", 400)
    poems, mixed, code = tmp_path / "poems.jsonl", tmp_path / "mixed.jsonl", tmp_path / "code.txt"
    poems.write_text("".join(json.dumps({"text": text}) + "\n" for text in CHINESE) + '{"no": "text"}\n')
    chat = {"messages": [{"role": "user", "content": "明月几时有？"}, {"role": "assistant", "content": "把酒问青天。"}]}
    mixed.write_text("".join(json.dumps({"text": text}) + "\n" for text in ENGLISH) + json.dumps(chat) + "\n")
    code.write_text(SAMPLE[2])
    rows = spelling([poems, mixed, code], ["verse", "verse", "code"], {"plain": TRAINED, "longer": GROWN})
    texts = {("verse", "zh"): [*CHINESE, "明月几时有？\n把酒问青天。"], ("verse", "en"): ENGLISH, ("code", "code"): [SAMPLE[2]]}
    assert {(row.source, row.language) for row in rows} == set(texts)
    assert [row.text_bytes for row in rows] == sorted((row.text_bytes for row in rows), reverse=True)
    for row in rows:
        expected = texts[row.source, row.language]
        counted = {name: sum(len(t.encode(text)) for text in expected) for name, t in (("plain", TRAINED), ("longer", GROWN))}
        assert row == Spelled(row.source, row.language, len(expected), sum(len(text.encode()) for text in expected), counted)
    (chinese,) = [row for row in rows if row.language == "zh"]
    assert chinese.bytes_per_token("longer") > 1.4 * chinese.bytes_per_token("plain")
    with pytest.raises(DataError):
        spelling([tmp_path / "missing.jsonl"], ["x"], {"plain": TRAINED})


def test_the_picture(tmp_path: Path) -> None:
    rows = [(f"source {i}", {name: 1.0 + i + n / 7 for n, name in enumerate("abcd")}) for i in range(3)]
    assert charts.spelling(rows, tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
