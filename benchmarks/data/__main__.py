"""Our refinery beside datatrove and datasets, on the same real text, rules and cores, in one run.

    make data-peers                                        # .venv-data-peers: datatrove, datasets
    python -m benchmarks.data --against datatrove,datasets --json data.json

Rows are {"work", "ours", "peer", "theirs", "unit", "ratio"}; a ratio above 1 means that we are faster. Every figure is the median of
`--rounds` processes, which take turns: ours, peer, peer, ours, ... All have 2 processes of one thread each.

    whole way        read, Gopher's repetition and quality rules, C4, FineWeb, MinHash, gpt2 tokens, shards on disk
    tokenize         texts -> gpt2 tokens -> files, beside `datasets.map` and beside two bare processes that do nothing else
    tokenize, fast   the same with gigatoken

The text: speeches, the code of Python's standard library and the manual pages of this machine (real_text.py), at least `--megabytes` of
it. The clock starts when a process has imported what it imports and, ours, when Ray is there: Ray's start (3 to 5 s, once) is
nobody's, as the starts of the others' interpreters are not. What worker processes import and load is within the time of both. What
numba compiles is compiled before, as on every machine after its first run. Manual pages take minutes to render, once.
"""

# This folder has no __init__.py on purpose. Ray shows its workers the folder of the script that runs, for many `benchmarks`, and what they
# import as `data` must be the data room: a package of that name there would hide it, a folder without __init__.py does not.

import json
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import ROOT, real_text
from benchmarks.contest import Contest, Figures, arguments, middle, rates, run, show

PEERS = ROOT / ".venv-data-peers" / "bin" / "python"
SCRIPTS = ("ours_data.py", "peers_data.py")
UNIT = "MB of text/s"

CONTESTS = (
    Contest("whole way", {"ours": ["ours"], "datatrove": ["datatrove"]}, UNIT, 0, SCRIPTS, PEERS),
    Contest("tokenize", {"ours": ["ours"], "datasets.map": ["datasets"], "bare loop": ["loop"]}, UNIT, 0, SCRIPTS, PEERS),
    Contest("tokenize, fast", {"ours": ["ours"], "bare loop": ["loop"]}, UNIT, 0, SCRIPTS, PEERS),
)
STEPS = {  # of the whole way: ours and datatrove's, as each cuts it
    "read, clean, rules, MinHash keys": ("refine_seconds", ("filters_seconds", "signatures_seconds")),
    "duplicates": ("compare_seconds", ("buckets_seconds", "cluster_seconds")),
    "tokens, shards": ("tokenize_seconds", ("tokens_seconds",)),
}


def prepare(folder: Path, cache_dir: Path, megabytes: int) -> None:
    """What all runners read: texts/*.jsonl, gpt2's ranks and tokenizer.json, about.json."""
    from data.tokenizers import named

    size = real_text.write(folder / "texts", cache_dir, megabytes)
    named("gpt2", cache_dir).save(folder / "tokenizer")
    (folder / "tokenizer" / "tokenizer.json").rename(folder / "gpt2.json")
    (folder / "tokenizer" / "ranks.tiktoken").rename(folder / "gpt2.tiktoken")
    (folder / "about.json").write_text(json.dumps({"bytes": size, "cache_dir": str(cache_dir)}))


def show_steps(found: dict[str, list[Figures]], megabytes: float) -> None:
    """Where the whole way's time goes."""
    table = Table("step of the whole way", "ours, s", "datatrove, s", "ratio")
    for step, (mine, theirs) in STEPS.items():
        ours, peer = middle(found, "ours", mine), sum(middle(found, "datatrove", name) for name in theirs)
        table.add_row(step, f"{ours:.1f}", f"{peer:.1f}", f"{peer / max(ours, 1e-9):.1f}")
    Console().print(table, f"{megabytes:.1f} MB of text")


def main() -> None:
    parser = arguments(__doc__, [contest.work for contest in CONTESTS])
    parser.add_argument("--against", default="datatrove,datasets", help="datatrove, datasets or both")
    parser.add_argument("--megabytes", type=int, default=128)
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/roundhouse").expanduser())
    asked = parser.parse_args()
    peers = {"datatrove": {"whole way"}, "datasets": {"tokenize", "tokenize, fast"}}
    works: set[str] = set().union(*(peers[name] for name in asked.against.split(",")))
    asked.work = [work for work in asked.work or works if work in works]
    seen: dict[str, dict[str, list[Figures]]] = defaultdict(dict)

    def compare(contest: Contest, found: dict[str, list[Figures]]) -> list[dict[str, object]]:
        seen[contest.work] = found
        return rates(contest, found)

    rows = run(CONTESTS, asked, lambda folder: prepare(folder, asked.cache_dir, asked.megabytes), compare)
    if whole := seen.get("whole way"):
        show_steps(whole, whole["ours"][0]["rate"] * whole["ours"][0]["seconds"])
    show(rows, asked.json)


if __name__ == "__main__":
    main()
