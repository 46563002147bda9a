"""Our learner beside its peers, on the same model, tokens, threads and allocator, in one run.

    make peers                                             # .venv-peers: TRL, transformers' Trainer
    python -m benchmarks.training --against all --corpora FOLDER --json training.json

FOLDER holds gsm8k-train.jsonl.gz ({"question", "answer"}) and hh-harmless-pairs.jsonl.gz ({"chosen", "rejected"} dialogues). Rows are
{"work", "ours", "peer", "theirs", "unit", "ratio"}; a ratio above 1 means that we are faster, or need less memory.

Every figure is the median of `--rounds` processes, which take turns: ours, peer, peer, ours, ... A process trains `STEPS` steps on 2
threads in fp32; what counts is the time from the end of the second step to the end of the last but one, with the harness, its
logging and one checkpoint. Ours is `rlhf.training.worker`, what Ray Train runs on every rank, as the only rank. In "pretrain" our blocks
are compiled, as `compile: auto` does for every stage of more than ten minutes; compiling itself falls into the first two steps, which
nobody is charged for. The peers are told to compile too, beside what they do by themselves.
"""

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import ROOT, add_corpora
from data.tokenizers import Tokenizer, train

PEERS = ROOT / ".venv-peers" / "bin" / "python"
THREADS = 2
STEPS = {"pretrain": 14, "pretrain, eager": 14, "sft": 10, "reward": 14, "memory": 4}
TURN = "\n\nAssistant:"
VOCABULARY, LONGEST_TEXT, LONGEST_PAIR, WINDOW = 8192, 512, 384, 512


@dataclass(frozen=True)
class Contest:
    """One kind of work, who does it, and what is counted."""

    work: str
    runners: dict[str, list[str]]  # who -> arguments of its runner
    unit: str


CONTESTS = (
    Contest(
        "pretrain",
        {
            "ours": ["ours", "compiled"],
            "HF Trainer": ["hf"],
            "HF Trainer, compiled": ["hf", "compiled"],
            "plain torch loop": ["loop"],
            "plain torch loop, compiled": ["loop", "compiled"],
        },
        "tokens/s (10.5 M Llama, 8 windows of 512)",
    ),
    Contest(
        "pretrain, eager",
        {"ours": ["ours", "eager"], "HF Trainer": ["hf"], "plain torch loop": ["loop"]},
        "tokens/s (10.5 M Llama, 8 windows of 512)",
    ),
    Contest(
        "sft",
        {"ours": ["ours"], "TRL packed, 8 rows of 1 x 512": ["trl", "packed"], "TRL defaults, 8 padded rows": ["trl", "padded"]},
        "real tokens/s (GSM8K, at most 512 tokens)",
    ),
    Contest("reward", {"ours": ["ours"], "TRL": ["trl"]}, "pairs/s (hh-harmless, at most 384 tokens, 8 pairs a step)"),
    Contest("memory", {"ours": ["ours"], "HF Trainer": ["hf"]}, "GiB at most (135 M Llama, 2 windows of 512)"),
)


def prepare(corpora: Path, folder: Path) -> None:
    """The models, and everybody's token ids: stream.npy, sft.jsonl, pairs.jsonl."""
    from rlhf.models import new_causal_lm, save_model
    from rlhf.recipe import Model

    problems = _lines(corpora / "gsm8k-train.jsonl.gz")
    dialogues = _lines(corpora / "hh-harmless-pairs.jsonl.gz")
    texts = [f"{p['question']} {p['answer']}" for p in problems] + [d["chosen"] for d in dialogues]
    tokenizer = train(texts, VOCABULARY)
    sizes = {
        "model": {"hidden_size": 256, "layers": 8, "heads": 4, "kv_heads": 4, "intermediate_size": 688, "max_positions": 512},
        "model-135m": {"preset": "135m"},
    }
    for name, size in sizes.items():
        model = new_causal_lm(Model(**size), VOCABULARY, tokenizer.end_of_text, seed=0)
        model.config.architectures = ["LlamaForCausalLM"]
        save_model(model, dict(model.state_dict()), tokenizer, folder / name)

    rng = np.random.default_rng(0)
    np.save(folder / "stream.npy", rng.integers(0, VOCABULARY, 2_000_000))
    rows = []
    for p in problems[:2000]:
        question, answer = tokenizer.encode(p["question"] + "\n"), [*tokenizer.encode(p["answer"]), tokenizer.end_of_turn]
        if len(question) + len(answer) <= LONGEST_TEXT:
            rows.append({"input_ids": question + answer, "completion_mask": [0] * len(question) + [1] * len(answer)})
    write_lines(folder / "sft.jsonl", rows)
    write_lines(folder / "pairs.jsonl", dialogue_pairs(corpora, tokenizer, LONGEST_PAIR))


def dialogue_pairs(corpora: Path, tokenizer: Tokenizer, longest: int) -> list[dict[str, Any]]:
    """hh-harmless as {"prompt", "chosen", "rejected"} ids; the prompt is what both dialogues share, up to the assistant's last turn."""
    pairs = []
    for d in _lines(corpora / "hh-harmless-pairs.jsonl.gz"):
        same = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(d["chosen"], d["rejected"], strict=False)))
        cut = d["chosen"][:same].rfind(TURN) + len(TURN)
        prompt = tokenizer.encode(d["chosen"][:cut])
        answers = {k: [*tokenizer.encode(d[k][cut:]), tokenizer.end_of_turn] for k in ("chosen", "rejected")}
        if answers["chosen"] != answers["rejected"] and len(prompt) + max(map(len, answers.values())) <= longest:
            pairs.append({"prompt": prompt, **answers})
    return pairs


def _lines(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def measure(work: str, runner: list[str], folder: Path) -> dict[str, float]:
    """Run one process to its end: {"rate": units per second, "memory_gib": its peak}."""
    who, *rest = runner
    python, module = (sys.executable, "ours") if who == "ours" else (str(PEERS), "peers")
    # One allocator for all: glibc's, told to keep freed blocks, as our workers are.
    keep = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(4 << 30)}
    env = os.environ | keep | {"OMP_NUM_THREADS": str(THREADS), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as out:
        command = [python, str(ROOT / "benchmarks" / f"{module}.py"), work, who, str(folder), out, str(STEPS[work]), *rest]
        done = subprocess.run(command, text=True, capture_output=True, env=env, cwd=ROOT, timeout=900)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", choices=["all", "hf", "loop", "trl"], default="all")
    parser.add_argument("--work", choices=[c.work for c in CONTESTS], action="append", help="default: all")
    add_corpora(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if not PEERS.exists():
        raise SystemExit("`make peers` makes the environment that the peers run in")
    rows = []
    with tempfile.TemporaryDirectory() as name, Progress(console=Console(stderr=True)) as progress:
        folder = Path(name)
        prepare(asked.corpora, folder)
        chosen = [c for c in CONTESTS if not asked.work or c.work in asked.work]
        bar = progress.add_task("", total=sum(len(c.runners) for c in chosen) * asked.rounds)
        for contest in chosen:
            runners = {who: how for who, how in contest.runners.items() if who == "ours" or asked.against in ("all", how[0])}
            found: dict[str, list[dict[str, float]]] = {who: [] for who in runners}
            for turn in range(asked.rounds):
                for who in list(runners)[:: 1 if turn % 2 == 0 else -1]:
                    progress.update(bar, description=f"{contest.work}: {who}")
                    found[who].append(measure(contest.work, runners[who], folder))
                    progress.advance(bar)
            rows += compare(contest, found)
    table = Table("work", "ours", "peer", "theirs", "unit", "ratio")
    for row in rows:
        table.add_row(row["work"], f"{row['ours']:,.2f}", row["peer"], f"{row['theirs']:,.2f}", row["unit"], f"{row['ratio']:.2f}")
    Console().print(table)
    if asked.json:
        asked.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


def compare(contest: Contest, found: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """A row for each peer, and for pretraining one for its memory."""

    def middle(who: str, what: str) -> float:
        return statistics.median(run[what] for run in found[who])

    rows = []
    for peer in [who for who in found if who != "ours"]:
        ours, theirs = ({what: middle(who, what) for what in ("rate", "memory_gib")} for who in ("ours", peer))
        memory = {"work": "memory", "ours": ours["memory_gib"], "peer": peer, "theirs": theirs["memory_gib"]}
        memory["ratio"] = theirs["memory_gib"] / ours["memory_gib"]
        if contest.work == "memory":
            rows.append(memory | {"unit": contest.unit})
            continue
        ratio = ours["rate"] / theirs["rate"]
        rows.append(
            {"work": contest.work, "ours": ours["rate"], "peer": peer, "theirs": theirs["rate"], "unit": contest.unit, "ratio": ratio}
        )
        if contest.work == "pretrain, eager":
            rows.append(memory | {"unit": "GiB at most (10.5 M Llama, 8 windows of 512)"})
    return rows


if __name__ == "__main__":
    main()
