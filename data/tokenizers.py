"""Tokenizers: text to ids and back, for three kinds of vocabulary behind one class.

    tokenizer = train(texts, vocab_size=4096)             # learn a byte-level BPE
    tokenizer = named("gpt2", cache_dir)                  # tiktoken's encodings, without its downloads
    tokenizer = from_model(Path("models/SmolLM2-135M"))   # the one a model directory brings
    tokenizer.save(folder); tokenizer = load(folder)      # opens in transformers and vLLM, too

Text is data: whatever it holds, `encode` never yields a special id. Only chat templates may (`encode_template`).
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken
from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer

from data import fast_tokens
from data.encodings import END_OF_TEXT, END_OF_TURN, PATTERNS, SPECIAL_TOKENS, named_ranks, rank_file, read_ranks
from data.errors import DataError
from data.files import write_bytes, write_json
from data.ranks import joined, parts
from data.templates import CHAT_TEMPLATE, PLAIN_TEMPLATE, render
from data.tokenizer_json import byte_of_symbol, tokenizer_json

NO_SPECIALS: frozenset[str] = frozenset()
STARTS = "new_tokens.json"  # Tokenizer.starts, beside the other files


class Tokenizer(ABC):
    """What every tokenizer can do. Ids are in [0, vocab_size)."""

    vocab_size: int
    """Largest id + 1: the rows an embedding needs."""
    fingerprint: str
    """sha256 of everything that decides which ids a text gets."""
    chat_template: str
    """Jinja; see `data.chat`."""
    end_of_text: int
    """Ends every document of the token stream."""
    end_of_turn: int
    """Ends the assistant's turn: generation stops at it."""
    special_ids: frozenset[int]
    """Ids that `encode` never yields."""
    template_tokens: dict[str, str]
    """bos_token, eos_token and the like, as templates know them."""
    starts: dict[int, list[int]]
    """Of tokens that were added: the ids that spelled each in the vocabulary before. The mean of their rows is where its own start."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text; what looks like a special token in it is ordinary text."""

    @abstractmethod
    def encode_template(self, text: str) -> list[int]:
        """Ids of a chat template's own words, special tokens recognised. Never give it anything that a user wrote."""

    @abstractmethod
    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of ids; bytes that are no utf-8 become U+FFFD."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The bytes of text that one id stands for; none for special ids."""

    @abstractmethod
    def extended(self, pieces: Sequence[str]) -> "Tokenizer":
        """The same tokenizer with these pieces as tokens of their own; ids that there are stay. Raises DataError for pieces that cannot."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what `load`, transformers and vLLM open, tokenizer.json last. The bytes depend on the tokenizer alone."""

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Documents as they stand in a token stream: uint32 `[t]`, each text's ids and `end_of_text`, and their lengths, int64 `[n]`.

        One thread: Ray runs one such loop per core.
        """
        return self._flat([np.array(self.encode(text), np.uint32) for text in texts])

    def _flat(self, encoded: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        end = np.array([self.end_of_text], np.uint32)
        lengths = np.array([len(ids) + 1 for ids in encoded], np.int64)
        return np.concatenate([end[:0], *(part for ids in encoded for part in (ids, end))]), lengths

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """Bytes of text per id, int64 `[vocab_size]`, 0 for special ids: bits per byte = nats / ln 2 / byte_lengths[ids].sum()."""
        return np.array([len(self.token_bytes(i)) for i in range(self.vocab_size)], dtype=np.int64)


class BytePairTokenizer(Tokenizer):
    """A byte-level BPE run by tiktoken; `encode_flat` by gigatoken, where it is installed and proves to give the same ids."""

    fast = True
    """False leaves all work to tiktoken."""

    def __init__(
        self,
        name: str,
        ranks: dict[bytes, int],
        pattern: str,
        specials: dict[str, int],
        chat_template: str = CHAT_TEMPLATE,
        starts: dict[int, list[int]] | None = None,
    ) -> None:
        """`pattern` names an entry of `encodings.PATTERNS`. Every id below the largest must be taken, or decoding could fail."""
        self.name, self.ranks, self.pattern, self.specials, self.chat_template = name, ranks, pattern, specials, chat_template
        self.starts = starts or {}
        self.vocab_size = len(ranks) + len(specials)
        if sorted([*ranks.values(), *specials.values()]) != list(range(self.vocab_size)):
            raise DataError(f"the vocabulary of {name!r} has holes or ids taken twice")
        self.end_of_text, self.end_of_turn = specials[END_OF_TEXT], specials[END_OF_TURN]
        self.special_ids = frozenset(specials.values())
        self.template_tokens = {"eos_token": END_OF_TURN, "pad_token": END_OF_TEXT}
        parts = [rank_file(ranks), PATTERNS[pattern].tiktoken.encode(), json.dumps(sorted(specials.items())).encode()]
        self.fingerprint = hashlib.sha256(b"\0".join(parts)).hexdigest()
        # The prefix keeps pickle from replacing it by tiktoken's own of that name, which would be downloaded on arrival.
        self.encoding = tiktoken.Encoding(
            f"roundhouse-{name}", pat_str=PATTERNS[pattern].tiktoken, mergeable_ranks=ranks, special_tokens=specials
        )

    def extended(self, pieces: Sequence[str | bytes]) -> "BytePairTokenizer":
        """The same tokenizer with these pieces as tokens, and before each what byte-pair encoding needs on the way to it.

        New ids follow the old ones, which stay. Raises DataError for pieces that could never be one token, because the pattern cuts them.
        """
        wanted = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]
        new = joined(self.ranks, wanted, self.vocab_size)
        starts = {rank: [self.ranks[part] for part in parts(self.ranks, token, self.vocab_size)] for token, rank in new.items()}
        longer = BytePairTokenizer(self.name, self.ranks | new, self.pattern, self.specials, self.chat_template, self.starts | starts)
        cut = [piece for piece in pieces if isinstance(piece, str) and len(longer.encode(piece)) > 1]
        if cut:
            first = ", ".join(map(repr, cut[:5]))
            raise DataError(f"{len(cut)} of {len(pieces)} pieces can be no token, for the pattern of {self.name} cuts them: {first}")
        return longer

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        fast = fast_tokens.of(self, texts) if self.fast else None
        encoded = [None if fast is None else fast.encode(text) for text in texts]
        return self._flat([self._encode_array(text) if ids is None else ids for text, ids in zip(texts, encoded, strict=True)])

    def _encode_array(self, text: str) -> np.ndarray:
        """`encode` without a Python list of its ids, which takes a fifth of the time."""
        try:
            return np.frombuffer(self.encoding._core_bpe.encode_to_tiktoken_buffer(text, NO_SPECIALS), np.uint32)
        except UnicodeEncodeError:  # half a surrogate pair
            return np.array(self.encode(text), np.uint32)

    def encode_template(self, text: str) -> list[int]:
        return self.encoding.encode(text, allowed_special="all")

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        return self.encoding.decode([i for i in ids if not (skip_special and i in self.special_ids)])

    def token_bytes(self, token: int) -> bytes:
        return b"" if token in self.special_ids else self.encoding.decode_single_token_bytes(token)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / "ranks.tiktoken", rank_file(self.ranks))
        encoding = {
            "name": self.name,
            "pattern": self.pattern,
            "special_tokens": self.specials,
            "chat_template": self.chat_template,
            "fingerprint": self.fingerprint,
        }
        write_json(folder / "encoding.json", encoding)
        if self.starts:
            write_bytes(folder / STARTS, json.dumps(self.starts).encode())
        write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                **self.template_tokens,
                "chat_template": self.chat_template,
                "clean_up_tokenization_spaces": False,
            },
        )
        write_bytes(folder / "tokenizer.json", tokenizer_json(self.ranks, PATTERNS[self.pattern].portable, self.specials).encode())


class ModelTokenizer(Tokenizer):
    """The tokenizer of a model directory, run by HF tokenizers. It holds the directory's files, so it travels and saves whole."""

    FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", STARTS)

    def __init__(self, files: dict[str, bytes], where: str) -> None:
        """`files` by name, at least tokenizer.json; `where` is for error messages."""
        self.files = files
        try:
            self._open()
        except DataError:
            raise
        except Exception as error:  # tokenizers raises bare Exception for broken files
            raise DataError(f"{where}: cannot read its tokenizer: {error!r}") from error
        self.fingerprint = hashlib.sha256(files["tokenizer.json"]).hexdigest()
        tokens = self._config_tokens()
        eos = tokens.get("eos_token")
        ids = self.hf.get_vocab(with_added_tokens=True)
        if eos not in ids:
            raise DataError(f"{where}: tokenizer_config.json names no eos_token of the vocabulary, so nothing could end a text")
        self.template_tokens = tokens
        self.starts = _read_starts(files.get(STARTS))
        self.vocab_size = max(ids.values()) + 1
        self.special_ids = frozenset(i for i, token in self.hf.get_added_tokens_decoder().items() if token.special) | {ids[eos]}
        self.added = frozenset(self.hf.get_added_tokens_decoder()) - self.special_ids
        # Chat models redefine eos as the end of a turn; the token that ends documents keeps one of these names.
        self.end_of_text = next((ids[t] for t in (END_OF_TEXT, "<|end_of_text|>", "</s>") if t in ids), ids[eos])
        self.chat_template = self._template() or PLAIN_TEMPLATE
        self.end_of_turn = self._first_special_after_answer(default=ids[eos])

    def _open(self) -> None:
        self.hf = HFTokenizer.from_str(self.files["tokenizer.json"].decode())
        self.hf.no_padding()
        self.hf.no_truncation()
        self.config = json.loads(self.files.get("tokenizer_config.json", b"{}"))
        self.byte_level = '"ByteLevel"' in json.dumps(json.loads(self.files["tokenizer.json"]).get("decoder"))

    def __getstate__(self) -> dict[str, bytes]:
        return self.files

    def __setstate__(self, files: dict[str, bytes]) -> None:
        self.__init__(files, "a tokenizer sent by Ray")  # type: ignore[misc]

    def _config_tokens(self) -> dict[str, str]:
        both = {**json.loads(self.files.get("special_tokens_map.json", b"{}")), **self.config}
        named = {k: v["content"] if isinstance(v, dict) else v for k, v in both.items() if k.endswith("_token")}
        return {k: v for k, v in named.items() if isinstance(v, str)}

    def _template(self) -> str:
        if "chat_template.jinja" in self.files:
            return self.files["chat_template.jinja"].decode()
        template = self.config.get("chat_template") or ""
        if isinstance(template, list):  # several by name: the one for plain chats is called "default"
            template = {t["name"]: t["template"] for t in template}.get("default", "")
        return str(template)

    def _first_special_after_answer(self, default: int) -> int:
        marker = "(answer)"
        messages = [{"role": "user", "content": "(question)"}, {"role": "assistant", "content": marker}]
        text = render(self.chat_template, messages, add_generation_prompt=False, **self.template_tokens)
        tail = self.encode_template(text.rpartition(marker)[2])
        return next((i for i in tail if i in self.special_ids), default)

    def extended(self, pieces: Sequence[str]) -> "ModelTokenizer":
        """The same tokenizer with these pieces as tokens of their own; what it knows already stays. New ids follow the old ones.

        Raises DataError for pieces that would not come back as they were: some decoders mangle single accented letters.
        """
        hf = HFTokenizer.from_str(self.files["tokenizer.json"].decode())
        known = hf.get_vocab(with_added_tokens=True)
        # A byte-level vocabulary spells " di" otherwise: what counts is whether one token says it.
        new = [piece for piece in dict.fromkeys(pieces) if piece not in known and len(self.encode(piece)) != 1]
        hf.add_tokens([AddedToken(piece, normalized=False) for piece in new])
        longer = ModelTokenizer({**self.files, "tokenizer.json": hf.to_str(pretty=True).encode()}, "the extended tokenizer")
        lost = [piece for piece in new if longer.decode(longer.encode(piece)) != piece]
        if lost:
            raise DataError(
                f"tokenizer.extend: {len(lost)} of {len(new)} pieces do not survive this tokenizer: {', '.join(map(repr, lost[:5]))}"
            )
        starts = {i: self.encode(longer.token_bytes(i).decode()) for i in range(self.vocab_size, longer.vocab_size)}
        files = {**longer.files, STARTS: json.dumps(self.starts | starts).encode()}
        return ModelTokenizer(files, "the extended tokenizer")

    def encode(self, text: str) -> list[int]:
        self.hf.encode_special_tokens = True  # HF's name for "special tokens in the text are text"
        return self.hf.encode(text, add_special_tokens=False).ids

    def encode_template(self, text: str) -> list[int]:
        self.hf.encode_special_tokens = False
        return self.hf.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        return self.hf.decode(list(ids), skip_special_tokens=skip_special)

    def token_bytes(self, token: int) -> bytes:
        symbols = None if token in self.special_ids else self.hf.id_to_token(token)
        if symbols is None:  # special, or a hole in the vocabulary
            return b""
        if token in self.added:
            return symbols.encode()
        if self.byte_level:
            known = byte_of_symbol()
            return b"".join(bytes([known[c]]) if c in known else c.encode() for c in symbols)
        if len(symbols) == 6 and symbols.startswith("<0x"):  # SentencePiece byte fallback, <0x0A>
            return bytes.fromhex(symbols[3:5])
        return symbols.replace("\u2581", " ").encode()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        files = dict(self.files)
        if not self._template():
            files["tokenizer_config.json"] = json.dumps({**self.config, "chat_template": self.chat_template}, indent=2).encode()
        for name in sorted(files, key="tokenizer.json".__eq__):  # last
            write_bytes(folder / name, files[name])


def train(texts: Iterable[str], vocab_size: int) -> BytePairTokenizer:
    """Learn a byte-level BPE with rustbpe (18.8 MB of text, 8k vocabulary: 2.3 s) on tiktoken's cl100k pre-token pattern.

    `vocab_size` counts the 256 bytes and the special tokens. Raises DataError when the texts hold too few different
    words for that many tokens. The result depends on the counts of words alone, not on order or threads.
    """
    trainer = rustbpe.Tokenizer()
    wanted = vocab_size - len(SPECIAL_TOKENS)
    if wanted < 256:
        raise DataError(f"tokenizer.vocab_size = {vocab_size} is too small for 256 bytes and {len(SPECIAL_TOKENS)} special tokens")
    trainer.train_from_iterator(iter(texts), wanted, pattern=PATTERNS["cl100k_base"].tiktoken)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) < wanted:
        raise DataError(
            f"the texts hold too few different words for a vocabulary of {vocab_size}: "
            f"lower tokenizer.vocab_size to at most {len(ranks) + len(SPECIAL_TOKENS)}, or add text"
        )
    return BytePairTokenizer("trained", ranks, "cl100k_base", {s: wanted + i for i, s in enumerate(SPECIAL_TOKENS)})


def named(name: str, cache_dir: Path) -> BytePairTokenizer:
    """One of tiktoken's encodings (gpt2, r50k_base, p50k_base, cl100k_base, o200k_base) with the same id for every text.

    Its special tokens keep their ids, ours are added behind them; ids that tiktoken leaves unused become
    <|reserved_N|>, so that anything a model samples can be decoded.
    """
    encoding = named_ranks(name, cache_dir)
    specials = dict(encoding.specials)
    taken = {*encoding.ranks.values(), *specials.values()}
    specials |= {f"<|reserved_{i}|>": i for i in range(max(taken)) if i not in taken}
    for special in SPECIAL_TOKENS:
        specials.setdefault(special, len(encoding.ranks) + len(specials))
    return BytePairTokenizer(name, encoding.ranks, encoding.pattern, specials)


def from_model(folder: Path) -> ModelTokenizer:
    """The tokenizer of a transformers model directory. Raises DataError when it has none."""
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        raise DataError(
            f"{folder}: no tokenizer.json, so this is not a model directory with a (fast) tokenizer: "
            "save one there with transformers' save_pretrained, or choose another tokenizer.encoding"
        )
    return ModelTokenizer({n: (folder / n).read_bytes() for n in ModelTokenizer.FILES if (folder / n).is_file()}, str(folder))


def read_pieces(path: Path) -> list[str]:
    """The pieces of a .jsonl file of {"piece": "..."}. Raises DataError naming the line that is none."""
    pieces = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        try:
            piece = json.loads(line)["piece"]
        except (ValueError, KeyError, TypeError):
            piece = None
        if not isinstance(piece, str) or not piece.strip():
            raise DataError(f'{path} line {number}: {{"piece": "a word"}} is needed, got {line[:60]!r}')
        pieces.append(piece)
    return pieces


def _read_starts(content: bytes | None) -> dict[int, list[int]]:
    return {int(i): ids for i, ids in json.loads(content or b"{}").items()}


def load(folder: Path) -> Tokenizer:
    """Open what `save` wrote. Raises DataError when a file is missing or damaged."""
    folder = Path(folder)
    if not (folder / "encoding.json").is_file():
        return from_model(folder)
    try:
        saved = json.loads((folder / "encoding.json").read_bytes())
        ranks = read_ranks((folder / "ranks.tiktoken").read_bytes())
        starts = _read_starts((folder / STARTS).read_bytes() if (folder / STARTS).is_file() else None)
        tokenizer = BytePairTokenizer(saved["name"], ranks, saved["pattern"], saved["special_tokens"], saved["chat_template"], starts)
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"{folder}: this tokenizer is damaged ({error!r}): prepare the data again") from None
    if tokenizer.fingerprint != saved["fingerprint"]:
        raise DataError(f"{folder}: ranks.tiktoken is not the file that encoding.json was written with: prepare the data again")
    return tokenizer
