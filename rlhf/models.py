"""Models: transformers directories in, two small wrappers around them, transformers directories out.

    lm = LanguageModel(new_causal_lm(recipe.model, vocab_size=4096, seed=0))
    log_probs = lm(batch)                       # [R], of the R tokens of the batch that count
    rm = ScalarModel(load_reward_model(path))
    values = rm(batch)                          # [T], one number per token

A wrapper's forward holds the whole computation, output layer included, so that FSDP may shard it as one root and the
`[tokens, vocabulary]` logits are never kept for a whole batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from data.packing import PackedBatch
from data.tokenizers import Tokenizer
from rlhf.attention import PACKED, Segments
from rlhf.cpu_kernels import is_plain, use_onednn
from rlhf.errors import RecipeError
from rlhf.fused_loss import target_log_probs, weighted_cross_entropy
from rlhf.losses import cross_entropy
from rlhf.recipe import Model

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()  # a missing reward head is told, and meant

# Logits alive at once: 256 MiB in fp32, 16k rows of a vocabulary of 4k or 512 of one of 128k. Several chunks cost a second pass through
# the output layer: with 2048 rows at a time, two for a batch of 8 x 512, pretraining a 10.5 M model (vocabulary 8k) lost 7 %.
LOGITS = 1 << 26


@dataclass(frozen=True, eq=False)
class Batch:
    """A `data.packing.PackedBatch` as tensors on the compute device; equal to itself alone."""

    tokens: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T], from 0 in every segment, or from the length of its prefix
    segments: Segments
    rows: torch.Tensor  # int64 [R]: the tokens that count; something stands before each of them
    before: torch.Tensor  # int64 [R]: the place of what stands before each of them
    owners: torch.Tensor  # int64 [R]: the segment each of them is in
    weights: torch.Tensor  # float32 [R]: how much each of them counts
    extras: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def last(self) -> torch.Tensor:
        """int64 [n]: the last token of every segment."""
        return self.segments.ends[1:].long() - 1

    @property
    def last_of_texts(self) -> torch.Tensor:
        """int64 [m]: the last token of every segment that no other one continues, that is of every whole text."""
        continued = set(self.segments.prefixes)
        whole = [i for i in range(len(self.segments.lengths)) if i not in continued]
        return self.last[torch.tensor(whole, device=self.tokens.device)]

    @classmethod
    def of(cls, packed: PackedBatch, device: torch.device) -> "Batch":
        weights = torch.from_numpy(packed.weights)
        rows = weights.nonzero()[:, 0]
        owners = torch.arange(len(packed.lengths)).repeat_interleave(torch.tensor(packed.lengths))
        return cls(
            torch.from_numpy(packed.tokens).to(device),
            torch.from_numpy(packed.positions).to(device),
            Segments.of(packed.lengths, device, packed.prefixes),
            rows.to(device),
            torch.from_numpy(packed.before)[rows].to(device),
            owners[rows].to(device),
            weights[rows].to(device),
            {name: torch.as_tensor(value).to(device) for name, value in packed.extras.items()},
        )


class LanguageModel(nn.Module):
    """A transformers causal LM that answers with the log-probabilities of a packed batch's counted tokens."""

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        super().__init__()
        use_onednn(causal_lm)
        self.inner = causal_lm

    def forward(self, batch: Batch, temperature: float = 1.0, entropy: bool = False, summed: bool = False) -> torch.Tensor:
        """log p(tokens[r] | its text before r) for r in batch.rows: float32 [R], of the distribution at `temperature`; with `entropy`
        [R, 2], and the distribution's entropy in the second column. In nats.

        With `summed` the cross-entropy alone, -sum_r w_r log p_r, a float32 scalar: no logits are kept for its backward pass.
        """
        hidden, head = hidden_states(self.inner, batch)[batch.before], self.inner.get_output_embeddings()
        targets = batch.tokens[batch.rows]
        if summed and is_plain(head) and temperature == 1 and torch.is_grad_enabled():
            return weighted_cross_entropy(hidden, head.weight, targets, batch.weights)
        found = log_probs(hidden, head, targets, temperature, entropy)
        return cross_entropy(found, batch.weights) if summed else found


class ScalarModel(nn.Module):
    """A transformers sequence or token classifier whose labels all judge the same: a reward or a value for every token."""

    def __init__(self, classifier: PreTrainedModel) -> None:
        super().__init__()
        use_onednn(classifier)
        self.inner = classifier

    def forward(self, batch: Batch, each_head: bool = False) -> torch.Tensor:
        """float32 [T], the mean over the heads; [T, heads] with `each_head`. The reward of a segment is its last token's; the value of a
        state is its token's."""
        of_heads = self.inner.score(hidden_states(self.inner, batch)).float()
        return of_heads if each_head else of_heads.mean(1)


def hidden_states(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """The last hidden states of a packed batch, [T, hidden]."""
    out = model.base_model(input_ids=batch.tokens[None], position_ids=batch.positions[None], segments=batch.segments, use_cache=False)
    return out.last_hidden_state.squeeze(0)


def log_probs(hidden: torch.Tensor, head: nn.Linear, targets: torch.Tensor, temperature: float, entropy: bool = False) -> torch.Tensor:
    """log softmax(head(hidden) / temperature)[targets], float32 [R], for hidden [R, d] and targets int64 [R]; with `entropy` [R, 2], the
    second column -sum_v p_v log p_v."""
    if is_plain(head) and not entropy:
        return target_log_probs(hidden / temperature, head.weight, targets, keep=len(hidden) <= rows_at_once(len(head.weight)))

    def some(h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        logits = head(h).float()
        if temperature != 1.0:
            logits = logits / temperature
        found = -F.cross_entropy(logits, t, reduction="none")
        if not entropy:
            return found
        return torch.stack([found, logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)], 1)

    return in_chunks(some, head.weight.shape[0], hidden, targets, keep=not entropy)


def rows_at_once(vocabulary: int) -> int:
    """Rows of logits that may exist at once."""
    return max(1, LOGITS // vocabulary)


def in_chunks(function: Callable[..., torch.Tensor], vocabulary: int, *rows: torch.Tensor, keep: bool = True) -> torch.Tensor:
    """`function(*rows)` of tensors [R, ...], few enough rows at a time that no more than LOGITS logits exist at once; where there are
    several chunks their logits are computed again for the backward pass. `keep`: those of a single chunk are not."""
    chunks = list(zip(*(of.split(rows_at_once(vocabulary)) for of in rows), strict=True))
    if (len(chunks) == 1 and keep) or not torch.is_grad_enabled():
        return torch.cat([function(*chunk) for chunk in chunks])
    return torch.cat([checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks])


def new_causal_lm(model: Model, vocab_size: int, end_of_text: int, seed: int) -> PreTrainedModel:
    """A fresh Llama of the recipe's sizes; the same seed gives the same weights in every process."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        max_position_embeddings=model.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=model.tie_embeddings,
        bos_token_id=None,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
        attn_implementation=PACKED,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def load_causal_lm(path: str | Path, dtype: torch.dtype = torch.float32, attention: str | None = PACKED) -> PreTrainedModel:
    """Open a model directory for language modelling: in fp32 master weights, for packed batches; None takes the model's own attention."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention, use_safetensors=True)


@torch.no_grad()
def extend_vocabulary(model: PreTrainedModel, old: Tokenizer, new: Tokenizer) -> None:
    """Rows for the ids that `new` has beyond `old`, in place: each starts as the mean of the rows that spelled its text before."""
    if new.vocab_size > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(new.vocab_size, mean_resizing=False)
    tables = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    for token in sorted(i for i in new.starts if i >= old.vocab_size):  # in their order: one may be spelled by those before it
        for table in tables.values():
            table[token] = table[new.starts[token]].mean(0)


def load_reward_model(path: str | Path, heads: int = 1, seed: int = 0) -> PreTrainedModel:
    """Open a model directory as a reward model (`*ForSequenceClassification`). One that is none gets `heads` new heads: a single one
    starts at zero, several where `seed` puts them, each elsewhere."""
    return _with_heads(AutoModelForSequenceClassification, path, _heads_of(path) or heads, seed)


@torch.no_grad()
def load_critic(path: str | Path) -> PreTrainedModel:
    """Open a model directory as a critic (`*ForTokenClassification`). A reward model's head is taken over; of several heads the mean,
    and since they are linear that is one head, whose row is the mean of theirs."""
    model = _with_heads(AutoModelForTokenClassification, path, _heads_of(path) or 1, seed=0)
    if model.num_labels > 1:
        several = model.score
        model.score = nn.Linear(several.in_features, 1, bias=several.bias is not None)
        for name, rows in several.named_parameters():
            getattr(model.score, name).copy_(rows.mean(0, keepdim=True))
        model.config.num_labels = model.num_labels = 1
    return model


def _heads_of(path: str | Path) -> int:
    """How many heads the reward model in this directory has; 0 when it is none."""
    config = AutoConfig.from_pretrained(path)
    return config.num_labels if any(name.endswith("ForSequenceClassification") for name in config.architectures or ()) else 0


@torch.no_grad()
def _with_heads(factory: Any, path: str | Path, heads: int, seed: int) -> PreTrainedModel:
    model, info = factory.from_pretrained(
        path,
        num_labels=heads,
        dtype=torch.float32,
        attn_implementation=PACKED,
        use_safetensors=True,
        output_loading_info=True,
    )
    head = model.score
    missing = set(info["missing_keys"])
    if "score.weight" in missing:
        # From zero all answers start equal and no seed decides which one leads. Several heads differ by chance, as in Stiennon et al. 2020,
        # arXiv:2009.01325: what the rankings do not say stays different, and is how they tell that an answer is unlike the rankings'.
        nn.init.zeros_(head.weight)
        if heads > 1:
            head.weight.normal_(0, (head.in_features + 1) ** -0.5, generator=torch.Generator().manual_seed(seed))
    if "score.bias" in missing or ("score.weight" in missing and head.bias is not None):
        nn.init.zeros_(head.bias)
    others = {name for name in missing if not name.startswith("score.")}
    if others:
        raise RecipeError(f"{path}: weights are missing: {', '.join(sorted(others)[:5])}")
    return model


def save_model(model: PreTrainedModel, state: dict[str, torch.Tensor], tokenizer: Tokenizer, out: Path) -> None:
    """Write `out` as transformers and vLLM expect it: config.json, model.safetensors, tokenizer.json, chat template."""
    out.mkdir(parents=True, exist_ok=True)
    for config in (model.config, getattr(model, "generation_config", None)):  # a reward model generates nothing
        if config is not None:
            config.eos_token_id, config.pad_token_id = tokenizer.end_of_turn, tokenizer.end_of_text
    model.save_pretrained(out, state_dict=state)
    tokenizer.save(out)
