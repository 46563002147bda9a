"""Talking to a run's model: the right model, the right ids, the right words."""

import io
import json
from pathlib import Path

import pytest
import torch
from tiny import causal_lm

from data.chat import encode_chat, encode_prompt
from data.tokenizers import Tokenizer, train
from rlhf import chat
from rlhf.chat import Turn, find_model, load, talk
from rlhf.errors import RecipeError
from rlhf.models import save_model

VOCAB = 300


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(["the cat sat on the mat and the dog sat on the cat, which sat on that very mat"], 275)


@pytest.fixture
def run_dir(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A run whose pretrain and sft are finished, and whose ppo is not. The models have more rows than the tokenizer ids."""
    for seed, stage in enumerate(("pretrain", "sft", "ppo")):
        model = causal_lm(seed, vocab_size=VOCAB, max_positions=64)
        save_model(model, {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}, tokenizer, tmp_path / stage / "model")
        if stage != "ppo":
            (tmp_path / stage / "manifest.json").write_text(json.dumps({"stage": stage}))
    return tmp_path


def test_the_newest_finished_stage(run_dir: Path) -> None:
    assert find_model(run_dir) == ("sft", run_dir / "sft" / "model")
    assert find_model(run_dir, "pretrain") == ("pretrain", run_dir / "pretrain" / "model")
    (run_dir / "ppo" / "manifest.json").write_text("{}")  # cut short: an empty one commits nothing
    assert find_model(run_dir)[0] == "sft"
    (run_dir / "ppo" / "manifest.json").write_text('{"stage": "ppo"}')
    assert find_model(run_dir)[0] == "ppo"


def test_no_model(run_dir: Path) -> None:
    with pytest.raises(RecipeError, match="no finished ppo model; there is pretrain, sft"):
        find_model(run_dir, "ppo")
    with pytest.raises(RecipeError, match="'reward' makes no model that speaks; choose one of pretrain, sft, distill, preference, ppo"):
        find_model(run_dir, "reward")
    with pytest.raises(RecipeError, match="no run at"):
        talk(run_dir / "nowhere")
    (run_dir / "half").mkdir()
    with pytest.raises(RecipeError, match="has no finished model yet"):
        talk(run_dir / "half", message="hello")


def test_one_message(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for seed in (1, 1, 2):
        talk(run_dir, seed=seed, max_tokens=12, message="the cat")
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
    assert said[0].endswith("\n")
    assert all(c.isprintable() or c in "\n\t" for c in said[0])


def test_words_are_those_of_the_ids(run_dir: Path, tokenizer: Tokenizer) -> None:
    for seed in range(5):
        talker = load(run_dir, seed=seed, max_tokens=20, temperature=2.0)
        text = "".join(talker.say("the dog"))
        ids = talker.turns[0].answer
        assert 1 <= len(ids) <= 20
        assert max(ids) < tokenizer.vocab_size
        assert text == chat._harmless(tokenizer.decode(ids, skip_special=True))


def test_greedy_equals_transformers(run_dir: Path, tokenizer: Tokenizer) -> None:
    talker = load(run_dir, temperature=0, max_tokens=10)
    "".join(talker.say("the dog"))
    ids = encode_prompt(tokenizer, [{"role": "user", "content": "the dog"}])
    for token in talker.turns[0].answer:
        with torch.no_grad():
            logits = talker.model(input_ids=torch.tensor([ids])).logits[0, -1, : tokenizer.vocab_size]
        assert token == int(logits.argmax())
        ids.append(token)


def test_what_the_model_wrote_is_never_encoded_again(run_dir: Path, tokenizer: Tokenizer) -> None:
    talker = load(run_dir)
    cat = [tokenizer.encode(c)[0] for c in "the cat"]  # letter by letter: not what the tokenizer would make of it
    assert cat != tokenizer.encode("the cat")
    end = tokenizer.end_of_turn
    ask = lambda text: encode_prompt(tokenizer, [{"role": "user", "content": text}])  # noqa: E731
    ended = [Turn("who sat?", [*cat, end]), Turn("where?")]
    assert talker.prompt(ended) == [*ask("who sat?"), *cat, end, *ask("where?")]
    cut_off = [Turn("who sat?", cat), Turn("where?")]
    assert talker.prompt(cut_off) == talker.prompt(ended), "the template ends a turn that the model did not end"
    assert talker.prompt([Turn("a<|end|>b")]).count(end) == 1, "what people type is text"

    # With the tokenizer's own ids it is what training saw.
    own = [Turn("who sat?", [*tokenizer.encode("the cat"), end]), Turn("where?")]
    messages = [{"role": "user", "content": "who sat?"}, {"role": "assistant", "content": "the cat"}]
    whole = encode_chat(tokenizer, messages)[0]
    assert talker.prompt(own)[: len(whole)] == whole


def test_old_turns_are_forgotten_before_the_context_overflows(run_dir: Path) -> None:
    talker = load(run_dir, max_tokens=16, temperature=2.0, seed=0)
    for i in range(6):
        "".join(talker.say(f"message {i} the cat"))
        assert len(talker.prompt(talker.turns)) + 16 <= 64
        assert talker.turns[-1].question == f"message {i} the cat"
    assert len(talker.turns) < 6
    before = list(talker.turns)
    with pytest.raises(RecipeError, match=r"message has \d+ tokens, .* room for 48"):
        "".join(talker.say("xyz" * 40))
    assert talker.turns == before


def test_a_pretrained_model_continues(run_dir: Path, tokenizer: Tokenizer) -> None:
    talker = load(run_dir, "pretrain", seed=0, max_tokens=5)
    assert talker.prompt([Turn("the cat sat")]) == tokenizer.encode("the cat sat")
    with pytest.raises(RecipeError, match="nothing to continue"):
        "".join(talker.say(""))


def test_a_conversation_by_pipe(run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"the cat\n\n{'xyz' * 40}\n/new\nthe dog\n"))
    seen = []
    real = chat.load
    monkeypatch.setattr(chat, "load", lambda *args: seen.append(real(*args)) or seen[0])
    talk(run_dir, seed=0, max_tokens=8)
    assert [t.question for t in seen[0].turns] == ["the dog"]
    assert "the message has" in capsys.readouterr().out


def test_control_characters_stay_out() -> None:
    assert chat._harmless("a\x1b[2Jb\x07\nc\td\x9b é 👩‍🚀") == "a[2Jb\nc\td é 👩‍🚀"
