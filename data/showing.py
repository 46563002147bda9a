"""What a model will see of a row, token by token: whose words they are, and which of them it learns to write.

for title, tokens in shown(tokenizer, {"messages": [...]}):
    tokens[0]       # Token(text="<|user|>", role="", learned=False)
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.chat import encode_answer, encoded_parts
from data.cleaning import normalise
from data.formats import conversation, document, question, ranking
from data.reading import Broken
from data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Token:
    text: str
    """Of several tokens together where one alone is no whole character."""
    role: str
    """system, user, assistant; "text" of a document; "" for the template's words and special tokens."""
    learned: bool


def shown(tokenizer: Tokenizer, record: Mapping[str, Any]) -> list[tuple[str, list[Token]]]:
    """(title, tokens) of a row of any format that `examples` or `pipeline` reads, or of a parquet file that `examples` wrote.

    Raises Broken for a row that is none of them, DataError for one that the chat template refuses.
    """
    if "tokens" in record and "mask" in record:
        return [("conversation", _tokens(tokenizer, record["tokens"], record["mask"], ""))]
    if any(record.get(name) is not None for name in ("chosen", "ranked")):
        messages, texts, scores = ranking(record)
        prompt = [token for part in encoded_parts(tokenizer, messages, True) for token in _tokens(tokenizer, *part)]
        answers = [_answer(tokenizer, encode_answer(tokenizer, text)) for text in texts]
        return [("prompt", prompt), *_scored(answers, scores)]
    if "answers" in record and "scores" in record:
        answers = [_answer(tokenizer, ids) for ids in record["answers"]]
        return [("prompt", _stored_prompt(tokenizer, record)), *_scored(answers, record["scores"])]
    if isinstance(record.get("prompt"), list) and all(isinstance(i, int) for i in record["prompt"]):
        return [(_asked(record.get("answer")), _stored_prompt(tokenizer, record))]
    source, text = document(record)
    if isinstance(text, str):
        read = tokenizer.encode(normalise(source)) if source else []
        ids = [*read, *tokenizer.encode(normalise(text)), tokenizer.end_of_text]
        mask = [i >= len(read) for i in range(len(ids))]
        return [("document", _tokens(tokenizer, ids, mask, "text"))]
    messages = conversation(record)
    waiting, answer = messages[-1]["role"] != "assistant", None
    if waiting:
        messages, answer = question(record)
    tokens = [token for part in encoded_parts(tokenizer, messages, waiting) for token in _tokens(tokenizer, *part)]
    return [(_asked(answer) if waiting else "conversation", tokens)]


def _scored(answers: Sequence[list[Token]], scores: Sequence[float]) -> list[tuple[str, list[Token]]]:
    pairs = zip(answers, scores, strict=True)
    return [(f"answer {i} of {len(answers)}, score {score:g}", tokens) for i, (tokens, score) in enumerate(pairs, start=1)]


def _asked(answer: str | None) -> str:
    return "prompt" if answer is None else f"prompt; the right answer is {answer}"


def _answer(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Token]:
    return _tokens(tokenizer, ids, [True] * len(ids), "assistant")


def _stored_prompt(tokenizer: Tokenizer, record: Mapping[str, Any]) -> list[Token]:
    return _tokens(tokenizer, record["prompt"], [False] * len(record["prompt"]), "")


def _tokens(tokenizer: Tokenizer, ids: Sequence[int], mask: Sequence[bool], role: str) -> list[Token]:
    return list(_whole_characters(tokenizer, ids, mask, role))


def _whole_characters(tokenizer: Tokenizer, ids: Sequence[int], mask: Sequence[bool], role: str) -> Iterator[Token]:
    held = b""
    for i, (token, learned) in enumerate(zip(ids, mask, strict=True)):
        if not 0 <= token < tokenizer.vocab_size:
            raise Broken(f"id {token} is none of this tokenizer's {tokenizer.vocab_size}: give the one that wrote the file by --tokenizer")
        special = token in tokenizer.special_ids
        held += b"" if special else tokenizer.token_bytes(token)
        last = special or i + 1 == len(ids) or mask[i + 1] != learned or ids[i + 1] in tokenizer.special_ids
        try:
            text = held.decode(errors="backslashreplace" if last else "strict")
        except UnicodeDecodeError:
            continue
        if special:
            yield Token(tokenizer.decode([token]), "", learned)
        elif text:
            yield Token(text, role, learned)
        held = b""
