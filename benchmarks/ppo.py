"""A step of PPO and of GRPO beside TRL's, on the same models, prompts, epochs and threads, in one run.

    make peers                                             # .venv-peers: TRL 1.16, and 1.12, the last one with a PPOTrainer
    python -m benchmarks.ppo --against trl --json ppo.json

A step writes 64 answers, scores them by policy, reference, reward model and critic (GRPO: no critic), learns, and hands the new weights to
whoever writes the next ones. Models are the 10.5 M Llama with random weights, but for one feature that never changes, through
which the end token has the same probability everywhere: 0 in the rows of fixed length, 1/64 in "natural lengths", so that
answers end after 61 tokens in the mean of 192 allowed ones. Ours is the stage `rlhf.ppo.run` on a local Ray: its groups, a vLLM
engine, weight sync, gate, curves and timeline included. What counts is the time from the end of the second step to the end of the last.
TRL runs twice: as it comes, and with glibc told to keep freed blocks, which our workers do by themselves (`cluster/connect.py`).

With a GPU the work is a GPU's (`ppo_sizes.py`): 256 answers of 330 M models, in bf16, all roles in turn on one GPU. That has never run.

"critical path" is no contest but `benchmarks/controller.py`: what the controller adds to the work of its roles.
"""

import json
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.contest import Contest, arguments, run, show
from benchmarks.ppo_sizes import FIXED, GRPO, NATURAL, SIZES, TEMPERATURE, WORKS
from cluster.hardware import hardware

VOCABULARY = 8192
SCRIPTS = ("ours_ppo.py", "peers_ppo.py")
CRITICAL = "critical path"
PEERS = {FIXED: ("TRL 1.12", "ppo", 4), NATURAL: ("TRL 1.12", "ppo", 4), GRPO: ("TRL 1.16", "grpo", 5)}  # who, its trainer, steps


def contests(on: str) -> list[Contest]:
    """The steps on a "cpu" or "gpu"."""
    return [
        Contest(
            work,
            {"ours": ["ours", on], who: [trainer, on], f"{who}, our allocator": [trainer, on]},
            SIZES[on].unit(work),
            steps,
            SCRIPTS,
            as_they_come=(who,),
        )
        for work, (who, trainer, steps) in PEERS.items()
    ]


def prepare(folder: Path, on: str = "cpu") -> None:
    """tokenizer/, fixed/model, natural/model, reward/model; prompts as {"text", "ids"} lines in short.jsonl and long.jsonl."""
    from data.chat import encode_prompt
    from data.tokenizers import train
    from rlhf.models import load_reward_model, new_causal_lm, save_model
    from rlhf.recipe import Model

    sizes, rng = SIZES[on], np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(2, 9))) for _ in range(6000)]
    tokenizer = train([" ".join(words)] * 2, VOCABULARY)
    tokenizer.save(folder / "tokenizer")
    for name, tokens, count in (("short", sizes.short, 8 * sizes.samples), ("long", sizes.long, 8 * sizes.samples // sizes.group)):
        rows = []
        while len(rows) < count:
            text = " ".join(rng.choice(words, tokens))
            ids = tokenizer.encode(text)
            around = len(encode_prompt(tokenizer, [{"role": "user", "content": ""}]))
            text = tokenizer.decode(ids[: tokens - around])
            ids = encode_prompt(tokenizer, [{"role": "user", "content": text}])
            if len(ids) == tokens:
                rows.append({"text": text, "ids": ids})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    model = new_causal_lm(Model(**sizes.model), tokenizer.vocab_size, tokenizer.end_of_text, seed=0)
    never, one_in = -20.0, TEMPERATURE * math.log(tokenizer.vocab_size / (sizes.mean - 1))
    for name, logit in (("fixed", never), ("natural", one_in)):
        give_logits(model, {tokenizer.end_of_text: never, tokenizer.end_of_turn: logit})
        save_model(model, dict(model.state_dict()), tokenizer, folder / name / "model")
    judge = load_reward_model(folder / "fixed" / "model")
    torch.nn.init.normal_(judge.score.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    save_model(judge, dict(judge.state_dict()), tokenizer, folder / "reward" / "model")


@torch.no_grad()
def give_logits(model: torch.nn.Module, logits: dict[int, float]) -> None:
    """Let tokens have these logits whatever stands before them. The first feature of the residual stream becomes the same for all tokens
    and nothing writes to it, so that after the last norm it is nearly a constant, which the output layer then multiplies."""
    inner, large = model.model, 4.0  # type: ignore[union-attr]
    inner.embed_tokens.weight[:, 0] = large
    for layer in inner.layers:
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.down_proj.weight[0] = 0
    model.lm_head.weight[:, 0] = 0  # type: ignore[union-attr]
    model.set_attn_implementation("sdpa")  # type: ignore[operator]  # plain rows
    probe = torch.randint(0, VOCABULARY, (8, 64), generator=torch.Generator().manual_seed(0))
    constant = float(inner(input_ids=probe).last_hidden_state[..., 0].mean())
    for token, logit in logits.items():
        model.lm_head.weight[token] = 0  # type: ignore[union-attr]
        model.lm_head.weight[token, 0] = logit / constant  # type: ignore[union-attr]


def main() -> None:
    parser = arguments(__doc__, [*WORKS, CRITICAL])
    parser.add_argument("--against", choices=["trl"], default="trl")
    parser.add_argument("--on", choices=SIZES, default="gpu" if hardware().is_gpu else "cpu", help="default: what is here")
    asked = parser.parse_args()
    rows = run(contests(asked.on), asked, partial(prepare, on=asked.on))
    if not asked.work or CRITICAL in asked.work:
        from benchmarks.controller import critical_path

        rows += critical_path()
    show(rows, asked.json)


if __name__ == "__main__":
    sys.exit(main())
