"""What the recipe's sections are made of: `key`, the section itself, and the fields of everything that trains."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


def key(default: Any, meaning: str, *, unit: str = "", source: str = "", values: str = "", **limits: Any) -> Any:
    """A recipe field: its default (`...` = required), what it means, its unit, where it comes from, and what its values stand for."""
    return Field(default, description=meaning, json_schema_extra={"unit": unit, "source": source, "values": values}, **limits)


class Section(BaseModel):
    """Unknown keys are errors; nothing changes after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


Source = Annotated[str, Field(pattern=r"\S")]


class Optimizer(Section):
    """Fields shared by everything that trains."""

    optimizer: Literal["adamw", "muon"] = key(
        "adamw",
        "`muon` moves the matrices of the blocks by Muon, all else by AdamW; the same rates fit both. Muon goes as far for a faint "
        "gradient as for a strong one: not for rewards that are given rarely.",
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


class Lora(Section):
    """Two thin matrices beside each targeted one, W + alpha / rank * B A."""

    rank: int = key(8, "Width of the thin matrices.", ge=1, source="arXiv:2106.09685")
    alpha: float = key(16.0, "The thin matrices' product is multiplied by alpha / rank.", gt=0)
    targets: Literal["all-linear"] | list[Source] = key("all-linear", "Names of the layers that get an adapter, as [q_proj, v_proj].")
