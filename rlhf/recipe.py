"""The recipe: every knob of a run, its default, its limits, its meaning.

    roundhouse explain ppo.kl_coef          # what the last column below says
    roundhouse run recipes/quickstart.yaml ppo.kl_coef=0.05

This file is only the schema. Reading YAML, overrides and error messages are in `recipe_file.py`.
A field is written as `key(default, meaning, unit=..., source=..., <pydantic constraint>)`.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.plan import Demand, disagreement
from rlhf.model_sizes import PRESETS


def key(default: Any, meaning: str, *, unit: str = "", source: str = "", **limits: Any) -> Any:
    """A recipe field: its default (`...` = required), what it means, its unit and where it comes from."""
    return Field(default, description=meaning, json_schema_extra={"unit": unit, "source": source}, **limits)


HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)  # that vLLM's attention has kernels for, on CPUs too


class Section(BaseModel):
    """Unknown keys are errors; nothing changes after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


Source = Annotated[str, Field(pattern=r"\S")]


class Cluster(Section):
    address: str = key(
        "local",
        "Where Ray runs: `local` starts one here, `auto` or `ray://...` joins one. Inside a Ray job, `local` joins the job's cluster.",
    )
    workers: int = key(2, "Ray Train workers of pretrain, sft and reward.", unit="processes", ge=1)
    gpus_per_worker: float = key(0, "GPUs of each training worker; 0 trains on the CPU.", unit="GPUs", ge=0)
    threads_per_worker: int = key(
        1,
        "CPU cores, and compute threads, of each training worker. More threads than cores run 10-100 times slower.",
        unit="threads",
        ge=1,
    )
    placement_timeout_s: float = key(30, "How long to wait for CPUs or GPUs before the error that lists who wants what.", unit="s", gt=0)
    deadline_s: float = key(600, "How long any single call to an actor may take before the run stops and names it.", unit="s", gt=0)
    ports: tuple[int, int] = key(
        (20000, 30000),
        "First and last port that the groups of the actor graph may listen on (for clusters behind a firewall).",
        unit="port",
    )
    max_failures: int = key(2, "How often Ray Train restarts a training stage whose worker died.", unit="restarts", ge=0)

    @model_validator(mode="after")
    def ports_ascend(self) -> "Cluster":
        if not 1024 <= self.ports[0] <= self.ports[1] <= 65535:
            raise ValueError(f"ports must be two ascending numbers within 1024..65535, got {list(self.ports)}")
        return self


class Data(Section):
    pretrain: list[Source] = key(
        ...,
        "Texts to pretrain on: `name:text` of the catalogue (`roundhouse data list`), or paths and globs of .txt / .jsonl files.",
        min_length=1,
    )
    sft: list[Source] = key(
        ..., "Conversations to fine-tune on: `name:chat`, or .jsonl files of {messages: [{role, content}]}.", min_length=1
    )
    preferences: list[Source] = key(
        ...,
        "Human rankings: `name:preferences`, or .jsonl files of {messages, chosen, rejected} or {messages, ranked: [best, ...]}.",
        min_length=1,
    )
    prompts: list[Source] = key(..., "What PPO answers: `name:prompts`, or .jsonl files of {messages}.", min_length=1)
    cache_dir: str = key("~/.cache/roundhouse", "Where fetched corpora and rank files are kept.", unit="path")
    validation_fraction: float = key(0.03, "Share of documents held out, chosen by the hash of their text.", unit="fraction", gt=0, lt=0.5)
    max_broken_fraction: float = key(
        0.01, "Unreadable files and lines are skipped, counted and listed; above this share the run stops.", unit="fraction", ge=0, le=1
    )
    shard_tokens: int = key(10_000_000, "Tokens in one shard file.", unit="tokens", ge=1024)


class Tokenizer(Section):
    encoding: Literal["train", "gpt2", "r50k_base", "p50k_base", "cl100k_base", "o200k_base", "model"] = key(
        "train",
        "`train` learns a BPE on the pretraining and sft texts; a name takes that tiktoken encoding; `model` takes `model.init`'s.",
        source="https://github.com/openai/tiktoken",
    )
    extend: str | None = key(
        None,
        'With `model`: a .jsonl file of {"piece": "..."}, words to become tokens of their own. Their rows start as means of the old ones.',
        unit="path",
    )
    vocab_size: int = key(4096, "Size of a trained vocabulary, special tokens included.", unit="tokens", ge=300)


class Model(Section):
    preset: Literal["4m", "10m", "30m", "135m", "360m", "1b", "1.7b", "3b", "8b", "70b"] | None = key(
        None,
        "Sizes of a new model by its parameters; a size that is given as well counts more.",
        source="arXiv:2502.02737, arXiv:2407.21783",
    )
    init: str | None = key(None, "A transformers causal LM directory to start from; otherwise a new Llama of the sizes below.", unit="path")
    hidden_size: int = key(256, "Width of the residual stream.", unit="features", ge=8)
    layers: int = key(4, "Transformer blocks.", unit="blocks", ge=1)
    heads: int = key(4, "Attention heads.", unit="heads", ge=1)
    kv_heads: int = key(4, "Key/value heads (fewer than heads: grouped-query attention).", unit="heads", ge=1, source="arXiv:2305.13245")
    intermediate_size: int = key(688, "Width of the SwiGLU layer.", unit="features", ge=8, source="arXiv:2002.05202")
    max_positions: int = key(512, "Longest sequence the model is made for.", unit="tokens", ge=16)
    rope_theta: float = key(10_000.0, "Base of the rotary embedding.", gt=0, source="arXiv:2104.09864")
    tie_embeddings: bool = key(True, "The output layer shares the embedding matrix.", source="arXiv:1608.05859")

    @model_validator(mode="before")
    @classmethod
    def sizes_of_the_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(name := values.get("preset"), str):
            return values
        return {**PRESETS.get(name, {}), **values}

    @model_validator(mode="after")
    def heads_divide(self) -> "Model":
        if self.hidden_size % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                f"heads ({self.heads}) must divide hidden_size ({self.hidden_size}) and kv_heads ({self.kv_heads}) must divide heads"
            )
        if (self.hidden_size // self.heads) % 2:
            raise ValueError(f"hidden_size / heads must be even for rotary embeddings, got {self.hidden_size // self.heads}")
        return self


class Optimizer(Section):
    """Fields shared by everything that trains."""

    optimizer: Literal["adamw", "muon"] = key(
        "adamw",
        "`muon` moves the matrices of the blocks by Muon, all else by AdamW; the same rates fit both.",
        source="arXiv:1711.05101; arXiv:2502.16982",
    )
    learning_rate: float = key(1e-4, "Peak learning rate.", unit="per step", gt=0)
    schedule: Literal["cosine", "linear", "wsd"] = key(
        "cosine",
        "How the rate falls from its peak; `wsd` keeps it and falls linearly over the last `decay_fraction` of the steps.",
        source="arXiv:1608.03983; wsd: arXiv:2404.06395",
    )
    decay_fraction: float = key(0.2, "Share of the steps over which `wsd` falls.", unit="fraction", gt=0, le=1)
    warmup_fraction: float = key(0.05, "Share of the steps that ramp the rate up linearly from 0.", unit="fraction", ge=0, le=1)
    final_lr_fraction: float = key(
        0.1,
        "Rate at the end of the schedule, relative to the peak; 1 keeps it constant.",
        unit="fraction",
        ge=0,
        le=1,
        source="arXiv:1608.03983",
    )
    betas: tuple[float, float] = key((0.9, 0.95), "Decay rates of Adam's first and second moment.", source="arXiv:1711.05101")
    weight_decay: float = key(0.1, "Decoupled weight decay; norms and biases are spared.", ge=0, source="arXiv:1711.05101")
    max_grad_norm: float = key(1.0, "Gradients are scaled down to this global norm.", unit="L2 norm", gt=0, source="arXiv:1211.5063")
    activation_checkpointing: Literal["none", "selective", "full"] = key(
        "none",
        "Less memory for more work: `full` computes each block twice, `selective` all of it but matmuls and attention.",
        source="arXiv:1604.06174; arXiv:2205.05198",
    )
    compile: bool = key(False, "Compile each block with torch.compile: faster steps after a first one that takes a minute. CPUs need g++.")


class Training(Optimizer):
    micro_batch: Annotated[int, Field(ge=16)] | Literal["auto"] = key(
        4096,
        "Tokens of one forward and backward pass of one worker; samples are packed up to it without padding. `auto`: what memory allows.",
        unit="tokens",
    )
    global_batch: int = key(32, "Samples per optimizer step, over all workers.", unit="samples", ge=1)
    validate_every: int = key(50, "Steps between two validations.", unit="steps", ge=1)
    checkpoint_every: int = key(50, "Steps between two checkpoints.", unit="steps", ge=1)


class Pretrain(Training):
    steps: int = key(400, "Optimizer steps; 0 takes the model of `model.init` as it is.", unit="steps", ge=0)
    embeddings_only_steps: int = key(
        0, "For so many steps only the embeddings (and the output layer) learn, so that new tokens find their place.", unit="steps", ge=0
    )
    sequence_length: int = key(256, "Tokens of one window of the token stream; documents in it never see each other.", unit="tokens", ge=16)
    global_batch: int = key(8, "Windows per optimizer step, over all workers.", unit="windows", ge=1)
    learning_rate: float = key(3e-3, "Peak learning rate.", unit="per step", gt=0)


class Adapter(Section):
    method: Literal["none", "lora", "qlora"] = key(
        "none",
        "`lora` trains two thin matrices beside each targeted one and merges them at the end; sft/adapter keeps them for peft. "
        "`qlora` keeps the model's own matrices in 4 bits meanwhile.",
        source="arXiv:2106.09685; arXiv:2305.14314",
    )
    rank: int = key(8, "Width of the thin matrices.", ge=1)
    alpha: float = key(16.0, "The thin matrices' product is multiplied by alpha / rank.", gt=0)
    dropout: float = key(0.0, "Share of the adapter's inputs that are zeroed while training.", unit="fraction", ge=0, lt=1)
    targets: Literal["all-linear"] | list[Source] = key("all-linear", "Names of the layers that get an adapter, as [q_proj, v_proj].")


class Distill(Section):
    teacher: str | None = key(
        None, "Model directory to learn from, with the student's vocabulary. Default: learn from the data alone.", unit="path"
    )
    divergence: Literal["forward", "reverse", "js"] = key(
        "forward", "KL(teacher, student), KL(student, teacher), or the generalised Jensen-Shannon one between.", source="arXiv:2306.13649"
    )
    beta: float = key(0.5, "With `js`: the teacher's share of the mixture.", unit="fraction", gt=0, lt=1, source="arXiv:2306.13649")
    temperature: float = key(1.0, "Both distributions are compared at this temperature.", gt=0, source="arXiv:1503.02531")
    hard_weight: float = key(0.0, "Share of the plain cross-entropy in the loss.", unit="fraction", ge=0, le=1)


class Sft(Training):
    distill: Distill = key(Distill(), "Learn the distribution of a larger model instead of single tokens.")
    adapter: Adapter = key(Adapter(), "Fine-tune few parameters instead of all.")
    neftune_alpha: float = key(0.0, "Noise on the embeddings while training; 5 is usual, 0 is none.", ge=0, source="arXiv:2310.05914")
    epochs: float = key(2, "Passes over the conversations.", unit="epochs", gt=0)
    global_batch: int = key(32, "Conversations per optimizer step, over all workers.", unit="conversations", ge=1)
    max_tokens: int = key(256, "Longer conversations are cut to the most whole turns that fit.", unit="tokens", ge=8)
    learning_rate: float = key(1e-3, "Peak learning rate.", unit="per step", gt=0)


class Reward(Training):
    epochs: float = key(1, "Passes over the rankings.", unit="epochs", gt=0)
    global_batch: int = key(32, "Rankings per optimizer step, over all workers; a pair is a ranking of two.", unit="rankings", ge=1)
    max_tokens: int = key(256, "Longer prompt + answer are dropped, and counted.", unit="tokens", ge=8)
    learning_rate: float = key(5e-4, "Peak learning rate.", unit="per step", gt=0)
    margin_coef: float = key(
        0.0,
        "The better answer should lead by this times the difference of scores that the data gives (without scores: 1 per rank).",
        unit="reward per score",
        ge=0,
        source="arXiv:2307.09288, eq. 2",
    )
    center_coef: float = key(
        0.0, "Weight of (sum of a pair's two rewards) squared: keeps rewards near zero.", ge=0, source="arXiv:2312.09244"
    )


class Preference(Training):
    method: Literal["dpo", "ipo", "simpo", "kto"] = key(
        "dpo",
        "Which loss. `simpo` needs no reference; `kto` looks at answers one by one.",
        source="arXiv:2305.18290; arXiv:2310.12036; arXiv:2405.14734; arXiv:2402.01306",
    )
    beta: float = key(
        0.1,
        "Larger: closer to the SFT model. With `simpo` a temperature, 2 is usual.",
        unit="1 / nat",
        gt=0,
        source="arXiv:2305.18290",
    )
    simpo_margin: float = key(1.0, "The better answer should lead by this. With `simpo`.", ge=0, source="arXiv:2405.14734, gamma in eq. 6")
    desirable_weight: float = key(1.0, "Weight of desirable answers. With `kto`.", ge=0, source="arXiv:2402.01306, lambda_D")
    undesirable_weight: float = key(1.0, "Weight of undesirable answers. With `kto`.", ge=0, source="arXiv:2402.01306, lambda_U")
    epochs: float = key(1, "Passes over the rankings.", unit="epochs", gt=0)
    global_batch: int = key(32, "Rankings per optimizer step, over all workers; a pair is a ranking of two.", unit="rankings", ge=1)
    learning_rate: float = key(1e-6, "Peak learning rate.", unit="per step", gt=0)
    weight_decay: float = key(0.0, "Decoupled weight decay; norms and biases are spared.", ge=0, source="arXiv:1711.05101")


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
    reference: Group = key(Group(), "The frozen model that KL is measured against.")
    reward: Group = key(Group(), "The reward model.")
    critic: Group = key(Group(), "The value model.")
    rollout: Engines = key(Engines(), "vLLM engines that write the responses.")


class Ppo(Optimizer):
    micro_batch: int = key(
        4096, "Tokens of one forward and backward pass of one worker; samples are packed up to it without padding.", unit="tokens", ge=16
    )
    groups: Groups = key(Groups(), "The actors, CPUs and GPUs of each role.")
    colocate: list[Annotated[list[Literal["policy", "reference", "reward", "critic", "rollout"]], Field(min_length=2)]] = key(
        [],
        "Roles that share their GPUs (or cores) and work in turn, as [[policy, reference], [rollout, reward]]; who waits keeps its "
        "weights in host memory. Roles of a set take equally many GPUs. Default: each role has its own.",
    )
    steps: int = key(40, "PPO steps: one rollout and `epochs` passes over it each.", unit="steps", ge=1)
    rollout_batch: int = key(64, "Prompts answered per step.", unit="prompts", ge=1)
    global_batch: int = key(32, "Samples per optimizer step.", unit="samples", ge=1)
    epochs: int = key(2, "Passes over each rollout.", unit="epochs", ge=1)
    max_prompt_tokens: int = key(64, "Longer prompts are dropped, and counted.", unit="tokens", ge=1)
    max_response_tokens: int = key(32, "Responses are cut off here.", unit="tokens", ge=1)
    temperature: float = key(1.0, "Sampling temperature; log-probabilities are those of this distribution.", gt=0)
    learning_rate: float = key(1e-5, "Peak learning rate of the policy.", unit="per step", gt=0)
    critic_learning_rate: float = key(1e-4, "Peak learning rate of the critic.", unit="per step", gt=0)
    weight_decay: float = key(0.0, "Decoupled weight decay; norms and biases are spared.", ge=0, source="arXiv:1711.05101")
    kl_coef: float = key(
        0.05,
        "Weight of the penalty -kl_coef * (log pi_old - log pi_ref) added to every token's reward.",
        unit="reward per nat",
        ge=0,
        source="arXiv:1909.08593, arXiv:2203.02155",
    )
    kl_target: float | None = key(
        None,
        "`kl_coef` is where the weight starts; every step moves it so that answers stay this far from the reference. Default: it stays.",
        unit="nats per response",
        gt=0,
        source="arXiv:1909.08593, section 2.2",
    )
    kl_horizon: int = key(10_000, "Samples in which the weight may grow or shrink by 20 %. With `kl_target`.", unit="samples", ge=1)
    gamma: float = key(1.0, "Discount of rewards per token.", ge=0, le=1, source="arXiv:1506.02438")
    lam: float = key(0.95, "Lambda of generalised advantage estimation.", ge=0, le=1, source="arXiv:1506.02438")
    clip_range: float = key(0.2, "Policy ratios are clipped to 1 +- this.", gt=0, source="arXiv:1707.06347")
    value_clip_range: float = key(0.5, "New values are clipped to the old ones +- this.", gt=0, source="arXiv:1707.06347")
    reward_clip: float = key(10.0, "Scores are clipped to +- this.", gt=0)
    unfinished_penalty: float = key(
        0.0,
        "Taken from the score of a response that was cut off at `max_response_tokens`.",
        unit="reward",
        ge=0,
        source="TRL, missing_eos_penalty",
    )
    whiten_advantages: bool = key(True, "Advantages get mean 0 and variance 1 over all response tokens of the rollout.")
    log_prob_gap_limit: float | None = key(
        None,
        "The run stops when engine and policy disagree by more than this after a weight sync. Default: 1e-3 in fp32, 0.2 in bf16.",
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


class Evaluate(Section):
    prompts: int = key(128, "Held-out prompts that both models answer.", unit="prompts", ge=2)
    scorer: Literal["afinn", "vader"] = key(
        "afinn",
        "Independent scorer of the answers; no stage trains on it.",
        source="AFINN: arXiv:1103.2903; VADER: Hutto & Gilbert, ICWSM 2014",
    )
    samples: int = key(10, "Answers shown side by side in the report.", unit="pairs", ge=0)


class Recipe(Section):
    name: str = key(..., "Name of the run: artefacts go to `runs_dir/name`.", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    runs_dir: str = key("runs", "Folder of all runs; on a cluster, one that every node sees.", unit="path")
    seed: int = key(0, "Seed of initial weights, sample order and sampling.", ge=0)
    deterministic: bool = key(
        False, "GPU kernels that give the same bits every time, some of them slower; CPUs do so anyway. Does not reach vLLM's sampling."
    )
    cluster: Cluster = key(Cluster(), "Machines, processes and deadlines.")
    data: Data = key(..., "What the run learns from.")
    tokenizer: Tokenizer = key(Tokenizer(), "How text becomes tokens.")
    model: Model = key(Model(), "The language model.")
    pretrain: Pretrain = key(Pretrain(), "Stage 2: learn to predict text.")
    sft: Sft = key(Sft(), "Stage 3: learn to answer.")
    reward: Reward = key(Reward(), "Stage 4: learn which answers people prefer.")
    align: Literal["ppo", "preference"] = key(
        "ppo",
        "Stage 5: `ppo` learns from the reward model's scores of its own answers, `preference` straight from the rankings. "
        "Either way stage 6 asks the reward model.",
    )
    ppo: Ppo = key(Ppo(), "Stage 5 with align = ppo: learn to give such answers. Its sampling and groups serve stage 6 too.")
    preference: Preference = key(Preference(), "Stage 5 with align = preference: dpo, ipo, simpo or kto.")
    evaluate: Evaluate = key(Evaluate(), "Stage 6: did it work?")

    @model_validator(mode="after")
    def sizes_agree(self) -> "Recipe":
        wrong = []
        limit = self.model.max_positions
        if self.model.init is None:
            if not self.pretrain.steps:
                wrong.append("pretrain.steps = 0 needs model.init, a model that has learned already")
            for name, length in {
                "pretrain.sequence_length": self.pretrain.sequence_length,
                "sft.max_tokens": self.sft.max_tokens,
                "reward.max_tokens": self.reward.max_tokens,
                "ppo.max_prompt_tokens + ppo.max_response_tokens": self.ppo.max_prompt_tokens + self.ppo.max_response_tokens,
            }.items():
                if length > limit:
                    wrong.append(f"{name} = {length} is longer than model.max_positions = {limit}")
            if (size := self.model.hidden_size // self.model.heads) not in HEAD_SIZES:
                wrong.append(f"model.hidden_size / model.heads = {size}: vLLM, which writes the rollouts, can only do {HEAD_SIZES}")
            if self.model.heads % (parts := self.ppo.groups.rollout.tensor_parallel):
                wrong.append(f"ppo.groups.rollout.tensor_parallel = {parts} must divide model.heads = {self.model.heads}")
            if self.tokenizer.encoding == "model":
                wrong.append("tokenizer.encoding = model needs model.init")
        if self.tokenizer.extend is not None and self.tokenizer.encoding != "model":
            wrong.append("tokenizer.extend needs tokenizer.encoding = model: a vocabulary of one's own learns its words from the texts")
        for name, length, budget in (
            ("pretrain.sequence_length", self.pretrain.sequence_length, self.pretrain.micro_batch),
            ("sft.max_tokens", self.sft.max_tokens, self.sft.micro_batch),
            ("reward.max_tokens x 2", 2 * self.reward.max_tokens, self.reward.micro_batch),
            ("reward.max_tokens x 2", 2 * self.reward.max_tokens, self.preference.micro_batch),
            (
                "ppo.max_prompt_tokens + ppo.max_response_tokens",
                self.ppo.max_prompt_tokens + self.ppo.max_response_tokens,
                self.ppo.micro_batch,
            ),
        ):
            if isinstance(budget, int) and length > budget:
                wrong.append(f"{name} = {length} does not fit into micro_batch = {budget} of that stage")
        if self.ppo.kl_horizon < self.ppo.rollout_batch:
            wrong.append(f"ppo.kl_horizon = {self.ppo.kl_horizon} is smaller than ppo.rollout_batch = {self.ppo.rollout_batch}")
        if self.ppo.global_batch > self.ppo.rollout_batch:
            wrong.append(f"ppo.global_batch = {self.ppo.global_batch} is larger than ppo.rollout_batch = {self.ppo.rollout_batch}")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self
