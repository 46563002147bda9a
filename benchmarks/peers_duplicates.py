"""What datasketch says of pairs of texts: FOLDER, with texts.jsonl of {"text", "characters"}. Run by .venv-data-peers; see
data_duplicates.py.

Writes FOLDER/peer.json: pairs with their true Jaccard similarity, its estimate, and whether a key is shared; prints {"seconds",
"megabytes"}.
"""

import json
import re
import sys
import time
import unicodedata
from pathlib import Path

from datasketch import MinHash, MinHashLSH

PERMUTATIONS, BANDS, ROWS, NGRAM = 112, 14, 8, 5
WIDE = (28, 4)  # bands and rows that miss a pair of similarity .8 once in a million: with them and exact sets all pairs are known
LEAST = 0.5
DROPPED = re.compile(r"[^\w\s]|_")


def shingles(text: str, characters: bool) -> set[bytes]:
    text = unicodedata.normalize("NFD", text.lower())
    text = DROPPED.sub("", "".join(c for c in text if not unicodedata.combining(c)))
    words = re.sub(r"\d+", "0", text).split()
    if characters:
        words = list("".join(words))
    return {" ".join(words[i : i + NGRAM]).encode() for i in range(max(1, len(words) - NGRAM + 1))}


def main(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "texts.jsonl").open(encoding="utf-8")]
    sets, hashes = [], []
    narrow, wide = (MinHashLSH(num_perm=PERMUTATIONS, params=params) for params in ((BANDS, ROWS), WIDE))
    began = time.perf_counter()
    for number, row in enumerate(rows):
        found = shingles(row["text"], row["characters"])
        minhash = MinHash(PERMUTATIONS)
        minhash.update_batch(list(found))
        sets.append({hash(s) for s in found})
        hashes.append(minhash)
        narrow.insert(number, minhash, check_duplication=False)
    seconds = time.perf_counter() - began
    shared = {pair for i, h in enumerate(hashes) for pair in ((j, i) for j in narrow.query(h) if j < i)}
    candidates = set(shared)
    for number, minhash in enumerate(hashes):
        candidates |= {(j, number) for j in wide.query(minhash)}
        wide.insert(number, minhash, check_duplication=False)
    found = []
    for a, b in sorted(candidates):
        true = len(sets[a] & sets[b]) / len(sets[a] | sets[b])
        if true >= LEAST or (a, b) in shared:
            found.append([a, b, true, hashes[a].jaccard(hashes[b]), (a, b) in shared])
    (folder / "peer.json").write_text(json.dumps(found))
    print(json.dumps({"seconds": seconds, "megabytes": sum(len(row["text"].encode()) for row in rows) / 1e6}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
