"""LoRA, QLoRA, P-tuning v2 and noisy embeddings for the sft stage: few parameters learn, the model's own stay as they are.

    model = LanguageModel(with_adapter(load_causal_lm(path), recipe.sft.adapter, seed=0))
    learner = Learner(model, recipe.sft, steps)           # trains, clips and checkpoints only what requires a gradient
    save_merged(path, model.inner, full_weights(learner.model), tokenizer, out / "model")

`peft` puts its layers into the model it is given, so the model stays a transformers model with packed attention, FSDP
units and layer names as before. The adapter is saved as peft saves it: `PeftModel.from_pretrained(base, out / "adapter")`
opens it. A prefix (P-tuning v2) is saved so and no other way (`save_prefix`): it has no weights to be merged into.
"""

import copy
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from cluster.hardware import hardware
from data.tokenizers import Tokenizer
from rlhf.attention import Segments
from rlhf.errors import RecipeError
from rlhf.models import load_causal_lm, save_model
from rlhf.recipe import Adapter
from rlhf.recipe_ppo import PolicyAdapter

if TYPE_CHECKING:
    from peft import PeftConfig

# peft imports bitsandbytes, which takes a second and warns that it has no faster kernel for one token at a time on CPUs: hence
# both are imported where an adapter is, and the warning is not passed on.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

PREFIX = "prompt_encoder.default.embedding.weight"  # float32 [virtual tokens, layers x (keys, values) x width of a layer's keys]


def with_adapter(model: PreTrainedModel, adapter: Adapter | PolicyAdapter, seed: int) -> PreTrainedModel:
    """The same model with W + alpha / rank * B A for every targeted W (arXiv:2106.09685); only A and B learn. With `qlora` all W
    of the blocks are kept in 4 bits (arXiv:2305.14314). With `p_tuning_v2`: see `with_prefix`.

    B starts at zero, so the model starts as it was; the same seed gives the same A in every process. Raises RecipeError
    when the model has no layer of the names in `targets`.
    """
    from peft import LoraConfig, get_peft_model

    if isinstance(adapter, Adapter) and adapter.method == "p_tuning_v2":
        return with_prefix(model, adapter.virtual_tokens, seed)
    if adapter.method == "qlora":
        model = in_four_bits(model)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=adapter.targets,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            get_peft_model(model, config)
        except ValueError as error:
            raise RecipeError(f"adapter.targets = {adapter.targets}: {error}") from error
    return model


def with_prefix(model: PreTrainedModel, tokens: int, seed: int) -> PreTrainedModel:
    """The same model, whose layers see `tokens` keys and values before those of every text: they alone learn (P-tuning v2,
    arXiv:2110.07602; prefix tuning, arXiv:2101.00190, without the network that made the prefix there).

    peft's, drawn from a normal distribution as there, the same for the same seed in every process. Where peft hands them to
    transformers as a cache, they go to packed attention; as behind a cache, the positions of the text begin at `tokens`.
    """
    from peft import PrefixTuningConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        prompted = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens))
    model.prompt_encoder = prompted.prompt_encoder  # within the model it is sharded, trained and saved with it
    model.peft_config = prompted.peft_config

    def behind_prefix(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        virtual = [(layer.keys, layer.values) for layer in prompted.get_prompt(batch_size=1).layers]
        segments = Segments.of(kwargs["segments"].lengths, kwargs["position_ids"].device, kwargs["segments"].prefixes, virtual)
        return args, {**kwargs, "segments": segments, "position_ids": kwargs["position_ids"] + tokens}

    model.base_model.register_forward_pre_hook(behind_prefix, with_kwargs=True)
    return model


def in_four_bits(model: PreTrainedModel) -> PreTrainedModel:
    """The blocks' matrices as 4-bit normal floats, their scales quantised too, computing in `hardware().dtype`: 0.52 bytes a weight.

    By bitsandbytes, in place. Every rank keeps them whole: they are not sharded.
    """
    import bitsandbytes as bnb

    hw = hardware()
    for path, linear in list(model.base_model.named_modules()):
        if type(linear) is not torch.nn.Linear:
            continue
        small = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, hw.dtype, compress_statistics=True, quant_type="nf4"
        )
        small.weight = bnb.nn.Params4bit(linear.weight.detach(), requires_grad=False, compress_statistics=True, quant_type="nf4")
        small.bias = linear.bias
        parent, _, name = path.rpartition(".")
        setattr(model.base_model.get_submodule(parent), name, small.to(hw.device))
    model.is_loaded_in_4bit = True  # what peft asks to choose its 4-bit layers
    return model


def save_merged(base: str | Path, model: PreTrainedModel, state: dict[str, torch.Tensor], tokenizer: Tokenizer, out: Path) -> None:
    """Write the adapter beside `out` and into `out` the directory `base` with the adapter merged into its weights.

    `state` is `full_weights` of the model. Merged, it is a plain model of the base's architecture, which every later stage
    and vLLM read. The base is opened once more, on the CPU: sharded weights cannot be merged where they are.
    """
    from peft import PeftModel

    folder = out.parent / "adapter"
    save_adapter(model, state, folder)
    merged = PeftModel.from_pretrained(load_causal_lm(base), folder).merge_and_unload()
    tied = set(getattr(merged, "all_tied_weights_keys", {}) or {})
    save_model(merged, {name: t for name, t in merged.state_dict().items() if name not in tied}, tokenizer, out)


def save_prefix(model: PreTrainedModel, state: dict[str, torch.Tensor], tokenizer: Tokenizer, out: Path) -> None:
    """Write the adapter beside `out`, and no `out`: a prefix cannot be merged into weights. The tokenizer is the base model's."""
    save_adapter(model, state, out.parent / "adapter")


def save_adapter(model: PreTrainedModel, state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the LoRA weights or the prefix among `state` as adapter_config.json and adapter_model.safetensors."""
    weights = {"prompt_embeddings": state[PREFIX].contiguous()} if PREFIX in state else lora_weights(state)
    write_adapter(adapter_config(model), weights, folder)


def adapter_config(model: PreTrainedModel) -> "PeftConfig":
    """What peft has to know of the model's adapter to open it."""
    config: PeftConfig = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    return config


def lora_weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The thin matrices among `state`, named as peft writes them."""
    return {f"base_model.model.{name.replace('.default.', '.')}": t.contiguous() for name, t in state.items() if ".lora_" in name}


def write_adapter(config: "PeftConfig", weights: dict[str, torch.Tensor], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def add_noise(model: PreTrainedModel, alpha: float) -> PreTrainedModel:
    """Noise on the embeddings while training: uniform in +-alpha / sqrt(L d), for a segment of L tokens (NEFTune, arXiv:2310.05914).

    By our own hook: transformers' takes L from the row, and a packed row is many conversations long.
    """
    embed = model.get_input_embeddings()

    def noisy(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not module.training:
            return None
        embedded = embed(kwargs["input_ids"])
        lengths = torch.tensor(kwargs["segments"].lengths, device=embedded.device)
        reach = alpha / (lengths * embedded.shape[-1]).float().sqrt().repeat_interleave(lengths)
        noise = torch.empty_like(embedded).uniform_(-1, 1) * reach[None, :, None].to(embedded.dtype)
        return args, {**kwargs, "input_ids": None, "inputs_embeds": embedded + noise}

    model.base_model.register_forward_pre_hook(noisy, with_kwargs=True)
    return model
