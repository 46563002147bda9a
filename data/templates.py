"""Chat templates: Jinja text that turns messages into one string, as transformers and vLLM keep them beside a tokenizer.

    render(CHAT_TEMPLATE, [{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    # '<|user|>Hello<|end|><|assistant|>'

Only `chat.py` should need this: a rendered string no longer tells what a template wrote from what a person wrote.
"""

from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.errors import DataError

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}"""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role not in ['system', 'user', 'assistant'] -%}{{ raise_exception('unknown role ' ~ message.role) }}{%- endif -%}"
    "{{ '<|' ~ message.role ~ '|>' }}{{ message.content }}{{ '<|end|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)
"""The template of our own vocabularies: role token, content, <|end|>. No spaces: every one would cost a token per turn."""

PLAIN_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ message.role.capitalize() ~ ':\n' }}{{ message.content }}"
    "{{ eos_token if message.role == 'assistant' else '' }}{{ '\n\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'Assistant:\n' }}{%- endif -%}"
)
"""For model directories without a template: plain text, the assistant's turns end with the model's end-of-sequence token."""


def render(template: str, messages: Sequence[Message], *, add_generation_prompt: bool, **tokens: str) -> str:
    """Apply a template as transformers would; `tokens` are eos_token, bos_token and the like.

    Templates come with models that people download, so they run in Jinja's sandbox. Raises DataError when the template
    does not parse or refuses the messages (many insist on alternating roles).
    """
    try:
        return _compiled(template).render(messages=list(messages), add_generation_prompt=add_generation_prompt, **tokens)
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template refuses these messages ({error}): {_short(messages)}") from None


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment.from_string(template)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words in some templates; here it renders what it wraps."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller: Any) -> str:
        return str(caller())


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _short(messages: Sequence[Message]) -> str:
    text = str(list(messages))
    return text if len(text) <= 200 else text[:200] + "..."
