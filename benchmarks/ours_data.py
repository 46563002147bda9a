"""What we do in the data benchmarks, one process: WORK WHO FOLDER OUT STEPS; see data.py. Prints one line of JSON."""

import json
import sys
import time
from pathlib import Path

from cluster.connect import connect
from data.pipeline import prepare_text
from data.refine import Steps
from data.tokenizers import named

PART_BYTES = 8 << 20


def main() -> None:
    folder, out = Path(sys.argv[3]), Path(sys.argv[4])
    about = json.loads((folder / "about.json").read_bytes())
    files = sorted((folder / "texts").glob("*.jsonl"))
    tokenizer = named("gpt2", about["cache_dir"])
    steps = Steps()
    passes: dict[str, list[float]] = {}

    def watch(done: int, of: int, text: str) -> None:
        passes.setdefault(text.split()[0], []).append(time.perf_counter())

    with connect("local", num_cpus=2):
        since = time.perf_counter()
        prepare_text(
            files, tokenizer, out, validation_fraction=0.01, max_broken_fraction=0, shard_tokens=10_000_000,
            steps=steps, part_bytes=PART_BYTES, watch=watch,
        )  # fmt: skip
        seconds = time.perf_counter() - since
    print(json.dumps({"rate": about["bytes"] / 1e6 / seconds, "seconds": seconds}))


if __name__ == "__main__":
    main()
