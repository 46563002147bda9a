"""The recipe: every knob of a run, its default, its limits, its meaning.

    roundhouse explain ppo.kl_coef          # what the last column below says
    roundhouse run recipes/quickstart.yaml ppo.kl_coef=0.05

This file, `recipe_data.py` and `recipe_ppo.py` are only the schema. Reading YAML, overrides and error messages are in `recipe_file.py`.
A field is written as `key(default, meaning, unit=..., source=..., <pydantic constraint>)`.
"""

from difflib import SequenceMatcher
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rlhf.model_sizes import PRESETS
from rlhf.recipe_base import Lora, Optimizer, Section, key
from rlhf.recipe_data import Data, Phase, Tokenizer
from rlhf.recipe_ppo import Ppo, disagreements

HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)  # that vLLM's attention has kernels for, on CPUs too


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


class Training(Optimizer):
    compile: Literal["auto"] | bool = key(  # type: ignore[assignment]  # decided before a learner sees it
        "auto",
        "Compile each block with torch.compile: faster steps after a first one that takes a minute. CPUs need g++. `auto`: when the stage "
        "is long enough to win more than that minute.",
    )
    micro_batch: Annotated[int, Field(ge=16)] | Literal["auto"] = key(
        4096,
        "Tokens of one forward and backward pass of one worker; samples are packed up to it without padding. `auto`: what memory allows.",
        unit="tokens",
    )
    global_batch: int = key(32, "Samples per optimizer step, over all workers.", unit="samples", ge=1)
    float8: bool = key(
        False,
        "Matmuls of the blocks in fp8, by torchao (pip install '.[fp8]'); GPUs of compute capability 8.9 and newer.",
        source="arXiv:2209.05433",
    )
    validate_every: int = key(50, "Steps between two validations.", unit="steps", ge=1)
    stop_at_val_loss: float | None = key(
        None,
        "Held-out loss at which the stage ends early, as soon as a validation finds it; the schedule stays that of all its steps.",
        unit="as the curve val_loss",
    )
    checkpoint_every: int = key(50, "Steps between two checkpoints.", unit="steps", ge=1)


class Pretrain(Training):
    steps: int = key(400, "Optimizer steps; 0 takes the model of `model.init` as it is.", unit="steps", ge=0)
    phases: list[Phase] | None = key(
        None,
        "Instead of `steps`: phases with mixtures of their own, each going on where the one before ended, under one schedule.",
        min_length=1,
    )
    mix_by: Literal["source", "category"] = key(
        "source", "What the phases' weights name: the sources, or the `category` of their rows; rows without one go by their source."
    )
    embeddings_only_steps: int = key(
        0, "For so many steps only the embeddings (and the output layer) learn, so that new tokens find their place.", unit="steps", ge=0
    )
    sequence_length: int = key(256, "Tokens of one window of the token stream; documents in it never see each other.", unit="tokens", ge=16)
    global_batch: int = key(8, "Windows per optimizer step, over all workers.", unit="windows", ge=1)
    learning_rate: float = key(3e-3, "Peak learning rate.", unit="per step", gt=0)

    @property
    def total_steps(self) -> int:
        return self.steps if self.phases is None else sum(phase.steps for phase in self.phases)

    @property
    def longest_window(self) -> tuple[str, int]:
        """Which key says so, and tokens."""
        lengths = [phase.sequence_length or 0 for phase in self.phases or []]
        if max(lengths, default=0) > self.sequence_length:
            return "pretrain.phases: sequence_length", max(lengths)
        return "pretrain.sequence_length", self.sequence_length


class Adapter(Lora):
    method: Literal["none", "lora", "qlora", "p_tuning_v2"] = key(
        "none",
        "`lora` trains two thin matrices beside each targeted one and merges them at the end; sft/adapter keeps them for peft. "
        "`qlora` keeps the model's own matrices in 4 bits meanwhile. `p_tuning_v2` trains keys and values that every layer sees before "
        "the text; they cannot be merged, so the run ends with sft/adapter.",
        source="arXiv:2106.09685; arXiv:2305.14314; arXiv:2110.07602",
    )
    virtual_tokens: int = key(
        16, "Keys and values of each layer that learn. With `p_tuning_v2`.", unit="tokens", ge=1, source="arXiv:2110.07602"
    )
    dropout: float = key(0.0, "Share of the adapter's inputs that are zeroed while training.", unit="fraction", ge=0, lt=1)

    @property
    def prefix(self) -> int:
        """Positions that stand before every text."""
        return self.virtual_tokens if self.method == "p_tuning_v2" else 0


class Teacher(Section):
    """What distillation on the data's tokens and on the model's own have in common."""

    teacher: str | None = key(
        None,
        "Model directory to learn from, with the student's vocabulary. Without one `sft` learns from the data alone; "
        "`align: distill` needs one.",
        unit="path",
    )
    divergence: Literal["forward", "reverse", "js"] = key(
        "forward", "KL(teacher, student), KL(student, teacher), or the generalised Jensen-Shannon one between.", source="arXiv:2306.13649"
    )
    beta: float = key(0.5, "With `js`: the teacher's share of the mixture.", unit="fraction", gt=0, lt=1, source="arXiv:2306.13649")
    temperature: float = key(1.0, "Both distributions are compared at this temperature.", gt=0, source="arXiv:1503.02531")


class Distill(Teacher):
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
    heads: int = key(
        1,
        "Heads on the one trunk, an ensemble: each starts elsewhere and sees its own resampling of the rankings. The reward is their mean.",
        unit="heads",
        ge=1,
        source="arXiv:1602.04621; arXiv:2310.02743",
    )
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


class OnPolicyDistill(Optimizer, Teacher):
    steps: int = key(40, "Steps: one rollout and `epochs` passes over it each.", unit="steps", ge=1)
    rollout_batch: int = key(64, "Samples per step: prompts answered, and the data's conversations.", unit="samples", ge=1)
    global_batch: int = key(32, "Samples per optimizer step.", unit="samples", ge=1)
    epochs: int = key(1, "Passes over each rollout.", unit="epochs", ge=1)
    micro_batch: int = key(
        4096, "Tokens of one forward and backward pass of one worker; samples are packed up to it without padding.", unit="tokens", ge=16
    )
    on_policy_fraction: float = key(
        1.0,
        "Share of a step's samples that the model writes itself; the others are conversations of `data.sft`.",
        unit="fraction",
        gt=0,
        le=1,
        source="arXiv:2306.13649, lambda",
    )
    divergence: Literal["forward", "reverse", "js"] = key(
        "reverse", "KL(teacher, student), KL(student, teacher), or the generalised Jensen-Shannon one between.", source="arXiv:2306.13649"
    )
    learning_rate: float = key(1e-5, "Peak learning rate.", unit="per step", gt=0)
    weight_decay: float = key(0.0, "Decoupled weight decay; norms and biases are spared.", ge=0, source="arXiv:1711.05101")
    checkpoint_every: int = key(10, "Steps between two checkpoints.", unit="steps", ge=1)


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
    reward: Reward = key(Reward(), "Stage 4: learn which answers people prefer. Not there with `ppo.reward_function`.")
    align: Literal["ppo", "preference", "distill"] = key(
        "ppo",
        "Stage 5: `ppo` learns from the reward model's scores of its own answers, `preference` straight from the rankings, `distill` "
        "from a teacher's distributions over its own answers. Each time stage 6 asks the reward model, or the reward function.",
    )
    ppo: Ppo = key(
        Ppo(), "Stage 5 with align = ppo: learn to give such answers. Its sampling and groups serve align = distill and stage 6 too."
    )
    preference: Preference = key(Preference(), "Stage 5 with align = preference: dpo, ipo, simpo or kto.")
    distill: OnPolicyDistill = key(
        OnPolicyDistill(),
        "Stage 5 with align = distill: learn the teacher's distributions over one's own answers. How they are sampled "
        "(`max_prompt_tokens`, `max_response_tokens`, `temperature`, `log_prob_gap_limit`) and where (`groups.policy`, `groups.rollout`) "
        "says `ppo`.",
        source="arXiv:2306.13649",
    )
    evaluate: Evaluate = key(Evaluate(), "Stage 6: did it work?")

    @property
    def has_reward_model(self) -> bool:
        """Whether answers are judged by a model that a stage of its own trains, and not by a reward function."""
        return self.ppo.reward_function is None

    @property
    def uses_rankings(self) -> bool:
        return self.has_reward_model or self.align == "preference"

    @property
    def lengths(self) -> dict[str, int]:
        """The longest texts that the model will see, by what says so, in tokens."""
        window, longest = self.pretrain.longest_window
        prefix = self.sft.adapter.prefix
        rankings = {"reward.max_tokens": self.reward.max_tokens} if self.uses_rankings else {}
        return {
            window: longest,
            "sft.max_tokens" + " + sft.adapter.virtual_tokens" * (prefix > 0): self.sft.max_tokens + prefix,
            **rankings,
            "ppo.max_prompt_tokens + ppo.max_response_tokens": self.ppo.max_prompt_tokens + self.ppo.max_response_tokens,
        }

    @model_validator(mode="after")
    def sizes_agree(self) -> "Recipe":
        wrong = self._unknown_sources()
        if not self.data.preferences and self.uses_rankings:
            wrong.append("data.preferences is missing: rankings to learn from, unless ppo.reward_function judges the answers")
        limit = self.model.max_positions
        window, longest = self.pretrain.longest_window
        if self.model.init is None:
            if not self.pretrain.total_steps:
                wrong.append("pretrain.steps = 0 needs model.init, a model that has learned already")
            for name, length in self.lengths.items():
                if length > limit:
                    wrong.append(f"{name} = {length} is longer than model.max_positions = {limit}")
            if (size := self.model.hidden_size // self.model.heads) not in HEAD_SIZES:
                wrong.append(f"model.hidden_size / model.heads = {size}: vLLM, which writes the rollouts, can only do {HEAD_SIZES}")
            if self.model.heads % (parts := self.ppo.groups.rollout.tensor_parallel):
                wrong.append(f"ppo.groups.rollout.tensor_parallel = {parts} must divide model.heads = {self.model.heads}")
            if self.tokenizer.encoding == "model":
                wrong.append("tokenizer.encoding = model needs model.init")
        for name in ("extend", "extend_from_corpus"):
            if getattr(self.tokenizer, name) and self.tokenizer.encoding == "train":
                wrong.append(
                    f"tokenizer.{name} needs a ready tokenizer.encoding: a vocabulary of one's own learns its words from the texts"
                )
        answer = ("ppo.max_prompt_tokens + ppo.max_response_tokens", self.ppo.max_prompt_tokens + self.ppo.max_response_tokens)
        fits = [
            (window, longest, "pretrain"),
            ("sft.max_tokens", self.sft.max_tokens, "sft"),
            (*answer, "ppo"),
        ]
        if self.uses_rankings:
            fits += [("reward.max_tokens x 2", 2 * self.reward.max_tokens, stage) for stage in ("reward", "preference")]
        if self.align == "distill":
            fits += [(*answer, "distill"), ("sft.max_tokens", self.sft.max_tokens, "distill")]
        for name, length, stage in fits:
            budget = getattr(self, stage).micro_batch
            if isinstance(budget, int) and length > budget:
                wrong.append(f"{name} = {length} does not fit into {stage}.micro_batch = {budget}")
        if self.ppo.uncertainty_coef and self.reward.heads > 1 and not self.reward.center_coef:
            # Rankings know differences only: a head may add any number to all of its rewards, and would be called uncertain for it.
            wrong.append("ppo.uncertainty_coef needs reward.center_coef: nothing else keeps the heads' rewards at one level; try 0.01")
        wrong += disagreements(self.ppo)
        if self.align == "distill" and self.distill.teacher is None:
            wrong.append("align = distill needs distill.teacher, the model to learn from")
        if self.distill.global_batch > self.distill.rollout_batch:
            batch = f"distill.global_batch = {self.distill.global_batch}"
            wrong.append(f"{batch} is larger than distill.rollout_batch = {self.distill.rollout_batch}")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def _unknown_sources(self) -> list[str]:
        """Weights can only be given to what data.pretrain lists."""
        wrong = []
        phases = self.pretrain.phases or []
        if self.pretrain.mix_by == "category":
            if all(phase.weights is None and phase.bins is None for phase in phases):
                wrong.append("pretrain.mix_by would have no effect: no phase has weights or bins")
            return wrong
        for number, phase in enumerate(phases, start=1):
            for source in {**(phase.weights or {}), **(phase.weights_to or {})}:
                if source not in self.data.pretrain:
                    near = max(self.data.pretrain, key=lambda known: max(_alike(source, known), _alike(source, known.rpartition("/")[2])))
                    what = f"phase {number} gives weight to {source!r}, which data.pretrain does not list (did you mean {near!r}?)"
                    wrong.append(f"pretrain.phases: {what}")
        return wrong


def _alike(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other).ratio()
