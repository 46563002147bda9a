"""Parts are done once, in order, whatever dies; a real corpus comes out the same after any number of kills."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from data.engine import each_part, lumps
from data.errors import DataError
from data.files import sha256_of
from data.parts import Part
from data.readers import Piece

ROOT = Path(__file__).resolve().parent.parent


PARTS = [Part(i, (Piece(0, f"thing-{i}.jsonl", 0, 1_000_000),)) for i in range(5)]


def test_results_come_in_order_and_only_once_per_key(ray_session: None, tmp_path: Path) -> None:
    def work(part: Part) -> dict[str, int]:
        with open(tmp_path / f"calls-{part.number}", "a") as file:
            file.write(".")
        return {"rows": part.number * 10}

    said: list[tuple[int, int, str]] = []
    results = each_part("count", work, PARTS, tmp_path / "work", "a", lambda *args: said.append(args))
    assert [r["rows"] for r in results] == [0, 10, 20, 30, 40]
    assert [(done, of) for done, of, _ in said] == [(i, 5) for i in range(6)]
    assert "rows/s" in said[-1][2]
    assert said[-1][2].endswith("0:00 left")
    (tmp_path / "work/000003.json").write_text('{"key": "a", "resu')  # half a marker is none
    assert each_part("count", work, PARTS, tmp_path / "work", "a") == results
    assert [(tmp_path / f"calls-{i}").read_text() for i in range(5)] == [".", ".", ".", "..", "."]
    each_part("count", work, PARTS, tmp_path / "work", "b")
    assert [(tmp_path / f"calls-{i}").read_text() for i in range(5)] == ["..", "..", "..", "...", ".."]


def test_tasks_are_large_first_and_few_parts_last() -> None:
    mb = 1 << 20
    assert lumps([8 * mb] * 16, 2) == [4, 7, 10, 12, 14, 15, 16]
    assert lumps([8 * mb] * 1000, 2)[:2] == [8, 16]  # LUMPS
    assert lumps([100 * mb] * 3, 2) == [1, 2, 3]
    assert lumps([mb] * 4, 2) == [2, 3, 4]
    assert lumps([mb] * 3, 8) == [1, 2, 3]
    assert lumps([], 2) == []


def test_two_tasks_run_at_once_from_the_beginning(ray_session: None, tmp_path: Path) -> None:
    """Ray Data would run one at a time for its first second, and so for the whole of a small corpus."""

    def work(part: Part) -> dict[str, int]:
        (tmp_path / f"began-{part.number}").touch()
        end = time.monotonic() + 5
        while len(list(tmp_path.glob("began-*"))) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        return {"rows": len(list(tmp_path.glob("began-*")))}

    each_part("count", lambda part: {"rows": 0}, PARTS, tmp_path / "warm", "a")
    results = each_part("count", work, PARTS[:2], tmp_path / "work", "a")
    assert results[0]["rows"] == 2


def test_a_part_whose_worker_died_is_done_again(ray_session: None, tmp_path: Path) -> None:
    def work(part: Part) -> dict[str, int]:
        if part.number == 2 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"rows": part.number}

    assert [r["rows"] for r in each_part("count", work, PARTS, tmp_path / "work", "a")] == [0, 1, 2, 3, 4]
    assert (tmp_path / "died").exists()


def test_a_part_that_keeps_killing_its_workers_is_named(ray_session: None, tmp_path: Path) -> None:
    def work(part: Part) -> dict[str, int]:
        if part.number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"rows": part.number}

    with pytest.raises(DataError, match=r"died 4 times on thing-2\.jsonl.*data\.part_bytes"):
        each_part("count", work, PARTS, tmp_path / "work", "a", deadline_s=400)


def test_what_work_raises_arrives_with_the_parts_name(ray_session: None, tmp_path: Path) -> None:
    def work(part: Part) -> dict[str, int]:
        raise ZeroDivisionError("by 0")

    with pytest.raises(Exception, match=r"thing-0\.jsonl: ZeroDivisionError\('by 0'\)"):
        each_part("count", work, PARTS[:1], tmp_path / "work", "a")


def test_a_wait_ends_at_its_deadline_and_names_the_part(ray_session: None, tmp_path: Path) -> None:
    def work(part: Part) -> dict[str, int]:
        time.sleep(15)
        return {}

    with pytest.raises(DataError, match=r"no part was done within 8 s; in work: "):
        each_part("count", work, PARTS[:1], tmp_path / "work", "a", deadline_s=8)


DRIVER = """
import os, sys
from pathlib import Path
import ray
from cluster.connect import connect
from data.pipeline import prepare_text
files, out, where = sorted(Path(sys.argv[1]).glob("*.jsonl")), Path(sys.argv[2]), sys.argv[3]
if not where.isdigit():
    ray.init(address=where, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}})
with connect("local", num_cpus=int(where) if where.isdigit() else None):
    prepare_text(files, 330, out, validation_fraction=0.1, max_broken_fraction=0.1, shard_tokens=20_000, part_bytes=60_000)
"""


def corpus(folder: Path, documents: int = 1500) -> Path:
    """Different texts, equal ones, and broken lines, in three files."""
    folder.mkdir()
    chance = random.Random(7)
    words = [f"{a}{b}{c}" for a in ("re", "un", "mo", "sta") for b in ("lo", "ti", "ka") for c in ("ng", "ment", "s", "re")]
    texts: list[str] = []
    for _ in range(documents):
        again = bool(texts) and chance.random() < 0.1
        texts.append(chance.choice(texts) if again else " ".join(chance.choices(words, k=chance.randint(20, 200))))
    for number in range(3):
        lines = [json.dumps({"text": text}) for text in texts[number::3]]
        lines[10] = "{broken"
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def start(texts: Path, out: Path, where: int | str) -> subprocess.Popen[bytes]:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(texts), str(out), str(where)],
        env=env,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def sums(out: Path) -> dict[str, str]:
    """Of all that is left of a corpus; costs.json alone says how fast it went."""
    return {str(path.relative_to(out)): sha256_of(path) for path in sorted(out.rglob("*")) if path.is_file() and path.name != "costs.json"}


@pytest.mark.slow
def test_one_two_and_four_workers_leave_the_same_bytes(tmp_path: Path) -> None:
    texts = corpus(tmp_path / "texts")
    found = {}
    for cpus in (1, 2, 4):
        assert start(texts, tmp_path / str(cpus), cpus).wait(timeout=300) == 0
        found[cpus] = sums(tmp_path / str(cpus))
    assert len(found[1]) > 30
    assert found[1] == found[2] == found[4]


@pytest.mark.slow
def test_ten_kills_of_the_driver_leave_the_same_bytes(ray_session: None, tmp_path: Path) -> None:
    """SIGKILL, which nothing can catch, at moments that chance picks; after each, the same command again, while Ray may not have ended the
    tasks of the last one yet. Moments are counted from the next part that gets done."""
    texts, cluster = corpus(tmp_path / "texts"), ray.get_runtime_context().gcs_address
    assert start(texts, tmp_path / "whole", cluster).wait(timeout=300) == 0
    chance, out = random.Random(3), tmp_path / "killed"
    kills = 0
    while kills < 10:
        driver = start(texts, out, cluster)
        markers = len(list(out.glob("work/*/*.json")))
        end = time.monotonic() + 120
        while len(list(out.glob("work/*/*.json"))) == markers and driver.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.3))
        if driver.poll() is not None:  # it was through before chance struck
            break
        driver.kill()
        driver.wait(timeout=60)
        kills += 1
    assert kills >= 3
    assert start(texts, out, cluster).wait(timeout=300) == 0
    assert sums(out) == sums(tmp_path / "whole")


@pytest.mark.slow
def test_ten_times_the_corpus_takes_the_same_memory(tmp_path: Path) -> None:
    """Of a worker at most; `python -m benchmarks.data_memory` looks at the driver and the object store too."""
    most = {}
    for documents in (600, 6000):
        texts, out = corpus(tmp_path / f"texts-{documents}", documents), tmp_path / f"out-{documents}"
        assert start(texts, out, 2).wait(timeout=300) == 0
        most[documents] = json.loads((out / "costs.json").read_bytes())["worker_mb"]
    assert most[6000] <= 1.2 * most[600]
