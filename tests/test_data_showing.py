"""What `roundhouse data show` prints is what the model will see: the same ids, the same mask, nothing left out."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st
from test_data_tokenizers import TRAINED
from typer.testing import CliRunner

from data.chat import encode_answer, encode_chat, encode_prompt
from data.cleaning import normalise
from data.showing import Token, shown
from rlhf.cli_data import data_app

TEXT = st.text("abc DEF 'sS tT 1234\n\t.,!\u00e9\u4f60\u597d\U0001f44d<|>", max_size=60).map(normalise)


def say(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def text_of(tokens: list[Token]) -> str:
    return "".join(token.text for token in tokens)


@given(texts=st.lists(TEXT, min_size=1, max_size=2), answer=TEXT)
def test_nothing_is_left_out_and_the_mask_is_that_of_training(texts: list[str], answer: str) -> None:
    messages = say(*texts, answer) if len(texts) == 1 else [{"role": "system", "content": texts[0]}, *say(texts[1], answer)]
    ((title, tokens),) = shown(TRAINED, {"messages": messages})
    ids, mask = encode_chat(TRAINED, messages)
    assert title == "conversation"
    assert text_of(tokens) == TRAINED.decode(ids)
    learned = [i for i, m in zip(ids, mask, strict=True) if m]
    assert text_of([token for token in tokens if token.learned]) == TRAINED.decode(learned) == answer + "<|end|>"


def test_rows_of_all_kinds() -> None:
    found = dict(shown(TRAINED, {"prompt": "1 + 1?", "ranked": ["2", "3"], "scores": [2, 0.5]}))
    assert list(found) == ["prompt", "answer 1 of 2, score 2", "answer 2 of 2, score 0.5"]
    assert {token.role for token in found["prompt"] if "1" in token.text} == {"user"}
    assert not any(token.learned for token in found["prompt"])
    assert text_of(found["answer 2 of 2, score 0.5"]) == "3<|end|>"
    ((title, _),) = shown(TRAINED, {"prompt": "1 + 1?", "answer": 2})
    assert title == "prompt; the right answer is 2"
    ((title, tokens),) = shown(TRAINED, {"source": "\u4f60", "target": "\u597d"})
    assert title == "document"
    assert [(token.text, token.learned) for token in tokens] == [("\u4f60", False), ("\u597d", True), ("<|endoftext|>", True)]  # not bytes


def test_what_the_data_stage_wrote_looks_the_same(tmp_path: Path) -> None:
    messages = say("Hi", "Hello")
    ids, mask = encode_chat(TRAINED, messages)
    prompt, answers = encode_prompt(TRAINED, messages[:1]), [encode_answer(TRAINED, text) for text in ("Hello", "No")]
    ((_, stored),) = shown(TRAINED, {"tokens": ids, "mask": mask})
    ((_, direct),) = shown(TRAINED, {"messages": messages})
    assert [(t.text, t.learned) for t in stored] == [(t.text, t.learned) for t in direct]
    pairs = shown(TRAINED, {"prompt": prompt, "answers": answers, "scores": [1.0, 0.0]})
    assert [text_of(tokens) for _, tokens in pairs] == ["<|user|>Hi<|end|><|assistant|>", "Hello<|end|>", "No<|end|>"]
    TRAINED.save(tmp_path / "tokenizer")
    (tmp_path / "prompts").mkdir()
    pq.write_table(pa.table({"prompt": [prompt], "answer": ["42"]}), tmp_path / "prompts/train.parquet")
    result = CliRunner().invoke(data_app, ["show", str(tmp_path / "prompts/train.parquet")])
    assert f"row 1, prompt; the right answer is 42: {len(prompt)} tokens, 0 learned\n<|user|>Hi<|end|><|assistant|>" in result.output


def test_the_command(tmp_path: Path) -> None:
    rows: list[Any] = [{"messages": say("Hi", "Hello\nyou")}, {"x": 1}, {"text": "never shown"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    TRAINED.save(tmp_path / "words")
    result = CliRunner().invoke(data_app, ["show", str(tmp_path / "a.jsonl"), "-n", "2", "--tokenizer", str(tmp_path / "words")])
    assert "<|user|>Hi<|end|><|assistant|>[Hello\u21b5\nyou<|end|>]" in result.output
    assert "row 2 cannot be used: no messages" in result.output
    assert "never" not in result.output
