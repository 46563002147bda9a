"""What the controller costs: PPO's own step over roles that sleep, against the shortest time that its dataflow allows.

    python -m benchmarks.ppo --work "critical path"

8 engines, 4 policy ranks, one rank each of reference, reward model and critic, all of them real actors; 640 answers of 100 tokens in
the mean, a few of them many times as long. The critical path: answers arrive when their last token is written; a scorer cannot be done
before any moment plus the work that arrives from then on; then the longer of the two updates, then the sync. Phase after phase
is the same work with nothing at the same time. The step is `rlhf.ppo.ppo_step` as it stands, timeline included, gate as well.

"controller" is its own CPU time per sample, with 640 and with 10,000 samples a step, over roles that hardly sleep.
"""

import os
import statistics
import time
from typing import Any

import numpy as np

from benchmarks.sleepers import SYNC_SECONDS, SleepingEngine, SleepingLearner
from rlhf.recipe import Recipe

ENGINES, POLICY, SAMPLES, PROMPT, MEAN, LONGEST = 8, 4, 640, 32, 100, 800
TOKEN = 5e-3  # seconds per token of an answer
SCORING = {"policy": 6e-5, "reference": 2e-5, "reward": 2e-5, "critic": 2e-5}  # seconds per token and rank
UPDATE = {"policy": 2.0, "critic": 1.5}
STEPS = 5
MANY = 10_000


def lengths(samples: int) -> np.ndarray:
    """Tokens of every answer: lognormal, cut off."""
    found = np.random.default_rng(0).lognormal(np.log(MEAN) - 0.4, 0.9, samples)
    return np.clip(found, 4, LONGEST).astype(int)


def bounds(answers: np.ndarray) -> tuple[float, float]:
    """(critical path, phase after phase), seconds."""
    ranks = {"policy": POLICY, "reference": 1, "reward": 1, "critic": 1}
    order = np.sort(answers)
    arrives = order * TOKEN
    done, work = arrives[-1], []
    for role, pace in SCORING.items():
        cost = (order + PROMPT) * pace / ranks[role]
        to_come = np.cumsum(cost[::-1])[::-1]
        done = max(done, float((arrives + to_come).max()))
        work.append(float(cost.sum()))
    return done + max(UPDATE.values()) + SYNC_SECONDS, float(arrives[-1]) + sum(work) + sum(UPDATE.values()) + SYNC_SECONDS


def recipe(samples: int) -> Recipe:
    one: dict[str, Any] = {"cpus": 0.02}
    groups = {"policy": one | {"workers": POLICY}, "reference": one, "reward": one, "critic": one, "rollout": one | {"workers": ENGINES}}
    ppo = {"rollout_batch": samples, "global_batch": samples, "max_prompt_tokens": PROMPT, "max_response_tokens": LONGEST, "groups": groups}
    sources = {name: ["unused"] for name in ("pretrain", "sft", "preferences", "prompts")}
    model = {"max_positions": 1024}
    return Recipe.model_validate({"name": "benchmark", "data": sources, "model": model, "ppo": ppo})


def steps(answers: np.ndarray, pace: float) -> tuple[float, float]:
    """(seconds of a step, seconds of the controller's CPU), medians, over roles that sleep `pace` times as long as they would work."""
    from cluster.deadlines import wait
    from rlhf import timeline
    from rlhf.graph import Role, open_graph
    from rlhf.ppo import ppo_step
    from rlhf.shaping import begin

    asked = recipe(len(answers))
    roles: dict[str, Role] = {"rollout": (SleepingEngine, ("", answers.tolist(), TOKEN * pace))}
    for role, scoring in SCORING.items():
        roles[role] = (SleepingLearner, (scoring * pace, UPDATE.get(role, 0.0) * pace))
    seconds, cpu = [], []
    with open_graph(asked, roles) as graph:
        wait(graph["rollout"].start("ready"), 120, "start")
        prompts = [list(range(1, PROMPT + 1)) for _ in answers]
        for step in range(STEPS):
            began, used = time.perf_counter(), time.process_time()
            ppo_step(graph, asked, prompts, step, begin(asked.ppo))
            timeline.collect(graph, 60)
            seconds.append(time.perf_counter() - began)
            cpu.append(time.process_time() - used)
    return statistics.median(seconds[1:]), statistics.median(cpu[1:])


def critical_path() -> list[dict[str, Any]]:
    """Rows for `benchmarks.ppo`."""
    from cluster.connect import connect

    with connect("local", num_cpus=2):
        step, own = steps(lengths(SAMPLES), pace=1.0)
        _, of_many = steps(lengths(MANY), pace=0.01)
    shortest, apart = bounds(lengths(SAMPLES))
    unit = f"s a step ({ENGINES} engines, {POLICY} policy ranks, {SAMPLES} answers)"
    few, many = 1e3 * own / SAMPLES, 1e3 * of_many / MANY
    return [
        {"work": "critical path", "ours": step, "peer": "critical path", "theirs": shortest, "unit": unit, "ratio": shortest / step},
        {"work": "critical path", "ours": step, "peer": "phase after phase", "theirs": apart, "unit": unit, "ratio": apart / step},
        {
            "work": "controller",
            "ours": many,
            "peer": f"with {SAMPLES} samples",
            "theirs": few,
            "unit": f"ms of the controller's CPU per sample, with {MANY:,} samples a step",
            "ratio": few / many,
        },
    ]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for row in critical_path():
        print(row)
