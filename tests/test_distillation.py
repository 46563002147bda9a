"""Divergences against torch's own, chunks that change nothing, a student that learns its teacher."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny import batch_of, causal_lm, plain_twin, sequences

from data.tokenizers import train
from rlhf import models
from rlhf.distillation import Student, distillation_loss, divergence, figures, load_teacher
from rlhf.errors import RecipeError
from rlhf.learner import Learner
from rlhf.models import LanguageModel, save_model
from rlhf.recipe import Distill, Optimizer


@given(st.sampled_from(["forward", "reverse", "js"]), st.floats(0.05, 0.95), st.integers(0, 1000))
def test_divergences_are_what_torch_says(which: str, beta: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher, student = torch.randn(2, 5, 9, generator=generator, dtype=torch.float64).log_softmax(-1)
    found = divergence(teacher, student, Distill(divergence=which, beta=beta))

    def apart(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:  # torch: kl_div(input = q, target = p) is KL(p || q)
        return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)

    mean = (beta * teacher.exp() + (1 - beta) * student.exp()).log()
    expected = {
        "forward": apart(teacher, student),
        "reverse": apart(student, teacher),
        "js": beta * apart(teacher, mean) + (1 - beta) * apart(student, mean),
    }[which]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)
    assert (found > 0).all()
    torch.testing.assert_close(divergence(teacher, teacher, Distill(divergence=which, beta=beta)), torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("hard_weight", [0.0, 0.3])
def test_loss_and_gradients_are_those_of_plain_rows(hard_weight: float) -> None:
    """Packed against one conversation at a time in plain transformers; the first token of a row is predicted by nothing."""
    config = Distill(temperature=2.0, hard_weight=hard_weight)
    rows, ours, teacher = sequences([9, 4, 12]), causal_lm(seed=0), causal_lm(seed=1)
    theirs, knows = plain_twin(ours), plain_twin(teacher)
    student = Student(ours, teacher.requires_grad_(False), config)
    loss, sums = distillation_loss(student, batch_of(rows))
    loss.backward()
    expected = torch.zeros(())
    for row in map(torch.from_numpy, rows):
        logits, known = theirs(input_ids=row[None]).logits[0, :-1], knows(input_ids=row[None]).logits[0, :-1].detach()
        soft = F.kl_div((logits / 2).log_softmax(-1), (known / 2).log_softmax(-1), reduction="sum", log_target=True)
        expected = expected + hard_weight * F.cross_entropy(logits, row[1:], reduction="sum") + (1 - hard_weight) * 4 * soft
    expected.backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(loss) == pytest.approx(
        hard_weight * float(sums["cross_entropy"]) + (1 - hard_weight) * 4 * float(sums["divergence"]), rel=1e-6
    )
    gradients = dict(theirs.named_parameters())
    for name, p in student.inner.named_parameters():
        assert (p.grad - gradients[name].grad).norm() < 1e-4 * gradients[name].grad.norm(), name


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for rows in (2048, 5):
        monkeypatch.setattr(models, "LOGITS", rows * 64)
        student = Student(causal_lm(seed=0), causal_lm(seed=1).requires_grad_(False), Distill())
        loss, _ = distillation_loss(student, batch_of(sequences([9, 4, 12])))
        loss.backward()
        found.append((float(loss), student.inner.get_output_embeddings().weight.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("which", ["forward", "reverse", "js"])
def test_a_small_student_learns_its_teacher(which: str) -> None:
    teacher = causal_lm(seed=1).requires_grad_(False)
    student = Student(causal_lm(seed=2, layers=1), teacher, Distill(divergence=which))
    learner = Learner(student, Optimizer(learning_rate=1e-2, weight_decay=0.0), 30)
    held_out = batch_of(sequences([30] * 8, seed=999))
    before = figures(learner.evaluate([held_out], distillation_loss))
    weights = {name: p.clone() for name, p in teacher.named_parameters()}
    for step in range(30):
        learner.step([batch_of(sequences([30] * 8, seed=step))], distillation_loss)
    after = figures(learner.evaluate([held_out], distillation_loss))
    assert after["val_divergence"] < 0.7 * before["val_divergence"]
    assert all(torch.equal(p, weights[name]) for name, p in teacher.named_parameters())
    assert "teacher" not in "".join(learner.model.state_dict())


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path) -> None:
    tokenizer = train(["one word is not much of a text"], vocab_size=262)
    model = LanguageModel(causal_lm(vocab_size=262))
    save_model(model.inner, model.inner.state_dict(), tokenizer, tmp_path / "teacher")
    assert not any(p.requires_grad for p in load_teacher("a.key", tmp_path / "teacher", model.inner, tokenizer).parameters())
    with pytest.raises(RecipeError, match=r"a\.key .*knows 262 tokens and the student 64"):
        load_teacher("a.key", tmp_path / "teacher", causal_lm(), tokenizer)
    foreign = train(["xylophone xylophone"], vocab_size=262)
    with pytest.raises(RecipeError, match=r"a\.key .*: token 256 is b' a' to it and b'ho' to the student"):
        load_teacher("a.key", tmp_path / "teacher", model.inner, foreign)
