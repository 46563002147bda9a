"""What people call conversations, rankings and questions, in the spellings of the field, as what `examples.py` takes.

    messages = conversation(record)        # [{"role": "user", "content": "..."}, ...]
    prompt, answers, scores = ranking(record)
    prompt, answer = question(record)      # the answer is None where the record has none
    source, text = document(record)        # of {"source", "target"}, else "" and the text of {"text"}

A conversation is one of:

    {"messages": [{"role": "user", "content": "..."}]}               OpenAI; roles system, user, assistant
    {"messages": [{"from": "human", "content": "..."}]}              Colossal-LLaMA; human, assistant
    {"conversations": [{"from": "human", "value": "..."}]}           ShareGPT; system, human, gpt; a "system" beside it comes first
    {"instruction": "...", "input": "...", "output": "..."}          Alpaca; `input` may be missing or empty
    {"prompt": "..."} or {"prompt": [messages]}                      what waits for an answer

A ranking has "chosen" and "rejected" (with "margin") or "ranked", best first (with "scores"), beside a conversation. Answers are texts,
or messages whose last one is the answer; without a conversation beside them, what stands before the answers is the prompt and
the same in all (TRL's implicit prompts). Transcripts "\\n\\nHuman: ...\\n\\nAssistant: ..." (Anthropic's hh-rlhf) are such messages.
"""

import re
from collections.abc import Mapping
from typing import Any

from data.cleaning import normalise
from data.reading import Broken
from data.templates import Message

MOST = 3e38  # scores are kept as float32
ROLES = {"human": "user", "gpt": "assistant"}
_TURN = re.compile(r"\n\n(Human|Assistant): ?")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def document(record: Mapping[str, Any]) -> tuple[str, Any]:
    """What a row has to pretrain on, as it stands there: what is read only, and what is learned. The first is empty but for rows of
    {"source", "target"} (Colossal-LLaMA)."""
    if not _has(record, "target") or _has(record, "text"):
        return "", record.get("text")
    source = record["source"] if _has(record, "source") else ""
    return (source, record["target"]) if isinstance(source, str) else ("", None)


def conversation(record: Mapping[str, Any]) -> list[Message]:
    """The messages of a record, in normal form. Raises Broken."""
    if _has(record, "messages"):
        return _messages(record["messages"])
    if _has(record, "conversations"):
        messages = _messages(record["conversations"])
        system = record.get("system")
        if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": normalise(system)}, *messages]
        return messages
    if _has(record, "instruction"):
        return [*_instruction(record), {"role": "assistant", "content": _text(record, "output")}]
    if _has(record, "prompt"):
        return _prompt(record["prompt"])
    raise Broken('no messages: {"messages": [{"role": "user", "content": "..."}]} is needed')


def question(record: Mapping[str, Any]) -> tuple[list[Message], str | None]:
    """What waits for an answer, and the right answer, if it is known: a text or a number. Raises Broken."""
    messages = _instruction(record) if _has(record, "instruction") and not _has(record, "messages") else conversation(record)
    answer = record.get("answer")
    if answer is None:
        return messages, None
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise Broken(f'"answer" must be a text or a number, this is a {type(answer).__name__}')
    return messages, normalise(str(answer))


def ranking(record: Mapping[str, Any]) -> tuple[list[Message], list[str], list[float]]:
    """The prompt, the answers, best first, and their scores, descending. Raises Broken."""
    if _has(record, "ranked"):
        ranked = record["ranked"]
        if not isinstance(ranked, list) or len(ranked) < 2:
            raise Broken('"ranked" must be a list of two answers or more, best first')
        names, values = ["ranked"] * len(ranked), ranked
        scores = record["scores"] if _has(record, "scores") else list(range(len(ranked) - 1, -1, -1))
    else:
        names, values = ["chosen", "rejected"], [record.get(name) for name in ("chosen", "rejected")]
        scores = [record["margin"] if _has(record, "margin") else 1, 0]
    prompt, texts = _answers(record, names, values)
    numbers = isinstance(scores, list) and all(isinstance(x, int | float) and abs(x) <= MOST for x in scores)
    if not numbers or len(scores) != len(texts) or sorted(scores, reverse=True) != scores:
        raise Broken(f"scores {scores} for {len(texts)} answers: one number each is needed, descending; a margin is not negative")
    return prompt, texts, [float(x) for x in scores]


def _has(record: Mapping[str, Any], name: str) -> bool:
    """Parquet gives every row every column: null stands for what a row does not have."""
    return record.get(name) is not None


def _answers(record: Mapping[str, Any], names: list[str], values: list[Any]) -> tuple[list[Message], list[str]]:
    given = any(_has(record, name) for name in ("messages", "conversations", "instruction", "prompt"))
    prompt = question({**record, "answer": None})[0] if given else []
    texts = []
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        if given and not isinstance(value, list):
            texts.append(_text({name: value}, name))
            continue
        messages = _transcript(value) if isinstance(value, str) else _messages(value, name)
        if not messages or messages[-1]["role"] != "assistant":
            raise Broken(f'"{name}" does not end with a message of the assistant')
        *before, last = messages
        if i == 0 and not given:
            prompt = before
        if before != prompt and not (given and not before):
            raise Broken(f'what stands before the answer in "{name}" is not the prompt')
        texts.append(_text({name: last["content"]}, name))
    if not prompt:
        raise Broken('no prompt: "messages" or "prompt" is needed beside the answers')
    return prompt, texts


def _messages(found: Any, name: str = "messages") -> list[Message]:
    good = isinstance(found, list) and found and all(isinstance(m, dict) for m in found)
    messages = [_message(m) for m in found] if good else []
    if not messages or None in messages:
        raise Broken(f'no messages: {{"{name}": [{{"role": "user", "content": "..."}}]}} is needed')
    return [m for m in messages if m]


def _message(m: Mapping[str, Any]) -> Message | None:
    role = m["role"] if _has(m, "role") else ROLES.get(str(m.get("from")), m.get("from"))
    content = m["content"] if _has(m, "content") else m.get("value")
    return {"role": role, "content": normalise(content)} if isinstance(role, str) and isinstance(content, str) else None


def _instruction(record: Mapping[str, Any]) -> list[Message]:
    text, more = _text(record, "instruction"), record.get("input")
    if isinstance(more, str) and more.strip():
        text += "\n\n" + normalise(more)
    return [{"role": "user", "content": text}]


def _prompt(prompt: Any) -> list[Message]:
    return [{"role": "user", "content": _text({"prompt": prompt}, "prompt")}] if isinstance(prompt, str) else _messages(prompt, "prompt")


def _transcript(text: str) -> list[Message]:
    """Messages of "\\n\\nHuman: ...\\n\\nAssistant: ..."; none of any other text."""
    before, *turns = _TURN.split(text)
    if before.strip():
        return []
    return [{"role": _SPEAKERS[who], "content": normalise(said)} for who, said in zip(turns[::2], turns[1::2], strict=True)]


def _text(record: Mapping[str, Any], name: str) -> str:
    text = record.get(name)
    if not isinstance(text, str) or not text.strip():
        raise Broken(f'no "{name}": a text is needed')
    return normalise(text)
