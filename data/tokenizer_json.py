"""tokenizer.json, the file that transformers and vLLM open, with the same ids as the tiktoken encoding.

tiktoken keeps ranks (bytes -> id) and merges whichever adjacent pair has the lowest rank. HF tokenizers want the list of
merges. The merge that made a token is found by running BPE on its bytes with lower ranks only: two parts remain.
"""

from functools import lru_cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from data.ranks import parts


def tokenizer_json(ranks: dict[bytes, int], pattern: str, specials: dict[str, int]) -> str:
    """`pattern` must be written without possessive quantifiers: Oniguruma, which runs it here, reads `{1,3}+` differently."""
    vocab = {_symbols(token): rank for token, rank in ranks.items()}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            halves = parts(ranks, token, rank)
            if len(halves) != 2:
                raise ValueError(f"token {token!r} of rank {rank} cannot be reached by merges")
            merges.append((_symbols(halves[0]), _symbols(halves[1])))
    # Special tokens also stand in the vocabulary: added tokens get the next free ids otherwise, and p50k has one in the middle.
    hf = Tokenizer(models.BPE(vocab=vocab | specials, merges=merges, ignore_merges=True))
    hf.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    hf.decoder = decoders.ByteLevel()
    hf.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in sorted(specials, key=specials.__getitem__)])
    return str(hf.to_str(pretty=False))


def _symbols(token: bytes) -> str:
    return "".join(_symbol_of_byte()[b] for b in token)


@lru_cache
def _symbol_of_byte() -> dict[int, str]:
    """GPT-2's printable stand-ins for bytes: printable latin-1 is itself, the 68 others follow from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(0x100 + n) for n, b in enumerate(others)}


@lru_cache
def byte_of_symbol() -> dict[str, int]:
    """The inverse: stand-in character -> byte."""
    return {symbol: byte for byte, symbol in _symbol_of_byte().items()}
