"""Our learner beside its peers, on the same model, tokens, threads and allocator, in one run.

    make peers                                             # .venv-peers: TRL, transformers' Trainer
    python -m benchmarks.training --against all --corpora FOLDER --json training.json

FOLDER holds gsm8k-train.jsonl.gz ({"question", "answer"}) and hh-harmless-pairs.jsonl.gz ({"chosen", "rejected"} dialogues). Rows are
{"work", "ours", "peer", "theirs", "unit", "ratio"}; a ratio above 1 means that we are faster, or need less memory.

Every figure is the median of `--rounds` processes, which take turns: ours, peer, peer, ours, ... A process trains a few steps on 2
threads in fp32; what counts is the time from the end of the second step to the end of the last but one, with the harness, its
logging and one checkpoint. Ours is `rlhf.training.worker`, what Ray Train runs on every rank, as the only rank. In "pretrain" our blocks
are compiled, as `compile: auto` does for every stage of more than ten minutes; compiling itself falls into the first two steps, which
nobody is charged for. The peers are told to compile too, beside what they do by themselves.
"""

import gzip
import json
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import add_corpora
from benchmarks.contest import Contest, Figures, arguments, middle, rates, run, show
from data.tokenizers import Tokenizer, train

TURN = "\n\nAssistant:"
VOCABULARY, LONGEST_TEXT, LONGEST_PAIR, WINDOW = 8192, 512, 384, 512

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
        steps=14,
    ),
    Contest(
        "pretrain, eager",
        {"ours": ["ours", "eager"], "HF Trainer": ["hf"], "plain torch loop": ["loop"]},
        "tokens/s (10.5 M Llama, 8 windows of 512)",
        steps=14,
    ),
    Contest(
        "sft",
        {"ours": ["ours"], "TRL packed, 8 rows of 1 x 512": ["trl", "packed"], "TRL defaults, 8 padded rows": ["trl", "padded"]},
        "real tokens/s (GSM8K, at most 512 tokens)",
        steps=10,
    ),
    Contest("reward", {"ours": ["ours"], "TRL": ["trl"]}, "pairs/s (hh-harmless, at most 384 tokens, 8 pairs a step)", steps=14),
    Contest("memory", {"ours": ["ours"], "HF Trainer": ["hf"]}, "GiB at most (135 M Llama, 2 windows of 512)", steps=4),
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


def compare(contest: Contest, found: dict[str, list[Figures]]) -> list[dict[str, Any]]:
    """A row for each peer, and for eager pretraining one for its memory."""
    if contest.work not in ("memory", "pretrain, eager"):
        return rates(contest, found)
    unit = contest.unit if contest.work == "memory" else "GiB at most (10.5 M Llama, 8 windows of 512)"
    ours, rows = middle(found, "ours", "memory_gib"), []
    for peer in (who for who in found if who != "ours"):
        theirs = middle(found, peer, "memory_gib")
        rows.append({"work": "memory", "ours": ours, "peer": peer, "theirs": theirs, "unit": unit, "ratio": theirs / ours})
    return rows if contest.work == "memory" else rates(contest, found) + rows


def main() -> None:
    parser = arguments(__doc__, [contest.work for contest in CONTESTS])
    parser.add_argument("--against", choices=["all", "hf", "loop", "trl"], default="all")
    add_corpora(parser)
    asked = parser.parse_args()

    def against(contest: Contest) -> Contest:
        kept = {who: how for who, how in contest.runners.items() if who == "ours" or asked.against in ("all", how[0])}
        return replace(contest, runners=kept)

    contests = [contest for contest in map(against, CONTESTS) if len(contest.runners) > 1]
    show(run(contests, asked, partial(prepare, asked.corpora), compare), asked.json)


if __name__ == "__main__":
    main()
