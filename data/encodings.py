"""tiktoken's named encodings without its downloads: rank files come inside an ordinary PyPI package.

    named_ranks("gpt2", cache_dir).ranks        # {b"!": 0, ...}

tiktoken fetches rank files from its vendor's storage at first use, which many clusters cannot reach. The PyPI package
litellm (MIT) carries three of them, byte for byte; each is checked against the sha256 that tiktoken itself pins. gpt2 and
r50k_base are the first 50,256 ranks of p50k_base, which the sha256 of r50k_base's own file confirms.
"""

import base64
import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError
from data.files import write_bytes
from data.packages import Package, download

END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|end|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|user|>", "<|assistant|>", "<|system|>", END_OF_TURN)


@dataclass(frozen=True)
class Pattern:
    """How text is cut into pre-tokens, twice: the same cuts, written for two regex engines."""

    tiktoken: str
    """As tiktoken has it: possessive quantifiers, which its engine runs faster."""
    portable: str
    """As first published, for tokenizer.json."""


PATTERNS = {
    "r50k_base": Pattern(
        r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
        r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s""",
    ),
    "cl100k_base": Pattern(
        r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s""",
        r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s""",
    ),
    "o200k_base": Pattern(
        *2
        * (
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
            r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
            r"""|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
        )
    ),
}


@dataclass(frozen=True)
class Encoding:
    ranks: dict[bytes, int]
    pattern: str
    """Name in PATTERNS."""
    specials: dict[str, int]


@dataclass(frozen=True)
class _Published:
    file: str
    """Name of the rank file in our cache."""
    sha256: str
    """tiktoken's pin for this encoding's rank file."""
    pattern: str
    specials: dict[str, int]
    keep: int | None = None
    """Only ranks below this."""


_FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
_R50K = _Published(
    "p50k_base", "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930", "r50k_base", {END_OF_TEXT: 50256}, keep=50256
)
ENCODINGS = {
    "gpt2": _R50K,
    "r50k_base": _R50K,
    "p50k_base": _Published(
        "p50k_base", "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069", "r50k_base", {END_OF_TEXT: 50256}
    ),
    "cl100k_base": _Published(
        "cl100k_base",
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        "cl100k_base",
        {END_OF_TEXT: 100257, **{t: 100258 + i for i, t in enumerate(_FIM)}, "<|endofprompt|>": 100276},
    ),
    "o200k_base": _Published(
        "o200k_base",
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        "o200k_base",
        {END_OF_TEXT: 199999, "<|endofprompt|>": 200018},
    ),
}

LITELLM = Package(
    "litellm",
    "1.109.1",
    "1c8b4dd671fa0cd0850aa751678704ff77e595fb1e6085b2dc3be39ee19bdaaf",
    # It is opened as an archive, never installed: every machine may take the same wheel, and so have the same sha256.
    ("--only-binary=:all:", "--platform=manylinux_2_28_x86_64", "--python-version=3.11"),
)
_MEMBERS = {  # named by the sha1 of the address that tiktoken would have fetched
    "p50k_base": "ec7223a39ce59f226a68acc30dc1af2788490e15",
    "cl100k_base": "9b5ad71b2ce5302211f9c61530b329a4922fc6a4",
    "o200k_base": "fb374d419588a4632f3f557e76b4b70aebbca790",
}


def named_ranks(name: str, cache_dir: Path) -> Encoding:
    """Ranks, pattern and special tokens of one of ENCODINGS; rank files are kept in `cache_dir`/ranks.

    Raises DataError for an unknown name, when the package cannot be fetched, or when ranks are not tiktoken's.
    """
    if name not in ENCODINGS:
        raise DataError(f"no encoding is called {name!r}; there are {', '.join(ENCODINGS)}")
    published = ENCODINGS[name]
    path = Path(cache_dir).expanduser() / "ranks" / f"{published.file}.tiktoken"
    if not path.exists():
        _fetch_rank_files(path.parent)
    ranks = read_ranks(path.read_bytes())
    if published.keep is not None:
        ranks = {token: rank for token, rank in ranks.items() if rank < published.keep}
    if hashlib.sha256(rank_file(ranks)).hexdigest() != published.sha256:
        raise DataError(f"{path}: these are not tiktoken's ranks for {name} (wrong sha256): delete the file, it will be fetched again")
    return Encoding(ranks, published.pattern, published.specials)


def _fetch_rank_files(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with download(LITELLM) as wheel, zipfile.ZipFile(wheel) as archive:
        for name, member in _MEMBERS.items():
            write_bytes(folder / f"{name}.tiktoken", archive.read(f"litellm/litellm_core_utils/tokenizers/{member}"))


def rank_file(ranks: dict[bytes, int]) -> bytes:
    """tiktoken's file format: a line `base64(token) rank` each, by rank."""
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in sorted(ranks.items(), key=lambda item: item[1]))


def read_ranks(content: bytes) -> dict[bytes, int]:
    """The inverse of `rank_file`."""
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in content.splitlines())}
