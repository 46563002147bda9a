"""Questions that reasoning-gym draws, and the whole line from them to a report, without a reward model."""

import json
from pathlib import Path

import pytest

from benchmarks.counting import aloud
from data import catalog, reasoning
from data.errors import DataError
from rlhf import pipeline, recipe_file
from rlhf.rewards import exact_match

RECIPE = """\
name: sums
runs_dir: {folder}/runs
cluster: {{workers: 1}}
data:
  cache_dir: {cache}
  pretrain: ["{task}:text"]
  sft: ["{task}:chat"]
  prompts: ["{task}:prompts"]
tokenizer: {{vocab_size: 300}}
model: {{hidden_size: 64, layers: 2, heads: 2, kv_heads: 1, intermediate_size: 128, max_positions: 128}}
pretrain: {{steps: 2, sequence_length: 64}}
sft: {{epochs: 0.5, max_tokens: 96}}
ppo:
  reward_function: {function}
  steps: 2
  rollout_batch: 16
  global_batch: 16
  epochs: 1
  max_prompt_tokens: 80
  max_response_tokens: 6
  validate_every: 1
  groups:
    policy: {{cpus: 0.4}}
    reference: {{cpus: 0.4}}
    reward: {{cpus: 0.4}}
    critic: {{cpus: 0.4}}
    rollout: {{cpus: 0.4}}
evaluate: {{prompts: 16, samples: 4}}
"""


def rows(cache_dir: Path, source: str) -> list[dict]:
    (path,) = catalog.resolve(source, cache_dir)
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("source", ["spell_backward?max_word_len=4&size=400", "chain_sum?max_terms=3&size=400", "letter_counting?size=400"])
def test_questions_have_answers_and_one_side(cache_dir: Path, source: str) -> None:
    prompts, chat, text = (rows(cache_dir, f"{source}:{kind}") for kind in ("prompts", "chat", "text"))
    split = {row["messages"][0]["content"]: row["split"] for row in prompts}
    assert len(split) == len(prompts) > 300
    assert 0.05 < sum(side == "validation" for side in split.values()) / len(split) < 0.16
    assert [(row["messages"][0], row["split"]) for row in chat] == [(row["messages"][0], row["split"]) for row in prompts]
    assert [row["messages"][1]["content"] for row in chat] == [row["answer"] for row in prompts]
    assert {row["text"].rpartition("\n")[0] for row in text} == {question for question, side in split.items() if side == "train"}
    for row in prompts[:50]:
        question, answer = row["messages"][0]["content"], row["answer"]
        if source.startswith("spell"):
            assert answer == question.split()[-1][::-1]
        elif source.startswith("chain"):
            assert int(answer) == eval(question.partition(": ")[2].removesuffix("="))
        else:
            assert int(answer) == question.partition("text: ")[2].lower().count(question.split('"')[1])


def test_a_worked_answer_counts_aloud_and_is_right(cache_dir: Path) -> None:
    worked, prompts = (rows(cache_dir, f"letter_counting?size=400:{kind}") for kind in ("worked", "prompts"))
    assert [(row["messages"][0], row["split"]) for row in worked] == [(row["messages"][0], row["split"]) for row in prompts]
    said = [row["messages"][1]["content"] for row in worked]
    assert set(exact_match([""] * len(said), said, [row["answer"] for row in prompts])) == {1.0}
    assert set(aloud([row["messages"][0]["content"] for row in prompts], said, [row["answer"] for row in prompts])) == {1.0}
    assert {text.rpartition("\n")[2] for text in said} > {"1", "2", "3"}
    assert reasoning.count_aloud('How many times does the letter "e" appear in the text: "Even 2 meet"?') == "E1ve2n 2 me3e4t\n4"
    asked, right = 'How many times does the letter "e" appear in the text: "we met"?', "we1 me2t\n2"
    assert aloud([asked] * 4, [right, f" {right}\n", "we1 met\n2", "2"], ["2"] * 4) == [1.0, 1.0, 0.0, 0.0]
    with pytest.raises(DataError, match="chain_sum holds text, chat, prompts, not 'worked'"):
        catalog.resolve("chain_sum?size=400:worked", cache_dir)


def test_options_make_other_questions(cache_dir: Path) -> None:
    easy, hard = (rows(cache_dir, f"chain_sum?{options}:prompts") for options in ("max_digits=1&max_terms=2", "max_terms=3&size=400"))
    assert max(len(row["answer"]) for row in easy) < max(len(row["answer"]) for row in hard)
    folder = catalog.get("chain_sum?max_terms=2&max_digits=1", cache_dir)
    assert folder == catalog.get("chain_sum?max_digits=1&max_terms=2", cache_dir)
    assert folder.name == "chain_sum-max_digits-1-max_terms-2"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "chain_sum?max_term=3",
            r"'max_term=3' is none \(did you mean max_terms\?\); the options of chain_sum are whole numbers",
        ),
        ("chain_sum?max_terms=few", "'max_terms=few' is none; the options"),
        ("chain_sum?max_terms=3&", "'' is none"),
        ("sotu?size=3", "sotu has no options"),
        ("chain_summ?size=3", "did you mean 'chain_sum'"),
    ],
)
def test_options_that_are_none(name: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        catalog.resolve(f"{name}:text", "nowhere")


def test_what_the_generator_refuses_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"spell_backward cannot be drawn with .*max_word_len must be >= min_word_len"):
        catalog.get("spell_backward?min_word_len=9&max_word_len=3", tmp_path)
    drawn = reasoning.rows("chain_sum", {"a": "b"})
    assert drawn["prompts"] == [{"messages": [{"role": "user", "content": "a"}], "answer": "b", "split": drawn["chat"][0]["split"]}]


@pytest.mark.slow
def test_the_whole_line_without_a_reward_model(ray_session: None, cache_dir: Path, tmp_path: Path) -> None:
    """A user's function, a critic from the SFT model, held-out curve, success in the summary and in the report."""
    (tmp_path / "mine.py").write_text("def digits(prompts, responses, answers):\n    return [min(1.0, len(a)) for a in answers]\n")
    path = tmp_path / "sums.yaml"
    function = f"{tmp_path}/mine.py:digits"
    path.write_text(RECIPE.format(folder=tmp_path, cache=cache_dir, task="chain_sum?max_digits=1&max_terms=2", function=function))
    run_dir = pipeline.run(recipe_file.load(path))
    assert {p.name for p in run_dir.iterdir() if p.is_dir()} == {"data", "pretrain", "sft", "ppo", "evaluate"}
    assert not (run_dir / "data" / "preferences").exists()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["evaluate/sft_success"] == summary["evaluate/aligned_success"] == 1.0
    assert "evaluate/independent_gain" not in summary
    curve = [json.loads(line) for line in (run_dir / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert [row["ppo/held_out_reward"] for row in curve] == [1.0, 1.0]
    assert all("ppo/critic_loss" in row for row in curve)
    report = (run_dir / "report.html").read_text()
    assert "Right answers" in report
    assert "Reward on held-out prompts" in report

    (tmp_path / "mine.py").write_text("def digits(prompts, responses, answers):\n    return [int(r) / 0 for r in '1' * len(prompts)]\n")
    with pytest.raises(Exception, match=r"(?s)ppo.reward_function .*mine.py:digits raised ZeroDivisionError.*mine.py line 2\) for prompt"):
        pipeline.run(recipe_file.load(path))
