"""How many bytes a token of several vocabularies stands for, by source and language: which vocabulary fits a corpus?

    rows = spelling(files, source_of, {"gpt2": named("gpt2", cache), "mine": load(folder)})
    rows[0]     # Spelled("speeches", "en", documents=249, text_bytes=12_211_094, tokens={"gpt2": 2_614_003, "mine": 2_838_110})

Ray reads and tokenizes, a block at a time; what comes back is a sum per source and language. Rows that cannot be read are passed over.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from data.cleaning import normalise
from data.engine import fetched
from data.language import identify
from data.reading import Broken, ordered, read
from data.stores import File
from data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Spelled:
    """Texts of one source in one language, and how many tokens each vocabulary takes for them."""

    source: str
    language: str
    documents: int
    text_bytes: int
    tokens: dict[str, int]

    def bytes_per_token(self, name: str) -> float:
        return self.text_bytes / max(self.tokens[name], 1)


def spelling(files: Sequence[File], source_of: Sequence[str], tokenizers: Mapping[str, Tokenizer]) -> list[Spelled]:
    """A row for every source and language, most text first. `source_of` names each file's source. Needs a connected Ray.

    Raises DataError as `read` does.
    """
    reference = ray.put(dict(tokenizers))
    columns = ["documents", "bytes", *(f"tokens {number}" for number in range(len(tokenizers)))]

    def count(block: pa.Table) -> pa.Table:
        here: dict[str, Tokenizer] = fetched(reference)
        block = block.filter(block["text"].is_valid())
        texts = block["text"].to_pylist()
        bytes_of = np.array([len(text.encode()) for text in texts], np.int64)
        # The end of a text spells nothing.
        numbers = [np.ones(len(texts), np.int64), bytes_of, *(t.encode_flat(texts)[1] - 1 for t in here.values())]
        whose = {"file": block["file"], "language": pa.array(identify(texts)[0], pa.string())}
        table = pa.table(whose | dict(zip(columns, numbers, strict=True)))
        return table.group_by(["file", "language"]).aggregate([(name, "sum") for name in columns])

    sums: dict[tuple[str, str], np.ndarray] = defaultdict(lambda: np.zeros(len(columns), np.int64))
    with ordered():
        rows = read(files, _text, pa.schema([("text", pa.large_string())]))
        for batch in rows.map_batches(count, batch_format="pyarrow", batch_size=None).iter_batches(batch_size=None, batch_format="pyarrow"):
            for row in batch.to_pylist():
                sums[source_of[row["file"]], row["language"]] += [row[f"{name}_sum"] for name in columns]
    found = [
        Spelled(source, language, int(n), int(size), {name: int(t) for name, t in zip(tokenizers, tokens, strict=True)})
        for (source, language), (n, size, *tokens) in sums.items()
    ]
    return sorted(found, key=lambda row: (-row.text_bytes, row.source, row.language))


def _text(record: dict[str, Any]) -> dict[str, Any]:
    """What is said in a row: its text, or the contents of its messages."""
    text, messages = record.get("text"), record.get("messages")
    if not isinstance(text, str) and isinstance(messages, list):
        text = "\n".join(str(message["content"]) for message in messages if isinstance(message, dict) and message.get("content"))
    if not isinstance(text, str):
        raise Broken("no text")
    return {"text": normalise(text).encode(errors="replace").decode()}
