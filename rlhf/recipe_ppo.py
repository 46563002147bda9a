"""The section `ppo`: learn from the scores of one's own answers, by PPO or one of its family.

    ppo: {preset: verl, kl_coef: 0.001}                         # as another library does it, but for one key
    ppo: {advantage: grpo, samples_per_prompt: 8}               # answers to one prompt compared with each other: no critic
    ppo: {reward_function: exact_match}                         # compared with the answers beside the prompts: no reward model

What a key defaults to may depend on others (`filled`), and some keys have no effect beside others (`idle`): then they are errors.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cluster.plan import Demand, disagreement
from rlhf.ppo_presets import PRESETS, told
from rlhf.recipe_base import Lora, Optimizer, Section, key

SENDERS = ("policy", "reference")  # whose weights go to the engines: the policy's after every step, both for the evaluation
COMPARING = ("grpo", "dr_grpo", "rloo", "reinforce++_baseline")  # answers to one prompt; advantages.GROUPED holds their formulas


class Group(Section):
    """One role of the actor graph: its own placement group of `workers` actors."""

    workers: int = key(1, "Actors of this group; they form one process group (for rollout: independent engines).", unit="actors", ge=1)
    cpus: float = key(1, "CPU cores of each actor, as Ray schedules them.", unit="cores", ge=0)
    gpus: float = key(0, "GPUs of each actor, all on one node; a fraction shares one.", unit="GPUs", ge=0)
    nodes: int | None = key(
        None, "Spread the actors over so many nodes, equally many on each. Default: as few nodes as hold them.", unit="nodes", ge=1
    )
    threads: int = key(1, "Compute threads of each actor.", unit="threads", ge=1)

    @property
    def demand(self) -> Demand:
        """What the role asks of the cluster."""
        return Demand(self.workers, self.cpus, self.gpus, self.nodes)

    @model_validator(mode="after")
    def actors_fit_their_nodes(self) -> "Group":
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"gpus = {self.gpus:g}: an actor has a part of one GPU, or whole ones")
        if self.nodes is not None and self.workers % self.nodes:
            raise ValueError(f"nodes = {self.nodes} must divide workers = {self.workers}")
        return self


class Engines(Group):
    """The rollout role: each of its `workers` actors is one engine."""

    tensor_parallel: int = key(
        1,
        "GPUs of each engine (without GPUs: processes of `threads` threads each) over which its matrices are split.",
        unit="GPUs",
        ge=1,
        source="arXiv:1909.08053",
    )

    @model_validator(mode="after")
    def an_engine_uses_its_gpus(self) -> "Engines":
        if self.gpus and self.tensor_parallel != max(1, self.gpus):
            parts = f"tensor_parallel = {self.tensor_parallel}"
            raise ValueError(f"gpus = {self.gpus:g} must equal {parts}: every GPU of an engine holds a part of it")
        return self


class Groups(Section):
    policy: Group = key(Group(), "The model that learns.")
    reference: Group = key(Group(), "The frozen model that KL is measured against, where `ppo.kl_coef` gives it a weight.")
    reward: Group = key(Group(), "The reward model.")
    critic: Group = key(Group(), "The value model, with `ppo.advantage: gae`.")
    rollout: Engines = key(Engines(), "vLLM engines that write the responses.")


class PolicyAdapter(Lora):
    method: Literal["none", "lora"] = key(
        "none",
        "`lora` trains an adapter of the SFT model. The engines are sent the adapter alone; ppo/adapter keeps it for peft, ppo/model "
        "has it merged.",
        source="arXiv:2106.09685",
    )

    @property
    def dropout(self) -> float:
        """None: the same weights have to give the same log-probabilities."""
        return 0.0


class Ppo(Optimizer):
    preset: Literal["trl", "verl", "openrlhf"] | None = key(
        None, "Defaults of this section as another library has them; a key that is given as well counts more.", values=told()
    )
    micro_batch: int = key(
        4096, "Tokens of one forward and backward pass of one worker; samples are packed up to it without padding.", unit="tokens", ge=16
    )
    adapter: PolicyAdapter = key(PolicyAdapter(), "Let few parameters of the policy learn instead of all.")
    groups: Groups = key(Groups(), "The actors, CPUs and GPUs of each role.")
    colocate: list[Annotated[list[Literal["policy", "reference", "reward", "critic", "rollout"]], Field(min_length=2)]] = key(
        [],
        "Roles that share their GPUs (or cores) and work in turn, as [[policy, reference], [rollout, reward]]; who waits keeps its "
        "weights in host memory. Roles of a set take equally many GPUs. Default: each role has its own.",
    )
    steps: int = key(40, "PPO steps: one rollout and `epochs` passes over it each.", unit="steps", ge=1)
    rollout_batch: int = key(64, "Prompts answered per step.", unit="prompts", ge=1)
    samples_per_prompt: int = key(1, "Answers to each of these prompts: a group.", unit="samples", ge=1)
    global_batch: int = key(32, "Samples per optimizer step.", unit="samples", ge=1)
    epochs: int = key(2, "Passes over each rollout.", unit="epochs", ge=1)
    max_prompt_tokens: int = key(64, "Longer prompts are dropped, and counted.", unit="tokens", ge=1)
    max_response_tokens: int = key(32, "Responses are cut off here.", unit="tokens", ge=1)
    temperature: float = key(1.0, "Sampling temperature; log-probabilities are those of this distribution.", gt=0)
    learning_rate: float = key(1e-5, "Peak learning rate of the policy.", unit="per step", gt=0)
    critic_learning_rate: float = key(1e-4, "Peak learning rate of the critic.", unit="per step", gt=0)
    weight_decay: float = key(0.0, "Decoupled weight decay; norms and biases are spared.", ge=0, source="arXiv:1711.05101")
    compile: Literal["auto"] | bool = key(  # type: ignore[assignment]  # decided before a learner sees it
        "auto",
        "Compile each block of all four models with torch.compile: faster steps after a first one that takes a minute. CPUs need g++. "
        "`auto`: when the run is long enough to win more than that minute.",
    )

    # rewards
    reward_function: str | None = key(
        None,
        "Judges the answers in the place of a reward model: `exact_match`, or a function of yours as FILE.py:FUNCTION (see "
        "rlhf/rewards.py). May take half of `cluster.deadline_s`. There is no stage reward then, and a critic starts from the SFT model.",
        source="arXiv:2411.15124, arXiv:2501.12948",
    )
    validate_every: int | None = key(
        None,
        "Steps between two looks at the held-out prompts (`evaluate.prompts` of them): the curve `ppo/held_out_reward`. Default: none.",
        unit="steps",
        ge=1,
    )
    kl_coef: float = key(
        0.05,
        "Weight of the distance between policy and reference, log pi - log pi_ref per token; `kl_in` says where it counts. "
        "0: no reference is opened, and only `evaluate` measures the distance.",
        unit="reward per nat",
        ge=0,
        source="arXiv:1909.08593, arXiv:2203.02155",
    )
    kl_in: Literal["reward", "loss"] = key(
        "reward",
        "Subtracted from every token's reward, or a term of the policy's loss with a gradient of its own.",
        source="arXiv:2402.03300",
    )
    kl_estimator: Literal["k1", "k2", "k3"] = key(
        "k1",
        "With d = log pi - log pi_ref: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. Default in the loss: k3.",
        source="Schulman 2020, joschu.net/blog/kl-approx.html",
    )
    kl_target: float | None = key(
        None,
        "`kl_coef` is where the weight starts; every step moves it so that answers stay this far from the reference. Default: it stays.",
        unit="nats per response",
        gt=0,
        source="arXiv:1909.08593, section 2.2",
    )
    kl_horizon: int = key(10_000, "Samples in which the weight may grow or shrink by 20 %. With `kl_target`.", unit="samples", ge=1)
    normalize_rewards: bool = key(
        False, "Scores get mean 0 and variance 1 over all rollouts so far, before penalties and `reward_clip`.", source="arXiv:2005.12729"
    )
    uncertainty_coef: float = key(
        0.0,
        "Weight of the standard deviation over the reward model's heads, taken from every score. With `reward.heads`.",
        ge=0,
        source="arXiv:2310.02743, with the variance there",
    )
    reward_clip: float = key(10.0, "Scores are clipped to +- this; .inf does not.", gt=0)
    unfinished_penalty: float = key(
        0.0,
        "Taken from the score of a response that was cut off at `max_response_tokens`.",
        unit="reward",
        ge=0,
        source="TRL, missing_eos_penalty",
    )
    overlong_buffer: int = key(
        0, "Over the last so many of `max_response_tokens` a penalty grows from 0.", unit="tokens", ge=0, source="arXiv:2503.14476, 3.4"
    )
    overlong_penalty: float = key(1.0, "What it has grown to at the end. With `overlong_buffer`.", unit="reward", gt=0)

    # advantages
    advantage: Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline", "remax"] = key(
        "gae",
        "What a token was worth. `gae` asks a critic. `grpo`, `dr_grpo`, `rloo` and `reinforce++_baseline` compare the answers to one "
        "prompt with each other, `remax` with the greedy answer, `reinforce++` with the whole rollout: these need no critic.",
        source="arXiv:1506.02438; arXiv:2402.03300; arXiv:2503.20783; arXiv:2402.14740; arXiv:2501.03262; arXiv:2310.10505",
    )
    gamma: float = key(1.0, "Discount of rewards per token. With `gae` and `reinforce++`.", ge=0, le=1, source="arXiv:1506.02438")
    lam: float = key(0.95, "Lambda of generalised advantage estimation.", ge=0, le=1, source="arXiv:1506.02438")
    whiten_advantages: bool = key(
        True,
        "Advantages get mean 0 and variance 1 over all response tokens of the rollout. "
        "Default: with `gae` and both `reinforce++`, the others compare already.",
    )
    unbiased_whitening: bool = key(False, "The variance is divided by the number of tokens less one.")
    drop_equal_groups: bool = key(
        False,
        "Groups whose answers are all worth the same do not count; further prompts take their place (`refills`).",
        source="arXiv:2503.14476, 3.2",
    )
    refills: int = key(
        3,
        "How many times a step asks further prompts in the place of dropped groups. With `drop_equal_groups`.",
        unit="times",
        ge=0,
        source="arXiv:2503.14476, 3.2",
    )
    mask_unfinished: bool = key(
        False,
        "Responses that were cut off count in their group's mean but not in the loss.",
        source="arXiv:2503.14476, 3.4",
    )

    # losses
    policy_loss: Literal["clip", "dual_clip", "gspo", "cispo", "sapo"] = key(
        "clip",
        "`dual_clip` also bounds the loss of bad tokens, `gspo` clips whole answers (with ranges as 3e-4), `cispo` clips the weight of a "
        "token but never its gradient, `sapo` fades instead of clipping.",
        source="arXiv:1707.06347; arXiv:1912.09729; arXiv:2507.18071; arXiv:2506.13585; arXiv:2511.20347",
    )
    clip_range: float = key(0.2, "Policy ratios are clipped to 1 +- this.", gt=0, source="arXiv:1707.06347")
    clip_range_low: float | None = key(None, "Downwards, instead of `clip_range`.", gt=0, source="arXiv:2503.14476, 3.1")
    clip_range_high: float | None = key(None, "Upwards, instead of `clip_range`; 0.28 is usual.", gt=0, source="arXiv:2503.14476, 3.1")
    dual_clip_bound: float = key(
        3.0, "Bound of the ratio of tokens with a negative advantage. With `dual_clip`.", gt=1, source="arXiv:1912.09729"
    )
    sapo_temperatures: tuple[float, float] = key(
        (1.0, 1.05), "How fast tokens with positive and with other advantages fade. With `sapo`.", source="arXiv:2511.20347"
    )
    aggregation: Literal["token_mean", "sequence_mean", "dr_grpo"] = key(
        "token_mean",
        "Every token counts the same, every answer counts the same, or an answer's sum is divided by `max_response_tokens`.",
        source="arXiv:2503.14476; arXiv:2402.03300; arXiv:2503.20783",
    )
    value_clip_range: float = key(0.5, "New values are clipped to the old ones +- this.", gt=0, source="arXiv:1707.06347")
    entropy_coef: float = key(
        0.0, "Weight of the policy's entropy, as a bonus.", unit="reward per nat", ge=0, source="arXiv:1707.06347, eq. 9"
    )
    importance: Literal["none", "truncated", "icepop"] = key(
        "none",
        "A token counts by pi_policy / pi_engine, if the engine does not sample quite what the policy says: at most `importance_cap`, "
        "or not at all outside `importance_floor`...`importance_cap`.",
        source="fengyao.notion.site/off-policy-rl; arXiv:2510.18855",
    )
    importance_cap: float = key(2.0, "Upper end of that ratio; `icepop` was published with 5.", ge=1)
    importance_floor: float = key(0.5, "Lower end of that ratio. With `icepop`.", ge=0, le=1)

    weight_sync: Literal["auto", "object_store", "gloo", "nccl", "ipc"] = key(
        "auto",
        "How the policy's weights reach the engines: Ray's object store, a broadcast between nodes (`gloo`; `nccl` between GPUs), or CUDA "
        "IPC for an engine on its policy's GPU. `auto`: object_store where they take turns (`colocate`), else nccl between GPUs, else "
        "object_store on one node and gloo on several.",
    )
    log_prob_gap_limit: float | None = key(
        None,
        "Engine and policy may disagree by so much after a weight sync; beyond it weights are sent once more, then the run stops. "
        "Default: 1e-3 in fp32, 0.2 in bf16.",
        unit="nats",
    )
    checkpoint_every: int = key(10, "Steps between two checkpoints.", unit="steps", ge=1)

    @model_validator(mode="after")
    def sets_share_equal_amounts(self) -> "Ppo":
        named = [role for names in self.colocate for role in names]
        if twice := {role for role in named if named.count(role) > 1}:
            raise ValueError(f"colocate names {', '.join(sorted(twice))} twice: a role is in one place")
        for names in self.colocate:
            why = disagreement({role: getattr(self.groups, role).demand for role in names})
            if why:
                raise ValueError(f"colocate: {why}")
        return self

    @model_validator(mode="before")
    @classmethod
    def defaults_of_the_preset(cls, values: Any) -> Any:
        return filled(values) if isinstance(values, dict) else values

    @property
    def engines_take_turns(self) -> bool:
        """Whether the engines are on the devices of those that send them weights, so that one of them sleeps while the other works."""
        return any("rollout" in names and set(SENDERS) & set(names) for names in self.colocate)

    @property
    def sync_between_gpus(self) -> bool:
        """Whether engines and those that send them weights all have whole GPUs of their own."""
        groups = (self.groups.rollout, *(getattr(self.groups, role) for role in SENDERS))
        return all(group.gpus >= 1 for group in groups) and not self.engines_take_turns

    @property
    def prompts_at_once(self) -> int:
        """Prompts per optimizer step: all answers to one learn together."""
        return self.global_batch // self.samples_per_prompt

    @property
    def one_pass(self) -> bool:
        """Whether nobody asks the policy for log-probabilities before it learns: an optimizer step holds the whole rollout, so the old ones
        are those of the first pass that learns. A KL in the rewards is then that of the engine, which wrote the answers."""
        return self.global_batch >= self.samples and self.importance == "none"

    @property
    def spare_prompts(self) -> int:
        """Prompts of a step that may take the place of dropped ones."""
        return self.refills * self.rollout_batch if self.drop_equal_groups else 0

    @property
    def samples(self) -> int:
        """Samples of one rollout."""
        return self.rollout_batch * self.samples_per_prompt

    @property
    def needs_critic(self) -> bool:
        return self.advantage == "gae"

    @property
    def needs_reference(self) -> bool:
        """Whether anything depends on the reference; `evaluate` measures the distance from it in any case."""
        return self.kl_coef > 0

    @property
    def clip_ranges(self) -> tuple[float, float]:
        """Downwards and upwards."""
        low, high = self.clip_range_low, self.clip_range_high
        return self.clip_range if low is None else low, self.clip_range if high is None else high


def filled(values: dict[str, Any]) -> dict[str, Any]:
    """The section as given, with what its preset and its other keys say of keys that are not."""
    name = values.get("preset")
    given = {**PRESETS.get(name, {}), **values} if isinstance(name, str) else values
    whitens = given.get("advantage", "gae") in ("gae", "reinforce++", "reinforce++_baseline")
    return {"whiten_advantages": whitens, "kl_estimator": "k3" if given.get("kl_in") == "loss" else "k1", **given}


def idle(values: dict[str, Any]) -> dict[tuple[str, ...], str]:
    """The keys of the section that are never read, because of another key: path -> why."""
    ppo = {**{name: field.default for name, field in Ppo.model_fields.items()}, **filled(values)}
    advantage, loss = ppo["advantage"], ppo["policy_loss"]
    found: dict[tuple[str, ...], str] = {}
    if advantage != "gae":
        critic = [("groups", "critic"), ("critic_learning_rate",), ("value_clip_range",), ("lam",)]
        found |= dict.fromkeys(critic, f"ppo.advantage = {advantage} has no critic")
    if advantage not in ("gae", "reinforce++"):
        found["gamma",] = f"ppo.advantage = {advantage} does not discount"
    if not ppo["kl_coef"]:
        found |= dict.fromkeys([("kl_target",), ("kl_in",), ("kl_estimator",)], "ppo.kl_coef = 0 opens no reference")
    if not ppo["whiten_advantages"]:
        found["unbiased_whitening",] = "ppo.whiten_advantages is off"
    if not ppo["overlong_buffer"]:
        found["overlong_penalty",] = "ppo.overlong_buffer = 0 knows no overlong response"
    if loss == "sapo":
        found |= dict.fromkeys([("clip_range",), ("clip_range_low",), ("clip_range_high",)], "ppo.policy_loss = sapo clips nothing")
    elif ppo["clip_range_low"] is not None and ppo["clip_range_high"] is not None:
        found["clip_range",] = "ppo.clip_range_low and ppo.clip_range_high take its place"
    if not ppo["drop_equal_groups"]:
        found["refills",] = "ppo.drop_equal_groups is off"
    for name, of in (("sapo_temperatures", "sapo"), ("dual_clip_bound", "dual_clip")):
        if loss != of:
            found[name,] = f"ppo.policy_loss = {loss} does not read it"
    if ppo["importance"] == "none":
        found["importance_cap",] = "ppo.importance is none"
    if ppo["importance"] != "icepop":
        found["importance_floor",] = f"ppo.importance = {ppo['importance']} does not read it"
    return found


def disagreements(ppo: Ppo) -> list[str]:
    """What cannot be together, one sentence each, which starts with the key to change."""
    wrong, samples = [], f"ppo.rollout_batch = {ppo.rollout_batch}"
    if ppo.samples_per_prompt > 1:
        samples += f" x ppo.samples_per_prompt = {ppo.samples_per_prompt}"
    if ppo.kl_horizon < ppo.samples:
        wrong.append(f"ppo.kl_horizon = {ppo.kl_horizon} is smaller than {samples}")
    if ppo.global_batch % ppo.samples_per_prompt:
        wrong.append(f"ppo.global_batch = {ppo.global_batch} is no multiple of ppo.samples_per_prompt = {ppo.samples_per_prompt}")
    if ppo.global_batch > ppo.samples:
        wrong.append(f"ppo.global_batch = {ppo.global_batch} is larger than {samples}")
    if ppo.samples_per_prompt == 1 and (ppo.advantage in COMPARING or ppo.drop_equal_groups):
        asks = f"ppo.advantage = {ppo.advantage}" if ppo.advantage in COMPARING else "ppo.drop_equal_groups"
        wrong.append(f"ppo.samples_per_prompt = 1 leaves {asks} nothing to compare: 4 to 16 are usual")
    if ppo.kl_in == "loss" and ppo.kl_estimator == "k1" and ppo.kl_coef:
        wrong.append("ppo.kl_estimator = k1 pulls nowhere as a loss (the mean of its gradient is 0, arXiv:2506.09477): use k2 or k3")
    if ppo.weight_sync in ("gloo", "nccl") and ppo.engines_take_turns:
        at_once = f"ppo.weight_sync = {ppo.weight_sync} sends and receives at once"
        wrong.append(f"{at_once}, but ppo.colocate lets rollout take turns with those that send: auto takes object_store")
    elif ppo.weight_sync == "nccl" and not ppo.sync_between_gpus:
        wrong.append("ppo.weight_sync = nccl needs whole GPUs in ppo.groups.policy, ppo.groups.reference and ppo.groups.rollout")
    elif ppo.weight_sync == "ipc" and not (ppo.groups.rollout.gpus and any({"rollout", *SENDERS} <= set(names) for names in ppo.colocate)):
        wrong.append("ppo.weight_sync = ipc reads the same GPU's memory: policy, reference and rollout have to share GPUs (ppo.colocate)")
    if ppo.overlong_buffer > ppo.max_response_tokens:
        wrong.append(f"ppo.overlong_buffer = {ppo.overlong_buffer} is larger than ppo.max_response_tokens = {ppo.max_response_tokens}")
    return wrong
