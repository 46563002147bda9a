"""Duplicates against brute force and networkx: the same documents for any cut of the work, any number of workers, killed and resumed."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import clusters, minhash, pairs, shuffle
from data.cleaning import text_id
from data.clusters import dropped_rows, exact_duplicates, near_duplicates
from data.shuffle import of_range

pytestmark = pytest.mark.usefixtures("ray_session")


def some_texts(seed: int, count: int) -> list[str]:
    """Texts of 80 words: a third strangers, others copies of few, with up to 5 words changed in place or none."""
    rng = np.random.default_rng(seed)
    letters = np.ascontiguousarray(rng.integers(97, 123, (count, 80, 7), dtype=np.uint8)).view("S7")[..., 0].astype(str)
    texts = []
    for i in range(count):
        row = letters[i].copy() if i < 10 or rng.random() < 1 / 3 else letters[rng.integers(10)].copy()
        at = rng.integers(80 - 5)
        row[at : at + rng.integers(6)] = letters[i, 0]
        texts.append(" ".join(row))
    return texts


def write_parts(folder: Path, texts: list[str], cuts: list[int], left_out: frozenset[int] = frozenset()) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    columns = {"id": pa.array(map(text_id, texts), pa.binary(16)), **minhash.columns(texts, np.zeros(len(texts), bool))}
    table = pa.table(
        {name: pa.array([None if i in left_out else x for i, x in enumerate(c.to_pylist())], c.type) for name, c in columns.items()}
    )
    paths = []
    for number, (begin, end) in enumerate(zip([0, *cuts], [*cuts, len(texts)], strict=True)):
        paths.append(folder / f"{number}.parquet")
        pq.write_table(table.slice(begin, end - begin), paths[-1])
    return paths


def write_texts(folder: Path, texts: list[str], cuts: list[int], left_out: frozenset[int] = frozenset()) -> list[Path]:
    """The texts of the parts that `write_parts` writes."""
    paths = []
    for number, (begin, end) in enumerate(zip([0, *cuts], [*cuts, len(texts)], strict=True)):
        paths.append(folder / f"{number}.texts.parquet")
        rows = [i for i in range(begin, end) if i not in left_out]
        table = {"row": [i - begin for i in rows], "text": pa.array([texts[i] for i in rows], pa.large_string())}
        pq.write_table(pa.table(table), paths[-1])
    return paths


def all_dropped(out: Path, cuts: list[int]) -> dict[int, tuple[bytes, int]]:
    """Document -> (id of the one it repeats, size of its cluster)."""
    found = {}
    for part, begin in enumerate([0, *cuts]):
        rows = dropped_rows(out, part).to_pylist()
        assert [row["row"] for row in rows] == sorted(row["row"] for row in rows)
        found |= {begin + row["row"]: (row["kept"], row["cluster"]) for row in rows}
    return found


def of_graph(texts: list[str], graph: nx.Graph) -> dict[int, tuple[bytes, int]]:
    found = {}
    for component in nx.connected_components(graph):
        first = min(component)
        found |= {i: (text_id(texts[first]), len(component)) for i in component if i != first}
    return found


def similarities(texts: list[str]) -> np.ndarray:
    """Jaccard similarity of the 5-grams of all pairs, `[n, n]`."""
    sets = [{tuple(of[i : i + 5]) for i in range(max(1, len(of) - 4))} for of in (text.split() for text in texts)]
    return np.array([[len(a & b) / len(a | b) for b in sets] for a in sets])


def same_bytes(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in other.iterdir()) and all((one / n).read_bytes() == (other / n).read_bytes() for n in names)


def test_exact_duplicates_are_all_but_the_first(tmp_path: Path) -> None:
    texts = some_texts(0, 300)
    parts = write_parts(tmp_path, texts, [50, 50, 260], frozenset({3, 70, 71}))
    manifest = exact_duplicates(parts, tmp_path / "exact")
    there = [i for i in range(300) if i not in (3, 70, 71)]
    first = {text: i for i, text in reversed([(i, texts[i]) for i in there])}
    found = all_dropped(tmp_path / "exact", [50, 50, 260])
    assert list(found) == [i for i in there if first[texts[i]] != i]
    assert manifest["dropped"] == len(found) > 10
    assert all(kept == text_id(texts[i]) and size == sum(texts[i] == texts[j] for j in there) for i, (kept, size) in found.items())


@pytest.mark.parametrize("with_texts", [True, False])
def test_near_duplicates_are_the_components_of_brute_force(tmp_path: Path, with_texts: bool) -> None:
    texts = some_texts(1, 120)
    cuts = [40, 90]
    parts = write_parts(tmp_path, texts, cuts)
    near_duplicates(parts, tmp_path / "near", texts=write_texts(tmp_path, texts, cuts) if with_texts else [])
    keys, sketches = minhash.fingerprints(texts, np.zeros(120, bool))
    similar = similarities(texts)
    graph = nx.Graph()
    graph.add_nodes_from(range(120))
    for a, b in combinations(range(120), 2):
        estimate = minhash.similarity(sketches[a], sketches[b])
        linked = similar[a, b] >= pairs.SIMILAR if with_texts else estimate >= pairs.LEAST
        if (keys[a] == keys[b]).any() and linked and estimate >= pairs.DOUBTFUL:
            graph.add_edge(a, b)
    found = all_dropped(tmp_path / "near", cuts)
    assert found == of_graph(texts, graph)
    assert {b for a, b in combinations(range(120), 2) if similar[a, b] > 0.9} <= set(found)
    np.fill_diagonal(similar, 0)
    assert similar[sorted(found)].max(axis=1).min() > (0.799 if with_texts else 0.6)
    assert ((similar > 0.68) & (similar < 0.95)).sum() > 50  # there was something to doubt


def test_the_sets_behind_the_signatures(tmp_path: Path) -> None:
    texts = [*some_texts(5, 20), "", "one two", "a b c d e a b c d e a"]
    sets = minhash.sets(texts, np.zeros(len(texts), bool))
    similar = similarities(texts[:20])
    for a, b in combinations(range(20), 2):
        both = len(np.intersect1d(sets[a], sets[b]))
        assert both / (len(sets[a]) + len(sets[b]) - both) == pytest.approx(similar[a, b])
    assert [len(one) for one in sets[20:]] == [0, 1, 5]


def test_how_the_work_is_cut_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = some_texts(2, 240)
    parts = write_parts(tmp_path, texts, [1, 60, 130, 200], frozenset({7}))
    more = write_texts(tmp_path, texts, [1, 60, 130, 200], frozenset({7}))

    def both(out: Path) -> None:
        exact_duplicates(parts, out / "exact")
        near_duplicates(parts, out / "near", texts=more, without=out / "exact")

    both(tmp_path / "whole")
    assert len(pq.read_table(tmp_path / "whole/near/00004.parquet")) > 5
    monkeypatch.setattr(clusters, "ROWS", 80)
    for module in (clusters, pairs):
        monkeypatch.setattr(module, "RECORDS", 600)
    monkeypatch.setattr(pairs, "USUAL", 20)
    both(tmp_path / "pieces")
    monkeypatch.setattr(shuffle, "_job", shuffle._job.options(num_cpus=2))  # one at a time
    both(tmp_path / "alone")
    for kind in ("exact", "near"):
        assert same_bytes(tmp_path / "whole" / kind, tmp_path / "pieces" / kind)
        assert same_bytes(tmp_path / "whole" / kind, tmp_path / "alone" / kind)


def test_a_killed_run_goes_on_and_a_finished_one_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, cuts = some_texts(3, 200), [60, 130]
    parts, more = write_parts(tmp_path, texts, cuts), write_texts(tmp_path, texts, cuts)
    monkeypatch.setattr(clusters, "ROWS", 70)
    once, again = tmp_path / "once", tmp_path / "again"
    near_duplicates(parts, once, texts=more)

    def fails(*_: Any) -> Any:
        raise RuntimeError("killed")

    def killed_at(module: Any, step: str) -> dict[Path, int]:
        with monkeypatch.context() as patched:
            patched.setattr(module, step, fails)
            with pytest.raises(Exception, match="killed"):
                near_duplicates(parts, again, texts=more)
        assert not (again / "manifest.json").exists()
        return {path: path.stat().st_mtime_ns for path in again.rglob("*.rows")}

    for module, step in ((pairs, "_met"), (pairs, "_pairs"), (pairs, "_judged"), (clusters, "_large_star")):
        killed_at(module, step)
    (gone,) = again.glob("work-*/bands/000001.rows")
    gone.unlink()  # as if it had been killed in that job
    made = killed_at(clusters, "_named")
    assert killed_at(clusters, "_named") == made  # what is there is not made again
    near_duplicates(parts, again, texts=more)
    assert same_bytes(once, again)

    made = {path: path.stat().st_mtime_ns for path in again.iterdir()}
    near_duplicates(parts, again, texts=more)
    assert {path: path.stat().st_mtime_ns for path in again.iterdir()} == made
    near_duplicates(parts, again)  # another question
    assert json.loads((again / "manifest.json").read_text())["texts"] == 0


def test_what_an_earlier_corpus_holds_is_dropped_in_its_favour(tmp_path: Path) -> None:
    texts = some_texts(4, 300)
    cuts = [100, 180, 230]
    parts = write_parts(tmp_path, texts, cuts)
    for kind, find in (("exact", exact_duplicates), ("near", near_duplicates)):
        find(parts, tmp_path / kind / "all")
        find(parts[2:], tmp_path / kind / "new", against=parts[:2])
        for part in (0, 1):
            whole, new = dropped_rows(tmp_path / kind / "all", part + 2), dropped_rows(tmp_path / kind / "new", part)
            assert whole.drop_columns("earlier") == new.drop_columns("earlier")
            before = {text_id(text) for text in texts[:180]}
            assert [row["earlier"] for row in new.to_pylist()] == [row["kept"] in before for row in new.to_pylist()]
            assert any(new["earlier"].to_pylist())
        assert not (tmp_path / kind / "new/00002.parquet").exists()


LINKS = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 59)).map(sorted).filter(lambda p: p[0] < p[1]), max_size=60)


@settings(max_examples=10)
@given(LINKS, st.integers(1, 3))
def test_components_are_those_of_networkx(tmp_path_factory: pytest.TempPathFactory, links: list[list[int]], ranges: int) -> None:
    found = stars(tmp_path_factory.mktemp("stars"), links, ranges)
    graph = nx.Graph(links)
    assert found == {node: min(component) for component in nx.connected_components(graph) for node in component if node != min(component)}


def test_a_chain_takes_few_rounds(tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(1000)
    chain = [sorted(pair) for pair in zip(order[1:].tolist(), order[:-1].tolist(), strict=True)]
    assert set(stars(tmp_path, chain, 2).values()) == {0}
    assert len(list(tmp_path.glob("large-*"))) <= 12


def spread_out(folder: Path, rows: np.ndarray, ranges: int) -> shuffle.Stage:
    """Rows as a stage, ranged by their first number."""

    def as_they_are() -> tuple[np.ndarray, np.ndarray, int]:  # in here, so that workers need not import this file
        return rows, of_range(rows[:, 0] * shuffle.SPREAD, ranges), 0

    return shuffle.shuffle(folder, as_they_are, [()], ranges)


def stars(folder: Path, links: list[list[int]], ranges: int) -> dict[int, int]:
    rows = np.array([pair[::-1] for pair in links], np.uint64).reshape(-1, 2)
    end = clusters.connected(spread_out(folder / "pairs", rows, ranges), folder)
    return {int(node): int(least) for number in range(ranges) for node, least in end.read(number)}


def test_large_buckets_are_cut_and_stay_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "CHUNK", 10)
    corpus = shuffle.Corpus((), 0, (0, 1), 50)
    rows = np.array([[key, place] for place in range(25) for key in (5, 6 + place)], np.uint64)
    found, _, _ = pairs._shared(corpus, spread_out(tmp_path / "bands", rows, 1), 0)
    buckets: dict[int, list[int]] = {}
    for place, key in found.tolist():
        buckets.setdefault(key, []).append(place)
    assert sorted(map(sorted, buckets.values())) == sorted([[*range(10)], [0, *range(10, 20)], [0, *range(20, 25)]])
