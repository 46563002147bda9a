"""Distillation in the sft stage: the student learns the teacher's whole distribution on the data's tokens (off-policy).

    student = Student(load_causal_lm(path), load_teacher(teacher, vocabulary), recipe.sft.distill)
    found = student(batch)                       # float32 [R, 2]: log-probabilities, divergences from the teacher
    loss, sums = distillation_loss(student, batch)

The teacher stands whole on every rank, frozen, outside of what is sharded, trained and saved.
"""

from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import PreTrainedModel

from cluster.hardware import hardware
from rlhf.errors import RecipeError
from rlhf.losses import cross_entropy
from rlhf.models import Batch, hidden_states, in_chunks, load_causal_lm
from rlhf.recipe import Distill


class Student(nn.Module):
    """A causal LM that is told, beside the log-probabilities of its tokens, how far it is from its teacher."""

    def __init__(self, causal_lm: PreTrainedModel, teacher: PreTrainedModel, config: Distill) -> None:
        super().__init__()
        self.inner = causal_lm
        self.teacher = (teacher,)  # in a tuple: no submodule, so neither sharded nor trained nor saved
        self.config = config

    def forward(self, batch: Batch, temperature: float = 1.0) -> torch.Tensor:  # type: ignore[override]  # never asked for its entropy
        """[:, 0] the log-probabilities of the counted tokens, [:, 1] the divergence from the teacher where they stand: float32
        [R, 2], in nats, the divergence at `sft.distill.temperature`."""
        with torch.no_grad():
            known = hidden_states(self.teacher[0], batch)[batch.before]
        hidden = hidden_states(self.inner, batch)[batch.before]
        head, teacher_head = (model.get_output_embeddings() for model in (self.inner, self.teacher[0]))

        def some(h: torch.Tensor, k: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            logits = head(h).float()
            with torch.no_grad():
                teacher = F.log_softmax(teacher_head(k).float() / self.config.temperature, -1)
            apart = divergence(teacher, F.log_softmax(logits / self.config.temperature, -1), self.config)
            return torch.stack([-F.cross_entropy(logits / temperature, targets, reduction="none"), apart], -1)

        return in_chunks(some, head.weight.shape[0], hidden, known, batch.tokens[batch.rows])


def divergence(teacher: torch.Tensor, student: torch.Tensor, config: Distill) -> torch.Tensor:
    """forward: KL(teacher || student); reverse: KL(student || teacher); js: beta KL(teacher || m) + (1 - beta) KL(student || m)
    with m = beta teacher + (1 - beta) student. Agarwal et al. 2023, arXiv:2306.13649, section 2.

    Log-probabilities [..., vocabulary] in, nats [...] out.
    """
    if config.divergence == "forward":
        return kl(teacher, student)
    if config.divergence == "reverse":
        return kl(student, teacher)
    beta = torch.tensor(config.beta, dtype=teacher.dtype, device=teacher.device)
    mean = torch.logaddexp(teacher + beta.log(), student + (1 - beta).log())
    return beta * kl(teacher, mean) + (1 - beta) * kl(student, mean)


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) over the last dimension of log-probabilities."""
    return (p.exp() * (p - q)).sum(-1)


def distillation_loss(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """hard_weight x cross-entropy + (1 - hard_weight) x temperature^2 x divergence; the square keeps the size of the gradients
    (Hinton et al. 2015, arXiv:1503.02531, section 2.1). Both parts are reported as sums too."""
    config: Distill = model.config  # type: ignore[assignment]
    log_probs, apart = model(batch).unbind(-1)
    hard, soft = cross_entropy(log_probs, batch.weights), (apart * batch.weights).sum()
    loss = config.hard_weight * hard + (1 - config.hard_weight) * config.temperature**2 * soft
    return loss, {"cross_entropy": hard.detach(), "divergence": soft.detach()}


def figures(sums: dict[str, float]) -> dict[str, float]:
    return {"val_loss": sums["cross_entropy"] / sums["count"], "val_divergence": sums["divergence"] / sums["count"]}


def load_teacher(path: str | Path, vocabulary: int) -> PreTrainedModel:
    """Open the teacher, frozen, on the compute device. Raises RecipeError when its vocabulary has another size."""
    teacher = load_causal_lm(path)
    rows = teacher.get_output_embeddings().weight.shape[0]
    if rows != vocabulary:
        raise RecipeError(
            f"sft.distill.teacher {path}: it knows {rows} tokens and the student {vocabulary}; take one of the student's vocabulary"
        )
    return teacher.to(hardware().device, hardware().dtype).eval().requires_grad_(False)
