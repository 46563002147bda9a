"""What the peers of the data benchmarks do, one process each: WORK WHO FOLDER OUT STEPS. Run by .venv-data-peers; see data.py.

FOLDER holds texts/*.jsonl ({"text"}), gpt2.json (tokenizer.json), gpt2.tiktoken (ranks). Prints a line of JSON: {"rate": MB of text/s}.
"""

import base64
import json
import multiprocessing
import sys
import time
from pathlib import Path

GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
WORKERS = 2


def gpt2(folder: Path):
    import tiktoken

    ranks = {base64.b64decode(a): int(b) for a, b in (line.split() for line in (folder / "gpt2.tiktoken").read_bytes().splitlines())}
    return tiktoken.Encoding("gpt2", pat_str=GPT2, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})


def datatrove_whole(folder: Path, out: Path) -> dict[str, float]:
    """Read, Gopher's repetition and quality, C4 (without its rule on lines' ends, as FineWeb), FineWeb, MinHash, gpt2 tokens."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.hashing import HashConfig

    config = MinhashConfig(hash_config=HashConfig(precision=64))
    filtered, signatures, buckets, removed = (str(out / name) for name in ("filtered", "signatures", "buckets", "removed"))
    stages = {
        "filters": (
            WORKERS,
            [
                JsonlReader(str(folder / "texts")),
                GopherRepetitionFilter(),
                GopherQualityFilter(),
                C4QualityFilter(filter_no_terminal_punct=False),
                FineWebQualityFilter(),
                JsonlWriter(filtered, compression=None),
            ],
        ),
        "signatures": (WORKERS, [JsonlReader(filtered), MinhashDedupSignature(signatures, config=config)]),
        "buckets": (config.num_buckets, [MinhashDedupBuckets(signatures, buckets, config=config)]),
        "cluster": (1, [MinhashDedupCluster(buckets, removed, config=config)]),
        "tokens": (
            WORKERS,
            [
                JsonlReader(filtered),
                MinhashDedupFilter(removed),
                DocumentTokenizer(str(out / "tokens"), str(folder / "gpt2.json"), eos_token="<|endoftext|>", shuffle_documents=False),
            ],
        ),
    }
    seconds = {}
    for name, (tasks, steps) in stages.items():
        since = time.perf_counter()
        LocalPipelineExecutor(pipeline=steps, tasks=tasks, workers=min(tasks, WORKERS), logging_dir=str(out / "logs" / name)).run()
        seconds[f"{name}_seconds"] = time.perf_counter() - since
    seconds["tokens"] = sum(path.stat().st_size // 2 for path in (out / "tokens").glob("*.ds"))
    return seconds


def datasets_map(folder: Path, out: Path) -> dict[str, float]:
    """The usual recipe: map a tokenizer over batches, then another map that joins and cuts them into blocks."""
    from datasets import load_dataset

    encoding, length = gpt2(folder), 1024

    def tokenize(batch):
        return {"ids": [[*ids, 50256] for ids in encoding.encode_ordinary_batch(batch["text"], num_threads=1)]}

    def group(batch):
        joined = [token for ids in batch["ids"] for token in ids]
        return {"ids": [joined[i : i + length] for i in range(0, len(joined) - length + 1, length)]}

    texts = load_dataset("json", data_files=sorted(map(str, (folder / "texts").glob("*.jsonl"))), split="train", cache_dir=str(out))
    tokens = texts.map(tokenize, batched=True, num_proc=WORKERS, remove_columns=texts.column_names)
    blocks = tokens.map(group, batched=True, num_proc=WORKERS)
    return {"tokens": len(blocks) * length}


def bare_worker(arguments):
    import numpy as np

    path, out = arguments
    encoding, count = ENCODING, 0
    with open(path, encoding="utf-8") as lines, open(out, "wb") as file:
        for line in lines:
            ids = encoding.encode_ordinary(json.loads(line)["text"])
            ids.append(50256)
            file.write(np.array(ids, np.uint16).tobytes())
            count += len(ids)
    return count


def bare_start(folder):
    global ENCODING
    ENCODING = gpt2(folder)
    ENCODING.encode_ordinary("warm")


def main() -> None:
    who, folder, out = sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    size = json.loads((folder / "about.json").read_bytes())["bytes"] / 1e6
    if who == "loop":  # two processes that are ready, tiktoken and a file each
        files = sorted((folder / "texts").glob("*.jsonl"))
        with multiprocessing.Pool(WORKERS, bare_start, (folder,)) as pool:
            pool.map(time.sleep, [0.2] * WORKERS, chunksize=1)
            since = time.perf_counter()
            found = {"tokens": sum(pool.map(bare_worker, [(path, out / f"{path.stem}.bin") for path in files], chunksize=1))}
            seconds = time.perf_counter() - since
    else:
        run = {"datatrove": datatrove_whole, "datasets": datasets_map}[who]
        if who == "datatrove":
            import datatrove.executor
            import datatrove.pipeline.dedup
            import datatrove.pipeline.filters
            import datatrove.pipeline.tokens  # noqa: F401
        else:
            import datasets  # noqa: F401
        since = time.perf_counter()
        found = run(folder, out)
        seconds = time.perf_counter() - since
    print(json.dumps({"rate": size / seconds, "seconds": seconds, **found}))


if __name__ == "__main__":
    main()
