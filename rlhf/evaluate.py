"""Stage evaluate: did it work? Held-out text for every stage's model, held-out prompts for the SFT model against the aligned one.

Both models answer the same prompts with the same sampling seeds. The answers are judged by the reward model, which PPO was
trained to please, and by an independent scorer, which nobody was trained on. A gain that only the first one sees is not one. A reward
function in the reward model's place knows what is right: then its success rate is the figure.
"""

import gzip
import lzma
from pathlib import Path

import numpy as np
import torch

from cluster.deadlines import wait
from data.examples import opening
from data.packing import pack
from data.shards import TokenShards
from data.tokenizers import Tokenizer
from data.tokenizers import load as load_tokenizer
from rlhf.artefacts import write_json
from rlhf.experience import Rollout, align, merge, responses
from rlhf.generation import generate
from rlhf.graph import Graph, Role, engines, open_graph
from rlhf.models import Batch
from rlhf.monitoring import Monitor, read_metrics
from rlhf.pretrain import bits_per_byte, every_token, token_loss
from rlhf.recipe import Recipe
from rlhf.roles import ReferenceWorker
from rlhf.scorers import SCORERS
from rlhf.sync import refuse_gap, sync_weights
from rlhf.verifier import held_out, judge, success


class JudgedModel(ReferenceWorker):
    """A finished language model: log-probabilities of answers, bits per byte of held-out text, its weights."""

    def held_out(self, shards: Path, length: int) -> dict[str, float]:
        """Validation loss and bits per byte. All ranks compute all windows; a figure of a minute is not worth a plan."""
        text = TokenShards(shards)
        units = every_token(text, length)
        at_once = max(1, self.config.micro_batch // length)
        sums = {"loss": 0.0, "count": 0.0}
        for start in range(0, len(units.lengths), at_once):
            samples = [s for i in range(start, min(start + at_once, len(units.lengths))) for s in units.get(i)]
            batch = Batch.of(pack(samples), self.device)
            with torch.no_grad():
                sums["loss"] += float(token_loss(self.model, batch)[0])
            sums["count"] += float(batch.weights.sum())
        return bits_per_byte(sums, text)


def run(recipe: Recipe, inputs: dict[str, Path], out: Path, monitor: Monitor) -> None:
    """Start the two models, the reward model and the engines; measure; write `samples.json` for the report."""
    data = inputs["data"].resolve()
    judged = {"sft": "sft", "aligned": recipe.align}
    models = {name: inputs[stage].resolve() / "model" for name, stage in judged.items()}
    tokenizer = load_tokenizer(data / "tokenizer")
    shards, length = data / "pretrain" / "validation", recipe.pretrain.sequence_length
    prompts = held_out(data, recipe.evaluate.prompts)
    seconds, begin_alike = recipe.cluster.deadline_s, opening(data / "prompts")
    roles: dict[str, Role] = {
        "rollout": engines(recipe, models["sft"], tokenizer),
        "reference": (JudgedModel, (recipe, models["sft"], begin_alike)),
        "policy": (JudgedModel, (recipe, models["aligned"], begin_alike)),
        "reward": judge(recipe, inputs, begin_alike),
    }
    with open_graph(recipe, roles) as graph:
        loading = {name: ref for role in ("reference", "policy", "reward") for name, ref in graph[role].start("load").items()}
        wait(loading | graph["rollout"].start("ready"), seconds, "load the models")
        monitor.progress(1, 5, "held-out text")
        text = {stage: graph[role].start("held_out", shards, length) for stage, role in (("sft", "reference"), ("aligned", "policy"))}
        bits = {stage: next(iter(wait(refs, seconds, "held-out text").values())) for stage, refs in text.items()}
        answers = {}
        for i, (stage, role) in enumerate((("sft", "reference"), ("aligned", "policy"))):
            monitor.progress(2 + i, 5, f"{len(prompts)} answers of the {stage} model")
            answers[stage] = answered(graph, recipe, prompts, role, stage)
    monitor.progress(4, 5, "figures")

    monitor.result("pretrain_bits_per_byte", read_metrics(inputs["pretrain"])["pretrain/val_bits_per_byte"])
    for stage, figures in bits.items():
        monitor.result(f"{stage}_bits_per_byte", figures["val_bits_per_byte"])
    for name, value in compressors(shards, tokenizer).items():
        monitor.result(name, value)
    texts = {stage: [tokenizer.decode(ids, skip_special=True) for ids in responses(a[0])] for stage, a in answers.items()}
    rewards = {stage: of_heads.mean(1) for stage, (_, of_heads, _) in answers.items()}
    opinions = {"reward": rewards}
    (rollout, _, kl), sft, aligned = answers["aligned"], rewards["sft"], rewards["aligned"]
    monitor.result("prompts", len(prompts))
    for stage, values in rewards.items():
        if not recipe.has_reward_model:
            monitor.result(f"{stage}_success", success(values))
        monitor.result(f"{stage}_reward", float(values.mean()))
    if recipe.has_reward_model:
        monitor.result("reward_gain_sd", float((aligned.mean() - sft.mean()) / sft.std()))
    if recipe.reward.heads > 1:
        for stage, (_, of_heads, _) in answers.items():
            monitor.result(f"{stage}_disagreement", float(of_heads.std(1).mean()))
    monitor.result("kl_nats", float(kl.mean()))
    if recipe.has_reward_model:
        independent = {stage: np.array(SCORERS[recipe.evaluate.scorer](t)) for stage, t in texts.items()}
        opinions["independent"] = independent
        monitor.result("independent_scorer", recipe.evaluate.scorer)
        for stage, values in independent.items():
            monitor.result(f"{stage}_independent", float(values.mean()))
        monitor.result("independent_gain", float(independent["aligned"].mean() - independent["sft"].mean()))
    monitor.result("response_tokens", float(rollout.response_lengths.mean()))
    monitor.result("distinct_answers", len(set(texts["aligned"])) / len(prompts))
    shown = range(min(recipe.evaluate.samples, len(prompts)))
    write_json(
        out / "samples.json",
        [
            {
                "prompt": tokenizer.decode(prompts[i]),
                **{stage: texts[stage][i] for stage in texts},
                **{f"{stage}_{kind}": float(of_stages[stage][i]) for kind, of_stages in opinions.items() for stage in texts},
            }
            for i in shown
        ],
    )
    monitor.progress(5, 5)


def answered(graph: Graph, recipe: Recipe, prompts: list[list[int]], role: str, stage: str) -> tuple[Rollout, np.ndarray, np.ndarray]:
    """Let the engines answer with `role`'s weights: the answers, their rewards [n, heads], their KL from the SFT model [n] in nats."""
    seconds = recipe.cluster.deadline_s
    sync_weights(graph, recipe, stage, role)
    rollouts = generate(graph, recipe, prompts, 0)
    scoring = {name: graph[name].start("log_probs", *rollouts) for name in ("policy", "reference")}
    scoring["reward"] = graph["reward"].start("scores", *rollouts)
    found = {name: list(wait(refs, seconds, f"{stage}: {name}").values()) for name, refs in scoring.items()}
    rollout = merge(list(wait({f"rollout[{i}]": ref for i, ref in enumerate(rollouts)}, seconds, "rollout").values()))
    heads = recipe.reward.heads
    rewards = align(found["reward"], np.full_like(rollout.index, heads)).reshape(-1, heads)
    ours, reference = (align(found[name], rollout.response_lengths) for name in (role, "reference"))
    refuse_gap(float(np.abs(ours - rollout.log_probs).max()), recipe, f"answers of the {stage} model")
    ends = np.cumsum(rollout.response_lengths) - 1
    kl = np.diff(np.cumsum((ours - reference).astype(np.float64))[ends], prepend=0.0)
    return rollout, rewards, kl


def compressors(shards: Path, tokenizer: Tokenizer) -> dict[str, float]:
    """Bits per byte of gzip -9 and xz -9 on the same held-out text: what a model has to beat."""
    text = TokenShards(shards)
    raw = tokenizer.decode(text.span(0, text.tokens)[0].tolist(), skip_special=True).encode()
    return {
        "gzip_bits_per_byte": 8 * len(gzip.compress(raw, 9)) / len(raw),
        "xz_bits_per_byte": 8 * len(lzma.compress(raw, preset=9)) / len(raw),
    }
