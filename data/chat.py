"""Conversations to token ids, and which of them the model should learn to write.

    ids, mask = encode_chat(tokenizer, messages, max_tokens=256)     # mask: the assistant's words and the end of its turn
    ids = encode_prompt(tokenizer, messages)                         # ends where the assistant begins
    ids = encode_answer(tokenizer, "Certainly.")                     # what follows a prompt: content, end of turn

Any Jinja template works, and no message can forge a turn: the template is rendered around random placeholders, its own
words are encoded with special tokens recognised, and what people wrote is put in between as ordinary text. (So contents
stand as they are, also where a template would trim their spaces.)
"""

import re
import secrets
from collections.abc import Iterator, Sequence

from data.errors import DataError
from data.templates import Message, render
from data.tokenizers import Tokenizer

# Per process and unguessable. Upper case and digits only: templates that strip or split content find nothing to change.
_MARK = secrets.token_hex(8).upper()
_PLACEHOLDER = re.compile(rf"CONTENT{_MARK}N(\d+)E")


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], max_tokens: int | None = None) -> tuple[list[int], list[bool]]:
    """Ids of a conversation and, as long, its mask: True for the assistant's content and the token that ends its turn.

    A conversation longer than `max_tokens` is cut to the most whole turns, from the first, that fit; a turn ends with an
    assistant message. Two empty lists when not even one turn fits, or there is none.
    """
    ends = [i + 1 for i, message in enumerate(messages) if message["role"] == "assistant"]
    for end in reversed(ends):
        ids, mask = _encode_whole(tokenizer, messages[:end])
        if max_tokens is None or len(ids) <= max_tokens:
            return ids, mask
    return [], []


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids up to where the assistant's next answer begins."""
    return [i for ids, _, _ in encoded_parts(tokenizer, messages, add_generation_prompt=True) for i in ids]


def encode_answer(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of an assistant's answer as it follows `encode_prompt`: its content and the end of the turn."""
    return [*tokenizer.encode(text), tokenizer.end_of_turn]


def _encode_whole(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    mask: list[bool] = []
    for part, learned, _ in encoded_parts(tokenizer, messages, add_generation_prompt=False):
        ids += part
        mask += learned
    return ids, mask


def encoded_parts(
    tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool
) -> Iterator[tuple[list[int], list[bool], str]]:
    """(ids, which of them are learned, whose words they are: a role, or "" for the template) of each part of the rendered template."""
    answered = False
    for text, message in template_parts(tokenizer, messages, add_generation_prompt):
        words = tokenizer.encode_template(text)
        # The end of turn belongs to the answer before it. Templates may write more first (a newline): the model must, too.
        learned = words.index(tokenizer.end_of_turn) + 1 if answered and tokenizer.end_of_turn in words else 0
        yield words, [True] * learned + [False] * (len(words) - learned), ""
        if message is not None:
            content = tokenizer.encode(message["content"])
            answered = message["role"] == "assistant"
            yield content, [answered] * len(content), message["role"]


def template_parts(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool) -> list[tuple[str, Message | None]]:
    """The rendered template as (its own words, the message whose content follows them); the last part has no message.

    Raises DataError when the template does not show every message once, in order: then it rewrites conversations in ways
    that token masks cannot follow.
    """
    blanks = [{**m, "content": f"CONTENT{_MARK}N{i}E"} for i, m in enumerate(messages)]
    text = render(tokenizer.chat_template, blanks, add_generation_prompt=add_generation_prompt, **tokenizer.template_tokens)
    pieces = _PLACEHOLDER.split(text)  # words, number, words, number, ..., words
    if [int(n) for n in pieces[1::2]] != list(range(len(messages))):
        raise DataError(
            f"the chat template shows messages {pieces[1::2]} of a conversation of {len(messages)}: "
            "it must show each one once, in order; use a plainer template in the tokenizer's directory"
        )
    return [*zip(pieces[::2], messages, strict=False), (pieces[-1], None)]
