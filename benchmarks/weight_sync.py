"""Weight sync: a policy's weights into a running vLLM engine, ours beside one call per parameter over the same path.

    python -m benchmarks.weight_sync --json weight_sync.json [--transport gloo] [--rounds 5]

The policy is a fresh 135 M Llama (SmolLM2's sizes, vocabulary 8,192) in one actor, the engine another actor on the same machine, fp32,
one thread each; nccl takes two GPUs and has never run. Rows are {"work", "ours", "peer", "theirs", "unit", "ratio"}, medians of `--rounds`
syncs that take turns; a ratio above 1 means that we are faster. MB/s is the size of one copy of the weights by the time from the first call
to the engine's last answer, without the gate. The peer is what frameworks began with, and what made syncs of 50-250 s (OpenRLHF pull
request 593, verl issue 4896): gather one parameter, tell every engine to load it, wait, next. "gate" holds what proves the sync: the
largest difference of log-probabilities.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cluster.connect import connect
from cluster.deadlines import wait
from data.tokenizers import Tokenizer, train
from rlhf.buckets import size
from rlhf.graph import Graph, engines, open_graph
from rlhf.models import new_causal_lm, save_model
from rlhf.recipe import Model, Recipe
from rlhf.roles import PolicyWorker
from rlhf.sync import gate, link_to, sync_weights
from rlhf.weight_sender import BROADCASTS

VOCABULARY = 8192
PEER = "one call per parameter, same path"


def recipe_for(transport: str) -> Recipe:
    sources = {name: ["unused"] for name in ("pretrain", "sft", "preferences", "prompts")}
    one = {"cpus": 1, "threads": 1, "gpus": int(transport == "nccl")}
    groups = {"policy": one, "reference": one, "rollout": one}  # of which the reference is not opened
    ppo = {"weight_sync": transport, "max_prompt_tokens": 16, "max_response_tokens": 16, "groups": groups}
    return Recipe(name="benchmark", data=sources, ppo=ppo)


def some_tokenizer() -> Tokenizer:
    """Of words that nobody speaks: enough different ones for the vocabulary."""
    letters = np.random.default_rng(0).integers(97, 123, (20_000, 7), dtype=np.uint8)
    return train([" ".join(bytes(word).decode() for word in letters)], VOCABULARY)


def one_by_one(graph: Graph, recipe: Recipe, version: str) -> dict[str, float]:
    """As `sync_weights`, a parameter at a time."""
    link, seconds = link_to(graph, recipe, "policy"), recipe.cluster.deadline_s
    specs = [spec for bucket in link.buckets for spec in bucket]
    began = time.perf_counter()
    wait(graph["rollout"].start("start_weight_update"), seconds, version)
    for spec in specs:
        sent = graph["policy"].start("send", [spec])
        carried = () if link.transport in BROADCASTS else tuple(sent.values())
        wait(sent | graph["rollout"].start("update_weights", [spec], *carried), seconds, version)
    wait(graph["rollout"].start("finish_weight_update", version), seconds, version)
    took = time.perf_counter() - began
    return {"sync/seconds": took, "sync/mb_per_s": size(specs) / 1e6 / took}


def measure(transport: str, rounds: int, folder: Path) -> dict[str, Any]:
    """The rows, and what the gate found."""
    recipe, tokenizer = recipe_for(transport), some_tokenizer()
    model = new_causal_lm(Model(preset="135m"), VOCABULARY, tokenizer.end_of_text, seed=0)
    save_model(model, dict(model.state_dict()), tokenizer, folder / "model")
    del model
    how: dict[str, Callable[[Graph, Recipe, str], dict[str, float]]] = {"ours": sync_weights, "peer": one_by_one}
    prompts = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]]
    found: dict[str, list[dict[str, float]]] = {who: [] for who in how}
    gates = []
    roles = {"rollout": engines(recipe, folder / "model", tokenizer), "policy": (PolicyWorker, (recipe, folder / "model"))}
    with open_graph(recipe, roles) as graph:
        wait(graph["policy"].start("load", 1, folder / "checkpoints") | graph["rollout"].start("ready"), 600, "load")
        link = link_to(graph, recipe, "policy")
        for turn in range(rounds + 1):  # the first of each warms up
            for who in list(how)[:: 1 if turn % 2 == 0 else -1]:
                found[who].append(how[who](graph, recipe, f"{who}-{turn}"))
                began = time.perf_counter()
                gates.append({**gate(graph, recipe, prompts, turn), "seconds": time.perf_counter() - began})

    def middle(who: str, what: str) -> float:
        return statistics.median(figures[what] for figures in found[who][1:])

    megabytes = sum(map(size, link.buckets)) / 1e6
    about = f"{megabytes:,.0f} MB in {len(link.buckets)} buckets, {link.dtype}, one engine"
    rows = []
    for what, unit in (("sync/mb_per_s", f"MB/s ({about})"), ("sync/seconds", f"s ({about})")):
        ours, theirs = middle("ours", what), middle("peer", what)
        ratio = ours / theirs if what == "sync/mb_per_s" else theirs / ours
        work = f"weight sync, {link.transport}"
        rows.append({"work": work, "ours": ours, "peer": PEER, "theirs": theirs, "unit": unit, "ratio": ratio})
    return {
        "rows": rows,
        "gate": {
            "log_prob_gap_nats": max(g["sync/log_prob_gap"] for g in gates),
            "seconds": statistics.median(g["seconds"] for g in gates[2:]),
            "resyncs": sum(g["sync/resyncs"] for g in gates),
        },
        "syncs": {who: [figures["sync/seconds"] for figures in some[1:]] for who, some in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", choices=["object_store", "gloo", "nccl"], default="object_store")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, connect("local", num_cpus=2):
        result = measure(asked.transport, asked.rounds, Path(name))
    table = Table("work", "ours", "peer", "theirs", "unit", "ratio")
    for row in result["rows"]:
        table.add_row(row["work"], f"{row['ours']:,.2f}", row["peer"], f"{row['theirs']:,.2f}", row["unit"], f"{row['ratio']:.2f}")
    Console().print(table)
    Console().print("gate: {log_prob_gap_nats:.2g} nats at most, {seconds:.2f} s, {resyncs:g} resyncs".format(**result["gate"]))
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
