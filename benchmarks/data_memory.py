"""How much memory preparing a corpus takes, of some text and of ten times as much.

    python -m benchmarks.data_memory --megabytes 6 --json memory.json

Rows are {"work", "ours", "peer", "theirs", "unit", "ratio"}: ours with ten times the corpus, theirs with it once; the ratio is 1 where
nothing grows. "worker" is the most that one of Ray's workers ever had (its resident set), "driver" that of the process that asks for
it all, "object store" the most that Ray's raylet held, shared memory included. All steps are on, near-duplicates too.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil

from benchmarks import real_text
from benchmarks.contest import show

TIMES = 10


def measure(folder: Path, out: Path, cache_dir: Path, found: Any) -> None:
    """Prepare the texts of `folder`, in a process of its own; peaks in MB go into the queue `found`."""
    from benchmarks.ours_data import RULES
    from cluster.connect import connect
    from data.pipeline import prepare_text
    from data.refine import Steps
    from data.tokenizers import named

    most, over = 0, threading.Event()

    def look() -> None:
        nonlocal most
        while not over.wait(0.1):
            for process in psutil.Process().children(recursive=True):
                try:
                    most = max(most, process.memory_info().rss if process.name() == "raylet" else 0)
                except psutil.Error:
                    continue

    with connect("local", num_cpus=2):
        threading.Thread(target=look, daemon=True).start()
        prepare_text(
            sorted(folder.glob("*.jsonl")),
            named("gpt2", cache_dir),
            out,
            validation_fraction=0.01,
            max_broken_fraction=0,
            shard_tokens=1_000_000,
            steps=Steps(quality=RULES, near_duplicates=True),
            part_bytes=1 << 20,
        )
        over.set()
    costs = json.loads((out / "costs.json").read_bytes())
    driver = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found.put({"worker": costs["worker_mb"], "driver": driver, "object store": most / 2**20})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=6)
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/roundhouse").expanduser())
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    peaks = []
    with tempfile.TemporaryDirectory() as name:
        for times in (1, TIMES):
            texts, out = Path(name) / f"texts-{times}", Path(name) / f"out-{times}"
            size = real_text.write(texts, asked.cache_dir, asked.megabytes * times)
            context = multiprocessing.get_context("spawn")
            found = context.Queue()
            process = context.Process(target=measure, args=(texts, out, asked.cache_dir, found))
            process.start()
            peaks.append(found.get(timeout=1800))
            process.join(timeout=60)
            print(f"{size / 1e6:.1f} MB of text: {peaks[-1]}", flush=True)
    once, ten = peaks
    rows = [
        {
            "work": what,
            "ours": ten[what],
            "peer": "a tenth of the text",
            "theirs": once[what],
            "unit": "MB",
            "ratio": once[what] / ten[what],
        }
        for what in once
    ]
    show(rows, asked.json)


if __name__ == "__main__":
    main()
