"""What tiktoken does with ranks (bytes of a token -> id), in small: to see how a token is made, and to add tokens that can be.

    parts(ranks, b"locomotive", below=50256)             # [b"loc", b"omot", b"ive"]
    joined(ranks, [b"locomotive"], first=50261)          # {b"locomot": 50261, b"locomotive": 50262}

tiktoken knows no merges: it joins whichever neighbours make the token of lowest rank. So a new token is reached only if the parts that
its bytes fall into can be joined one after the other; what is missing on the way are tokens, too.
"""

from collections.abc import Iterable
from itertools import pairwise


def parts(ranks: dict[bytes, int], token: bytes, below: int) -> list[bytes]:
    """What byte-pair encoding makes of `token` with the ranks lower than `below`."""
    found = [token[i : i + 1] for i in range(len(token))]
    while len(found) > 1:
        pairs = [ranks.get(a + b, below) for a, b in pairwise(found)]
        lowest = min(pairs)
        if lowest >= below:
            break
        i = pairs.index(lowest)
        found[i : i + 2] = [found[i] + found[i + 1]]
    return found


def joined(ranks: dict[bytes, int], pieces: Iterable[bytes], first: int) -> dict[bytes, int]:
    """New tokens with ranks from `first` on, so that every piece is one token: the pieces, and before each what leads to it."""
    longer = dict(ranks)
    for piece in pieces:
        while len(found := parts(longer, piece, first)) > 1:
            longer[found[0] + found[1]] = first
            first += 1
    return {token: rank for token, rank in longer.items() if token not in ranks}
