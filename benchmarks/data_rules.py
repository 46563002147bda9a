"""Our rule sets beside datatrove's filters, document by document: whom they drop, and where they disagree.

    make data-peers
    python -m benchmarks.data_rules --megabytes 40 --more poems.jsonl --json rules.json

Speeches, the standard library and manual pages (real_text.py), and further lines of {"text"} of your own. Every filter judges every
document as it is, also code and Chinese, which it is not made for: to agree there means to count alike. Beside the decisions, their first
reasons and the texts that C4 leaves are compared. datatrove runs in .venv-data-peers. Rows of the JSON: {"rules", "documents", "dropped",
"disagree", "other_reason"}; disagreements are printed.

Speed is that of one core: `measure` and `c4_lines`, compiled, medians of `--rounds`.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import ROOT, real_text
from benchmarks.contest import needs_peers
from data.c4 import c4_lines
from data.language import identify
from data.quality import reasons
from data.rules import Quality
from data.signals import measure

PEERS = ROOT / ".venv-data-peers" / "bin" / "python"
REASONS = {
    "gopher@1": "gopher_short_doc gopher_long_doc gopher_below_avg_threshold gopher_above_avg_threshold gopher_too_many_hashes "
    "gopher_too_many_ellipsis gopher_too_many_bullets gopher_too_many_end_ellipsis gopher_below_alpha_threshold gopher_enough_stop_words",
    "gopher_repetition@1": "dup_para_frac dup_para_char_frac dup_line_frac dup_line_char_frac top_2_gram top_3_gram top_4_gram "
    + " ".join(f"duplicated_{n}_n_grams" for n in range(5, 11)),
    "c4@1": "lorem_ipsum curly_bracket too_few_sentences",
    "fineweb@1": "line_punct_ratio short_line_ratio char_dup_ratio list_ratio",
}
"""datatrove's reasons in the order of our rules."""


def theirs(texts: Path, out: Path) -> list[dict[str, Any]]:
    script = ROOT / "benchmarks" / "data_rules_datatrove.py"
    subprocess.run([str(PEERS), str(script), str(texts), str(out)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=3600)
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def compared(rows: list[dict[str, Any]], said: list[dict[str, Any]], console: Console) -> list[dict[str, Any]]:
    """A row per rule set; prints every disagreement."""
    from data.rules import RULE_SETS

    texts = [row["text"] for row in rows]
    left = c4_lines(texts)
    signals = {"c4@1": measure(left), "": measure(texts)}
    found = []
    for name, of_datatrove in REASONS.items():
        alike = {theirs: f"{name}: {rule.name}" for theirs, rule in zip(of_datatrove.split(), RULE_SETS[name].rules, strict=True)}
        ours = reasons(signals.get(name, signals[""]), ["en"] * len(texts), Quality(by_language={"en": (name,)})).to_pylist()
        peer = [one[name.partition("@")[0]] for one in said]
        disagree = [i for i, (a, b) in enumerate(zip(ours, peer, strict=True)) if (a is None) != (b is None)]
        for i in disagree:
            console.print(f"{name}  {rows[i].get('source')} {rows[i].get('name')}: ours {ours[i]}, datatrove {peer[i]}", markup=False)
        other = sum(a is not None and b is not None and alike.get(b) != a for a, b in zip(ours, peer, strict=True))
        dropped = sum(a is not None for a in ours)
        found.append({"rules": name, "documents": len(texts), "dropped": dropped, "disagree": len(disagree), "other_reason": other})
    kept = [i for i, one in enumerate(said) if one["c4_text"] is not None]
    unlike = sum(said[i]["c4_text"] != left[i] for i in kept)
    return [*found, {"rules": "c4_lines", "documents": len(kept), "dropped": 0, "disagree": unlike, "other_reason": 0}]


def speed(texts: list[str], rounds: int) -> dict[str, float]:
    """MB of UTF-8 a second of one core, and texts a second of language identification."""
    size = sum(len(text.encode()) for text in texts) / 1e6
    found = {}
    for name, work, amount in (("measure", measure, size), ("c4_lines", c4_lines, size), ("identify", identify, len(texts))):
        work(texts[:10])  # compiled before the clock starts
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            work(texts)
            seconds.append(time.perf_counter() - start)
        found[name] = amount / statistics.median(seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=40)
    parser.add_argument("--more", type=Path, action="append", default=[], help="lines of {text}; may be given several times")
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/roundhouse").expanduser())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--speed-only", action="store_true", help="without datatrove")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        real_text.write(Path(folder) / "texts", asked.cache_dir, asked.megabytes)
        files = [*sorted((Path(folder) / "texts").glob("*.jsonl")), *asked.more]
        rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
        table: list[dict[str, Any]] = []
        if not asked.speed_only:
            needs_peers(PEERS)
            (Path(folder) / "all.jsonl").write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in rows), encoding="utf-8")
            table = compared(rows, theirs(Path(folder) / "all.jsonl", Path(folder) / "said.jsonl"), console)
    shown = Table("rules", "documents", "dropped by us", "disagree", "other reason first")
    for row in table:
        shown.add_row(*(str(value) for value in row.values()))
    console.print(shown)
    speeches = [row["text"] for row in rows if row.get("source") == "sotu"]
    rates = {"speeches": speed(speeches, asked.rounds), "all": speed([row["text"] for row in rows], asked.rounds)}
    for what, of in rates.items():
        measured, edited, identified = of.values()
        console.print(f"{what}: measure {measured:.1f} MB/s, c4_lines {edited:.1f} MB/s, identify {identified:,.0f} texts/s")
    if asked.json:
        asked.json.write_text(json.dumps({"rows": table, "speed": rates}, indent=2) + "\n")


if __name__ == "__main__":
    main()
