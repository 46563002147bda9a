"""Talk to the model that a run made, with plain transformers.

    talk(Path("runs/quickstart"))                                         # in the terminal; ctrl-D ends
    talk(Path("runs/quickstart"), stage="sft", message="Who are you?")    # one answer, for scripts
    answer = "".join(load(run_dir).say("Who are you?"))                   # the same as a library

The conversation is kept as token ids. What the model wrote is never turned into text and back: the ids could come out
different, and the model would see words that it never said.
"""

import codecs
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import Cache, PreTrainedModel

from cluster.hardware import hardware
from data.chat import template_parts
from data.templates import Message
from data.tokenizers import Tokenizer
from data.tokenizers import load as load_tokenizer
from rlhf.artefacts import read_json
from rlhf.errors import RecipeError
from rlhf.models import load_causal_lm
from rlhf.monitoring import console, say

ADAPTER = "adapter"
SPEAKING = ("ppo", "preference", "distill", "sft", "pretrain")  # newest first


@dataclass
class Turn:
    """What someone asked, and the ids that the model answered with, the token that ended it included when it wrote one."""

    question: str
    answer: list[int] = field(default_factory=list)


@dataclass
class Chat:
    """A conversation with a model."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    continues: bool  # a pretrained model knows no turns: it continues the text that it is given
    temperature: float
    max_tokens: int
    generator: torch.Generator
    prefix: Callable[[], Cache | None] = lambda: None  # what every text stands behind: the cache of an adapter's virtual tokens
    turns: list[Turn] = field(default_factory=list)

    def say(self, text: str) -> Iterator[str]:
        """The answer, piece by piece, as it is written. Whoever stops listening keeps what was said until then.

        Raises RecipeError when the text and the answer do not fit into the model's context; earlier turns are forgotten
        first, the oldest ones first.
        """
        turn = Turn(text)
        earlier = [] if self.continues else self.turns
        before = 0 if (prefix := self.prefix()) is None else prefix.get_seq_length()
        room = getattr(self.model.config, "max_position_embeddings", sys.maxsize) - self.max_tokens - before
        while len(ids := self.prompt([*earlier, turn])) > room:
            if not earlier:
                raise RecipeError(
                    f"the message has {len(ids)} tokens, but with an answer of {self.max_tokens} the model has room for {max(room, 0)}: "
                    "shorten it, or lower --max-tokens"
                )
            earlier = earlier[1:]
        if not ids:
            raise RecipeError("there is nothing to continue: a pretrained model needs a text to begin with")
        self.turns = [*earlier, turn]
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in self.generate(ids):
            turn.answer.append(token)
            yield _harmless(decoder.decode(self.tokenizer.token_bytes(token)))
        yield _harmless(decoder.decode(b"", final=True))

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """The conversation up to where the next answer begins: the template's words and people's encoded, the model's own as they were."""
        if self.continues:
            return self.tokenizer.encode(turns[-1].question)
        messages: list[Message] = []
        for turn in turns:
            messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": ""}]
        answers = iter(turns)
        end = self.tokenizer.end_of_turn
        ids: list[int] = []
        ended = False
        for text, message in template_parts(self.tokenizer, messages[:-1], add_generation_prompt=True):
            words = self.tokenizer.encode_template(text)
            if ended and end in words:  # the model has written the end of its turn by itself
                words = words[words.index(end) + 1 :]
            ids += words
            ended = False
            if message is not None and message["role"] == "assistant":
                said = next(answers).answer
                ids += said
                ended = said[-1:] == [end]
            elif message is not None:
                ids += self.tokenizer.encode(message["content"])
        return ids

    @torch.inference_mode()
    def generate(self, ids: Sequence[int]) -> Iterator[int]:
        """Sampled tokens after `ids`, at most `max_tokens`, until the model ends its turn or the text."""
        stop = {self.tokenizer.end_of_turn, self.tokenizer.end_of_text}
        tokens, cache = torch.tensor([list(ids)], device=self.model.device), self.prefix()
        for _ in range(self.max_tokens):
            out = self.model(input_ids=tokens, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            # A model may have more rows than its tokenizer has ids.
            logits = out.logits[0, -1, : self.tokenizer.vocab_size].float().cpu()
            if self.temperature == 0:
                token = int(logits.argmax())
            else:
                token = int(torch.multinomial((logits / self.temperature).softmax(-1), 1, generator=self.generator))
            yield token
            if token in stop:
                return
            tokens = torch.tensor([[token]], device=self.model.device)


def talk(
    run_dir: Path,
    stage: str | None = None,
    temperature: float = 0.7,
    max_tokens: int = 128,
    seed: int | None = None,
    message: str | None = None,
) -> None:
    """Answer `message` on standard output, or without one everything that is typed.

    Raises RecipeError when the run has no finished model, and when a single `message` is too long.
    """
    chat = load(run_dir, stage, temperature, max_tokens, seed)
    if message is not None:
        _stream(chat, message)
        return
    seen = console.is_terminal and sys.stdin.isatty()
    if seen:
        import readline  # noqa: F401 - arrow keys and history for input()

        what = "continues your text" if chat.continues else "answers"
        say(f"{chat.model.name_or_path} {what}.  /new starts over, ctrl-C cuts an answer short, ctrl-D ends.", style="dim")
    while True:
        try:
            text = input("\n> " if seen else "").strip()
        except EOFError:
            return
        if text == "/new":
            chat.turns.clear()
        elif text:
            try:
                _stream(chat, text)
            except KeyboardInterrupt:
                print()
            except RecipeError as error:  # too long: the conversation goes on
                say(str(error), style="red")


def load(run_dir: Path, stage: str | None = None, temperature: float = 0.7, max_tokens: int = 128, seed: int | None = None) -> Chat:
    """A conversation with the newest model of a run, or that of `stage`; the same seed gives the same answers."""
    stage, folder = find_model(Path(run_dir), stage)
    hw = hardware()
    adapter = folder if folder.name == ADAPTER else None
    if adapter is not None:
        folder = Path(run_dir) / "pretrain" / "model"
    model = load_causal_lm(folder, hw.dtype, attention=None).to(hw.device).eval()  # one text at a time, with a cache
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    chat = Chat(model, load_tokenizer(folder), stage == "pretrain", temperature, max_tokens, generator)
    if adapter is not None:
        from peft import PeftModel

        chat.prefix = partial(PeftModel.from_pretrained(model, adapter).get_prompt, batch_size=1)
    return chat


def find_model(run_dir: Path, stage: str | None = None) -> tuple[str, Path]:
    """(stage, its model directory) of the newest finished stage, or of the named one; its adapter's where that was not merged.

    Raises RecipeError when there is none.
    """
    if stage is not None and stage not in SPEAKING:
        raise RecipeError(f"stage {stage!r} makes no model that speaks; choose one of {', '.join(reversed(SPEAKING))}")
    finished = {
        stage: file.parent
        for stage in SPEAKING
        for file in (run_dir / stage / ADAPTER / "adapter_config.json", run_dir / stage / "model" / "config.json")
        if read_json(run_dir / stage / "manifest.json") and file.exists()
    }
    if not run_dir.is_dir():
        raise RecipeError(f"there is no run at {run_dir}; `roundhouse status` lists the runs")
    if not finished:
        raise RecipeError(
            f"{run_dir} has no finished model yet: `roundhouse run RECIPE` makes one, `roundhouse status {run_dir}` tells how far it is"
        )
    if stage is not None and stage not in finished:
        raise RecipeError(f"{run_dir} has no finished {stage} model; there is {', '.join(reversed(finished))}")
    chosen = stage or next(iter(finished))
    return chosen, finished[chosen]


def _stream(chat: Chat, text: str) -> None:
    for piece in chat.say(text):
        print(piece, end="", flush=True)
    print()


def _harmless(text: str) -> str:
    """Without control characters: a model's words should not move the cursor or rename the window."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
