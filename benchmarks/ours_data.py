"""What we do in the data benchmarks, one process: WORK WHO FOLDER OUT STEPS; see data.py. Prints one line of JSON."""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cluster.connect import connect
from data.pipeline import prepare_text
from data.refine import Steps
from data.rules import C4Lines, Quality
from data.tokenizers import named

# For all texts, whatever language they are in: datatrove's filters do not ask either. C4's rule on lines' ends is off, as in FineWeb.
RULES = Quality(
    by_language={"other": ("gopher_repetition@1", "gopher@1", "c4@1", "fineweb@1")},
    min_language_score=0,
    c4_lines=C4Lines(terminal_punctuation=False),
)


def main() -> None:
    work, folder, out = sys.argv[1], Path(sys.argv[3]), Path(sys.argv[4])
    about = json.loads((folder / "about.json").read_bytes())
    files = sorted((folder / "texts").glob("*.jsonl"))
    tokenizer = named("gpt2", about["cache_dir"])
    tokenizer.fast = work.endswith("fast")
    steps = Steps(quality=RULES, near_duplicates=True) if work.startswith("whole way") else Steps()
    passes: dict[str, list[float]] = {}

    def watch(done: int, of: int, text: str) -> None:
        passes.setdefault(text.split()[0], []).append(time.perf_counter())

    with connect("local", num_cpus=2):
        start = time.perf_counter()
        prepare_text(
            files, tokenizer, out, validation_fraction=0.01, max_broken_fraction=0, shard_tokens=10_000_000, steps=steps, watch=watch
        )
        end = time.perf_counter()
    refine, tokenize = passes["refine"], passes["tokenize"]
    found = {
        "refine_seconds": refine[-1] - start,
        "compare_seconds": tokenize[0] - refine[-1],
        "tokenize_seconds": end - tokenize[0],
        "tokens": sum(json.loads((out / split / "manifest.json").read_bytes())["tokens"] for split in ("train", "validation")),
    }
    # Texts become tokens in the last pass alone; what stands before it is reading, ids and duplicates, which the others' loops do not do.
    seconds = end - start if work.startswith("whole way") else found["tokenize_seconds"]
    print(json.dumps({"rate": about["bytes"] / 1e6 / seconds, "seconds": seconds, **found}))


if __name__ == "__main__":
    main()
