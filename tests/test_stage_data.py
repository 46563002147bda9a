"""Stage data through the pipeline, on real Ray Data and small files."""

import json
from pathlib import Path

import pytest

from data.errors import DataError
from rlhf import pipeline, recipe_file
from rlhf.monitoring import Monitor
from rlhf.stage_data import run


@pytest.fixture
def words(tmp_path: Path, recipe_path: Path) -> Path:
    """A recipe whose files hold enough different rows for both splits."""
    numbers = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    ask = [{"role": "user", "content": f"What follows {n}?"} for n in numbers]
    say = [{"role": "assistant", "content": f"After {n} comes more."} for n in numbers]
    files = {
        "speech.jsonl": [{"text": f"Fellow citizens, {n} {m} and {n}."} for n in numbers for m in numbers],
        "chat.jsonl": [{"messages": [question, answer]} for question, answer in zip(ask, say, strict=True)],
        "pairs.jsonl": [{"messages": [q], "chosen": "More.", "rejected": "Nothing."} for q in ask],
        "prompts.jsonl": [{"messages": [q]} for q in ask],
    }
    for name, rows in files.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe_path.write_text(recipe_path.read_text().replace("speech.txt", "speech.jsonl") + "tokenizer: {vocab_size: 300}\n")
    return recipe_path


def test_data_stage_makes_every_part_and_reports_it(ray_session: None, words: Path, tmp_path: Path) -> None:
    from data.examples import Examples
    from data.shards import TokenShards
    from data.tokenizers import load

    with (tmp_path / "speech.jsonl").open("a") as file:
        file.write("{broken\n")
    said = [f"Fellow citizens, {n} and more." for n in ("eleven", "twelve", "many")] + ["Fellow citizens, one one and one."]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in said))
    both = [f"{tmp_path}/speech.jsonl", f"{tmp_path}/more.jsonl"]
    settings = ["data.max_broken_fraction=0.5", "data.validation_fraction=0.2", f"data.pretrain={json.dumps(both)}"]
    run_dir = pipeline.run(recipe_file.load(words, settings), only="data")
    out = run_dir / "data"
    assert load(out / "tokenizer").vocab_size == 300
    for split in ("train", "validation"):
        assert TokenShards(out / "pretrain" / split).tokens > 0
        for part in ("sft", "preferences", "prompts"):
            assert len(Examples(out / part, split)) > 0
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["data/pretrain_broken"] == 1
    assert summary["data/train_documents"] + summary["data/validation_documents"] == 103
    assert sum(summary[f"data/train_tokens/{source}"] for source in both) == summary["data/train_tokens"]
    assert summary["data/sft_train"] + summary["data/sft_validation"] == 10


def test_evaluations_and_earlier_runs_are_kept_out_of_every_part(ray_session: None, words: Path, tmp_path: Path) -> None:
    passage = "when the seventh train had left the station nobody was there to wave it goodbye"
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": passage}) + "\n")
    for name, row in {
        "speech": {"text": f"He said: {passage}."},
        "chat": {"messages": [{"role": "user", "content": passage}, {"role": "assistant", "content": "Sad."}]},
        "pairs": {"messages": [{"role": "user", "content": "Tell"}], "chosen": passage.upper(), "rejected": "No"},
        "prompts": {"messages": [{"role": "user", "content": f"Is it true that {passage}?"}]},
    }.items():
        with (tmp_path / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    clean = ["data.validation_fraction=0.2", "ppo.max_prompt_tokens=200", f"data.decontaminate.against=[{tmp_path}/test.jsonl]"]
    first = pipeline.run(recipe_file.load(words, clean), only="data")
    for part in ("pretrain", "sft", "preferences", "prompts"):
        (line,) = (first / "data" / part / "contaminated.jsonl").read_text().splitlines()
        assert (json.loads(line)["evaluation_line"], json.loads(line)["words"]) == (1, 15)
        assert passage in json.loads(line)["passage"].lower()

    with (tmp_path / "speech.jsonl").open("a") as file:
        file.writelines(json.dumps({"text": f"Another day, {n}."}) + "\n" for n in ("one", "two", "three"))
    second = pipeline.run(recipe_file.load(words, [*clean, "name=second", f"data.earlier=[{first}]"]), only="data")
    summary = json.loads((second / "summary.json").read_text())
    assert summary["data/train_documents"] + summary["data/validation_documents"] == 3


def test_finished_parts_survive_a_stop(ray_session: None, words: Path, tmp_path: Path) -> None:
    good = (tmp_path / "pairs.jsonl").read_text()
    recipe = recipe_file.load(words, ["data.max_broken_fraction=0.5", "data.validation_fraction=0.2"])
    (tmp_path / "pairs.jsonl").write_text("not json\n" * 20)
    out = tmp_path / "out"
    out.mkdir()
    with Monitor("data", out) as monitor, pytest.raises(DataError, match=r"20 of 20 rows are broken"):
        run(recipe, {}, out, monitor)
    before = (out / "pretrain" / "manifest.json").stat().st_mtime_ns
    (tmp_path / "pairs.jsonl").write_text(good)
    with Monitor("data", out) as monitor:
        run(recipe, {}, out, monitor)
    assert (out / "pretrain" / "manifest.json").stat().st_mtime_ns == before
    assert (out / "prompts" / "manifest.json").exists()


def test_empty_corpus_is_one_clear_error(ray_session: None, words: Path, tmp_path: Path) -> None:
    (tmp_path / "speech.jsonl").write_text("")
    with pytest.raises(DataError, match="no data"):
        pipeline.run(recipe_file.load(words), only="data")


def test_a_models_vocabulary_grows_by_the_texts_and_its_rows_begin_as_means(ray_session: None, words: Path, tmp_path: Path) -> None:
    import torch
    from test_data_tokenizers import TRAINED
    from tiny import causal_lm

    from data.tokenizers import BytePairTokenizer, from_model, load
    from rlhf.errors import RecipeError
    from rlhf.models import extend_vocabulary

    model = causal_lm(vocab_size=TRAINED.vocab_size, max_positions=512)
    model.save_pretrained(tmp_path / "model")
    TRAINED.save(tmp_path / "model")
    (tmp_path / "pieces.jsonl").write_text('{"piece": "蒸汽机车"}\n')
    text = words.read_text().replace("tokenizer: {vocab_size: 300}\n", f"model: {{init: {tmp_path}/model}}\n")
    words.write_text(text + f"tokenizer: {{encoding: model, extend: {tmp_path}/pieces.jsonl, extend_from_corpus: 12}}\n")
    out = pipeline.run(recipe_file.load(words), only="data") / "data"
    longer = load(out / "tokenizer")
    assert isinstance(longer, BytePairTokenizer)
    pieces = len(TRAINED.encode("蒸汽机车")) - 1
    assert longer.vocab_size == TRAINED.vocab_size + pieces + 12
    assert len(longer.encode("蒸汽机车")) == 1
    said = "Fellow citizens, one two and one."
    assert len(longer.encode(said)) < len(TRAINED.encode(said))
    before = model.get_input_embeddings().weight.detach().clone()
    extend_vocabulary(model, from_model(tmp_path / "model"), longer)
    rows = model.get_input_embeddings().weight.detach()
    assert torch.equal(rows[: len(before)], before)
    for token, spelled in longer.starts.items():
        torch.testing.assert_close(rows[token], rows[spelled].mean(0))

    for name in ("encoding.json", "ranks.tiktoken"):  # as a downloaded model is
        (tmp_path / "model" / name).unlink()
    with pytest.raises(RecipeError, match="does not keep its ranks"):
        pipeline.run(recipe_file.load(words, ["name=other"]), only="data")
