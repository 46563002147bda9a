"""What preparing a corpus will take and give, from a sample of it.

    found = predict(files, 4096, steps, share=0.01)
    found["train_tokens"], found["dropped"], found["core_hours"], found["worker_mb"]

Every hundredth piece of the input goes through the same functions as in the full run, in this process. What only shows when all documents
are together, equal and nearly equal ones, is seen within the sample only: expect more of them.
"""

import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from data.decontamination import Index
from data.errors import DataError
from data.fates import BROKEN
from data.parts import Part, plan_parts
from data.refine import Steps, refine
from data.stores import File
from data.tokenizers import Tokenizer, train
from data.vocabulary import Growth
from data.work import kept_texts, read_rows

LEAST = 64 << 10  # bytes of a piece: shorter ones begin and end in the middle of most documents
PIECES = 16  # at least, of divisible files: neighbours resemble each other


def predict(
    files: Sequence[File], tokenizer: Tokenizer | Growth | int, steps: Steps, share: float = 0.01, evaluations: Index | None = None
) -> dict[str, float]:
    """Figures of the full run by name, predicted; the same names as `found` gives of a prepared corpus. No Ray.

    Raises DataError as reading does.
    """
    sample, total = chosen(files, share)
    size = sum(part.size for part in sample)
    with tempfile.TemporaryDirectory(prefix="roundhouse-plan-") as folder:
        work = Path(folder) / "work"  # what documents are compared by goes beside it
        refine(sample[0], steps, work, evaluations)  # what is compiled and loaded once does not count
        since = time.process_time()
        read = [refine(part, steps, work, evaluations) for part in sample]
        rows = [read_rows(work, part.number, ["id", "fate", "bytes"]) for part in sample]
        kept, seen = [], set[bytes]()
        for table in rows:
            ids = table["id"].to_pylist()
            kept.append(pc.is_null(table["fate"]).to_numpy().copy())
            for i, one in enumerate(ids):
                kept[-1][i] &= one not in seen
                if kept[-1][i]:
                    seen.add(one)
        seconds = time.process_time() - since
        texts: list[str] = []
        for part, here in zip(sample, kept, strict=True):
            for _, some, _ in kept_texts(work, part.number, here):
                texts += some
        if isinstance(tokenizer, Growth):
            tokenizer = tokenizer.base  # its words come from the whole corpus: there will be fewer tokens
        if isinstance(tokenizer, int):  # the sample is smaller than the corpus: a smaller vocabulary may be all that it gives
            tokenizer = _learned(texts, tokenizer)
        since = time.process_time()
        tokens = sum(int(tokenizer.encode_flat([text])[1][0]) for text in texts)
        seconds += time.process_time() - since
    scale = total / max(size, 1)
    documents, every = sum(int(here.sum()) for here in kept), sum(r["rows"] for r in read)
    return {
        "rows": every * scale,
        "documents": documents * scale,
        "tokens": tokens * scale,
        "dropped": 1 - documents / max(every, 1),
        "broken": sum(r["broken"] for r in read) / max(every, 1),
        "core_hours": seconds * scale / 3600,
        "worker_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "sampled_mb": size / 1e6,
        "stored_mb": total / 1e6,
    }


def found(manifest: dict[str, Any], costs: dict[str, float]) -> dict[str, float]:
    """What `predict` predicts, of a prepared corpus: its manifest, and what it took (engine.costs)."""
    documents = sum(manifest[split]["documents"] for split in ("train", "validation"))
    rows = max(manifest["rows"], 1)
    return {
        "rows": manifest["rows"],
        "documents": documents,
        "tokens": sum(manifest[split]["tokens"] for split in ("train", "validation")),
        "dropped": 1 - documents / rows,
        "broken": sum(n for fate, _, n, *_ in manifest["fates"] if fate == BROKEN) / rows,
        "core_hours": costs["core_seconds"] / 3600,
        "worker_mb": costs["worker_mb"],
    }


def chosen(files: Sequence[File], share: float) -> tuple[list[Part], int]:
    """About `share` of the input, evenly spread, and the bytes of all of it."""
    total = sum(part.size for part in plan_parts(files, 1 << 40))
    pieces = plan_parts(files, max(LEAST, int(total * share / PIECES)))
    step = max(1, round(1 / share))
    return pieces[min(step // 2, len(pieces) - 1) :: step], total


def _learned(texts: list[str], vocab_size: int) -> Tokenizer:
    while True:
        try:
            return train(texts, vocab_size)
        except DataError:
            if vocab_size <= 300:
                raise
            vocab_size = max(300, vocab_size // 2)
