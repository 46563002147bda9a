"""Models and batches small enough that a test of them takes milliseconds."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from data.packing import Sample, pack
from rlhf.models import Batch, new_causal_lm
from rlhf.recipe import Model

VOCAB = 64
CPU = torch.device("cpu")


def recipe_model(**changes: object) -> Model:
    sizes = {"hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate_size": 64, "max_positions": 64}
    return Model(**{**sizes, **changes})


def causal_lm(seed: int = 0, vocab_size: int = VOCAB, **changes: object) -> PreTrainedModel:
    """A fresh Llama with weights large enough that its logits differ visibly from token to token."""
    model = new_causal_lm(recipe_model(**changes), vocab_size, end_of_text=0, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(5.0)
    return model


def plain_twin(model: PreTrainedModel, attention: str = "eager") -> PreTrainedModel:
    """The same weights in a model as transformers makes it, without our attention."""
    config = type(model.config).from_dict(model.config.to_dict())
    config._attn_implementation = attention
    twin = LlamaForCausalLM(config) if isinstance(model, LlamaForCausalLM) else type(model)(config)
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def sequences(lengths: Sequence[int], seed: int = 0, vocab_size: int = VOCAB) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, n) for n in lengths]


def batch_of(tokens: Sequence[np.ndarray], weights: Sequence[np.ndarray] | None = None) -> Batch:
    """The sequences packed as segments; without `weights` every token but the first of each counts 1."""
    weights = [np.ones(len(t), np.float32) for t in tokens] if weights is None else weights
    return Batch.of(pack([Sample(t, w) for t, w in zip(tokens, weights, strict=True)]), CPU)
