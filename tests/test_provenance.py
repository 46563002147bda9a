"""The documents behind a step, one taken out again, and the page that tells what became of the text."""

import json
import re
from pathlib import Path

import pytest
from test_stage_data import words  # noqa: F401 (a fixture)
from typer.testing import CliRunner

from data.errors import DataError
from data.order import batch_indices
from data.shards import TokenShards
from data.tokenizers import load
from rlhf import artefacts, pipeline, recipe_file
from rlhf.cli import app
from rlhf.errors import RecipeError
from rlhf.provenance import batch, remove

SETTINGS = ["data.max_broken_fraction=0.5", "data.validation_fraction=0.2", "pretrain.sequence_length=64", "pretrain.global_batch=3"]
PHASES = json.dumps(
    [
        {"steps": 2, "weights": {"ONE": 3, "TWO": 1}},
        {"steps": 2, "weights": {"TWO": 1}, "sequence_length": 32},
    ]
)


@pytest.fixture
def run(ray_session: None, words: Path, tmp_path: Path) -> Path:  # noqa: F811 (the fixture)
    """A run whose data stage is made, of two sources; it plans two phases."""
    more = [f"More of it: {n} and {m}, or {n}." for n in ("red", "green", "blue", "black") for m in ("up", "down", "left", "right", "far")]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in more))
    words.write_text(words.read_text().replace("  steps: 3\n", "  optimizer: adamw\n"))  # phases have steps of their own
    one, two = f"{tmp_path}/speech.jsonl", f"{tmp_path}/more.jsonl"
    phases = PHASES.replace("ONE", one).replace("TWO", two)
    settings = [*SETTINGS, f"data.pretrain={json.dumps([one, two])}", f"pretrain.phases={phases}", "data.part_bytes=65536"]
    return pipeline.run(recipe_file.load(words, settings), only="data")


def test_the_documents_of_a_batch_are_those_whose_words_it_holds(run: Path, tmp_path: Path) -> None:
    shards, tokenizer = TokenShards(run / "data/pretrain/train"), load(run / "data/tokenizer")
    for step, tokens in ((1, 3 * 64), (3, 3 * 32)):
        found = batch(run, step)
        assert sum(document.tokens for document in found) == tokens
        if step == 3:
            assert {Path(document.source).name for document in found} == {"more.jsonl"}
        for document in found:
            line = Path(document.file).read_bytes()[document.at :].splitlines()[0]
            text = json.loads(line)["text"]
            assert text.startswith(document.head)
            ids = [*tokenizer.encode(text), tokenizer.end_of_text]
            assert document.tokens <= len(ids)
            assert document.id in shards.document_ids(0, shards.tokens)
    with pytest.raises(RecipeError, match="pretrains for 4 steps"):
        batch(run, 5)


def test_plain_steps_are_those_of_the_permutation(ray_session: None, words: Path) -> None:  # noqa: F811
    run = pipeline.run(recipe_file.load(words, [*SETTINGS, "pretrain.steps=5"]), only="data")
    shards = TokenShards(run / "data/pretrain/train")
    units = batch_indices(0, 3, 3, shards.windows(64), shards.manifest_hash)
    expected = [name for unit in units for name in shards.document_ids(int(unit) * 64, int(unit) * 64 + 64)]
    assert [document.id for document in batch(run, 4)] == list(dict.fromkeys(expected))


def test_what_is_taken_out_is_in_no_batch_and_what_stands_on_it_out_of_date(run: Path) -> None:
    before = json.loads((run / "data/manifest.json").read_text())
    victim = batch(run, 1)[0]
    gone = remove(run, [victim.id[:12]])
    assert [(document.id, document.head) for document in gone] == [(victim.id, victim.head)]
    for step in range(1, 5):
        assert victim.id not in {document.id for document in batch(run, step)}
    after = json.loads((run / "data/manifest.json").read_text())
    assert after["made_at"] > before["made_at"]
    assert after["hash"] == before["hash"]
    assert artefacts.state(run / "data", artefacts.Identity(**{k: after[k] for k in ("stage", "recipe", "inputs", "parents")})) == "made"


def test_an_excluded_document_is_left_out(ray_session: None, words: Path, run: Path, tmp_path: Path) -> None:  # noqa: F811
    victim = batch(run, 1)[0].id
    (tmp_path / "unwanted.txt").write_text(victim + "\n")
    again = pipeline.run(recipe_file.load(words, [*SETTINGS, f"data.exclude={tmp_path}/unwanted.txt", "name=other"]), only="data")
    manifest = json.loads((again / "data/pretrain/manifest.json").read_text())
    assert [entry[2] for entry in manifest["fates"] if entry[0] == "excluded"] == [1]
    (tmp_path / "unwanted.txt").write_text("0123\n")
    with pytest.raises(RecipeError, match=r"unwanted\.txt line 1: a document's id is 32 hexadecimal digits"):
        pipeline.run(recipe_file.load(words, [*SETTINGS, f"data.exclude={tmp_path}/unwanted.txt", "name=other"]), only="data")


def test_the_commands(run: Path) -> None:
    shown = CliRunner().invoke(app, ["data", "why", str(run), "--step", "1"], env={"COLUMNS": "300"})
    assert shown.exit_code == 0, shown.output
    name = re.search("[0-9a-f]{32}", shown.output)
    assert name is not None
    dropped = CliRunner().invoke(app, ["data", "drop", str(run), "--doc", name[0]], env={"COLUMNS": "300"})
    assert dropped.exit_code == 0, dropped.output
    assert "1 documents are out of" in dropped.output
    with pytest.raises(DataError, match="has no document"):
        remove(run, ["0" * 32])


def test_the_page_tells_steps_reasons_and_sources(run: Path) -> None:
    page = (run / "data/report.html").read_text()
    manifest = json.loads((run / "data/pretrain/manifest.json").read_text())
    assert "Step by step" in page
    for source in manifest["sources"]:
        assert source["source"] in page
        assert f"{source['train']['tokens']:,}" in page
    assert "Phase 2" in page
    assert "<script" not in page
    assert page.count("<svg") == 1


def test_a_dry_run_is_held_against_the_full_run(ray_session: None, words: Path, tmp_path: Path) -> None:  # noqa: F811
    settings = [*SETTINGS, "name=planned"]
    arguments = ["data", "plan", str(words), *settings, "--share", "1"]
    shown = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    run = pipeline.run(recipe_file.load(words, settings), only="data")
    summary = json.loads((run / "summary.json").read_text())
    manifest = json.loads((run / "data/pretrain/manifest.json").read_text())
    assert summary["data/predicted/rows"] == manifest["rows"]
    assert summary["data/predicted/documents"] == summary["data/train_documents"] + summary["data/validation_documents"]
    assert "What a dry run predicted" in (run / "data/report.html").read_text()
