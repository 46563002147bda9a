"""What all tests share: one Ray session, one cache of fetched corpora, one thread per process."""

import os

# Before torch, ray or a tokenizer is imported anywhere: two busy processes of two threads each stall on two cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent

# Shared cores make single examples slow now and then; that is no fault of the code under test. Every run draws the same
# examples, so that a red run is red again on the next machine; `ROUNDHOUSE_TEST_EXPLORE=1 make test` draws new ones.
settings.register_profile(
    "shared",
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
    derandomize="ROUNDHOUSE_TEST_EXPLORE" not in os.environ,
)
settings.load_profile("shared")


# Files that take minutes, longest first: with two processes (`make test`) one of them must not begin the longest at the end.
LONGEST = ("journey", "ppo", "ppo_family", "distill", "placement", "tuning", "colocation", "training", "learner", "jobs")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Ray on this machine with two CPUs, started once for the whole session."""
    from cluster.connect import connect

    with connect("local", num_cpus=2):
        yield


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the catalogue keeps what it fetched. `ROUNDHOUSE_TEST_CACHE` keeps it between sessions."""
    kept = os.environ.get("ROUNDHOUSE_TEST_CACHE")
    folder = Path(kept).expanduser() if kept else tmp_path_factory.mktemp("cache")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def recipe_text(tmp_path: Path) -> str:
    """The smallest valid recipe, on files of its own; its run stays below `tmp_path`."""
    (tmp_path / "speech.txt").write_text("Fellow citizens, we are one.\n" * 50)
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n')
    (tmp_path / "pairs.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}], "chosen": "Hello", "rejected": "No"}\n')
    (tmp_path / "prompts.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    return f"""\
name: tiny
runs_dir: {tmp_path}/runs
data:
  pretrain: [{tmp_path}/speech.txt]
  sft: [{tmp_path}/chat.jsonl]
  preferences: [{tmp_path}/pairs.jsonl]
  prompts: [{tmp_path}/prompts.jsonl]
pretrain:
  steps: 3
"""


@pytest.fixture
def recipe_path(tmp_path: Path, recipe_text: str) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(recipe_text)
    return path
