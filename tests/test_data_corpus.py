"""What is left of a corpus beside its tokens: every row's fate, the documents by their ids, and what a dry run says beforehand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_pipeline import TEXTS, jsonl, prepare, texts_of
from test_data_tokenizers import TRAINED

from data import corpus, dry_run, fates
from data.cleaning import Cleaning, text_id
from data.errors import DataError
from data.files import sha256_of
from data.mixture import sources
from data.pipeline import prepare_text
from data.refine import Steps
from data.rules import Quality, merged
from data.shards import TokenShards

pytestmark = pytest.mark.usefixtures("ray_session")

SYLLABLES = [f"{a}{b}" for a in ("ban", "tor", "me", "ku", "sil") for b in ("da", "ri", "nos", "t", "quen", "la")]


def words(number: int, count: int) -> str:
    """`count` words, others for every number."""
    return " ".join(np.random.default_rng(number).choice(SYLLABLES, count))


LONG = [words(i, 60) for i in range(30)]
ROWS: list[Any] = [
    *({"text": text} for text in LONG),
    {"text": LONG[2]},
    {"text": LONG[4] + " One more word."},
    {"text": "too short to say anything"},
    {"text": ["no text"]},
    {"text": None},
]


def at_least(count: int) -> Quality:
    """One rule for all languages: so many words."""
    off = dict.fromkeys(merged()["gopher"])
    return Quality({"other": ("gopher@1",)}, merged({"gopher": {**off, "min_words": count}}), min_language_score=0)


def everything(folder: Path, part_bytes: int = 6000) -> dict[str, Any]:
    """A corpus in which something happens to documents for every reason; its manifest."""
    path = jsonl(folder / "rows.jsonl", ROWS)
    steps = Steps(cleaning=Cleaning(drop_missing=True), quality=at_least(6), near_duplicates=True)
    prepare([path], folder / "out", broken=0.5, steps=steps, part_bytes=part_bytes)
    return dict(json.loads((folder / "out/manifest.json").read_text()))


def test_every_row_has_one_fate_and_its_reason(tmp_path: Path) -> None:
    manifest = everything(tmp_path)
    rows = fates.documents(tmp_path / "out").to_table().to_pylist()
    assert len(rows) == manifest["rows"] == len(ROWS) == sum(n for _, _, n, *_ in manifest["fates"])
    kept, *dropped = [[row for row in rows if (row["fate"] in fates.KEPT) == kept] for kept in (True, False)]
    assert [row["id"] for row in kept] == [text_id(text) for text in LONG]
    assert [(row["fate"], row["reason"]) for row in dropped[0]] == [
        ("duplicate", None),
        ("near-duplicate", None),
        ("quality", "gopher@1: min_words"),
        ("broken", 'no text: {"text": "..."} with something in it is needed'),
        ("unusable", "no text"),
    ]
    assert [row["of"] for row in dropped[0][:2]] == [text_id(LONG[2]), text_id(LONG[4])]
    assert manifest["clusters"] == {"2": 2}
    assert manifest["dropped: no text"] == 1
    assert {row["head"] for row in kept} == {" ".join(text[:160].split()) for text in LONG}
    for row in kept:
        assert row["tokens"] == len(TRAINED.encode(LONG[kept.index(row)])) + 1
    assert manifest["samples"]["quality: gopher@1: min_words"][0][3] == "too short to say anything"
    assert manifest["languages"]


def test_signals_stay_beside_the_fates(tmp_path: Path) -> None:
    everything(tmp_path)
    signals = ds.dataset(tmp_path / "out/documents", format="parquet", exclude_invalid_files=True)
    table = signals.to_table(["id", "full_words", "tokens"])
    assert table["full_words"].null_count == 2  # the broken and the missing
    assert pc.min(table["full_words"]).as_py() == 5
    assert pc.all(pc.greater(table.filter(table["id"].is_valid())["tokens"], 0)).as_py()  # an estimate where dropped


def test_parts_change_no_fate(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, many = everything(tmp_path / "a", 10**9), everything(tmp_path / "b", 3000)
    assert one["parts"] == 1
    assert many["parts"] > 3
    for name in ("fates", "languages", "lengths", "clusters", "samples", "sources"):
        was, now = json.dumps(one[name]), json.dumps(many[name])
        if name == "fates":  # tokens of what is dropped are estimates from the part
            was, now = (json.dumps([entry[:4] for entry in m["fates"]]) for m in (one, many))
        assert was.replace("/a/", "/b/") == now


def test_a_document_is_found_by_the_beginning_of_its_id(tmp_path: Path) -> None:
    prepare([jsonl(tmp_path / "a.jsonl", [{"text": t} for t in [*TEXTS, TEXTS[5]]])], tmp_path / "out", part_bytes=3000)
    name = text_id(TEXTS[5]).hex()
    for known in (name, name[:12], name[:8].upper()):
        found = corpus.find(tmp_path / "out", [known]).to_pylist()
        assert [row["id"].hex() for row in found] == [name, name]  # it stands there twice
        assert [row["fate"] in fates.KEPT for row in found] == [True, False]
    with pytest.raises(DataError, match=r"no document id: 32 hexadecimal digits"):
        corpus.find(tmp_path / "out", ["xyz"])
    with pytest.raises(DataError, match=r"has no document 00000000000"):
        corpus.find(tmp_path / "out", ["0" * 32])


@given(st.sets(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=8))
@settings(max_examples=8)
def test_dropping_documents_leaves_the_stream_without_them(tmp_path_factory: pytest.TempPathFactory, chosen: set[int]) -> None:
    folder = tmp_path_factory.mktemp("drop")
    files = [jsonl(folder / f"{i}.jsonl", [{"text": t} for t in TEXTS[i::2]]) for i in range(2)]
    prepare(files, folder / "out", part_bytes=2500)
    before = {path: sha256_of(path) for path in (folder / "out").rglob("*.bin")}
    gone = [TEXTS[i] for i in chosen]
    holding = {row["part"] for row in corpus.find(folder / "out", [text_id(t).hex() for t in gone]).to_pylist()}
    for half in (gone[::2], gone[1::2]):  # in two goes
        if half:
            corpus.drop(folder / "out", corpus.find(folder / "out", [text_id(t).hex()[:16] for t in half]))
    left = [t for i in range(2) for t in TEXTS[i::2] if t not in gone]
    assert sorted(texts_of(folder / "out/train") + texts_of(folder / "out/validation")) == sorted(left)
    assert [t for t in left if t in set(texts_of(folder / "out/train"))] == texts_of(folder / "out/train")
    manifest = json.loads((folder / "out/manifest.json").read_text())
    assert fates.of_fate(manifest, "removed") == len(gone)
    for split in ("train", "validation"):
        shards = TokenShards(folder / "out" / split)
        assert sum(s.tokens for s in sources(folder / "out", split)) == shards.tokens == manifest[split]["tokens"]
    for path, was in before.items():
        if int(path.name[:5]) not in holding:
            assert sha256_of(path) == was


def test_a_drop_that_was_cut_short_is_finished_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare([jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])], tmp_path / "out", part_bytes=3000)
    rows = corpus.find(tmp_path / "out", [text_id(t).hex() for t in TEXTS[:20]])

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(corpus, "declare", dies)
        with pytest.raises(KeyboardInterrupt):
            corpus.drop(tmp_path / "out", rows)
    old = [TokenShards(tmp_path / "out" / split) for split in ("train", "validation")]
    assert sum(shards.documents for shards in old) == len(TEXTS)  # the old corpus is whole
    for shards in old:
        shards.verify()
    corpus.drop(tmp_path / "out", corpus.find(tmp_path / "out", [text_id(TEXTS[0]).hex()]))
    assert set(texts_of(tmp_path / "out/train") + texts_of(tmp_path / "out/validation")) == set(TEXTS[20:])


def test_a_dry_run_says_what_the_full_run_finds(tmp_path: Path) -> None:
    rows = [{"text": words(i, 1 + i * 7919 % 200)} for i in range(6000)]
    rows[5::50] = [{"no": "text"}] * len(rows[5::50])
    path = jsonl(tmp_path / "a.jsonl", rows)
    steps = Steps(quality=at_least(50))
    predicted = dry_run.predict([path], TRAINED, steps, share=0.05)
    prepare_text(
        [path],
        TRAINED,
        tmp_path / "out",
        validation_fraction=0.1,
        max_broken_fraction=0.1,
        shard_tokens=10**7,
        steps=steps,
    )
    manifest, costs = (json.loads((tmp_path / "out" / name).read_text()) for name in ("manifest.json", "costs.json"))
    found = dry_run.found(manifest, costs)
    for name, tolerance in (("rows", 0.1), ("documents", 0.1), ("tokens", 0.1), ("dropped", 0.2), ("broken", 0.4)):
        assert predicted[name] == pytest.approx(found[name], rel=tolerance), name
    assert 0 < predicted["core_hours"] < 10 * found["core_hours"]
    assert 0 < found["worker_mb"] < 4 * predicted["worker_mb"]
