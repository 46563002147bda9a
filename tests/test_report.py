"""The page and the picture, from the files of a whole run, of a part of one, and of one with hostile words in it."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from rlhf import charts, report

ATTACK = "<script>alert(1)</script>&\"'<img src=x onerror=alert(2)>"


def make_run(run_dir: Path, seed: int = 0) -> Path:
    """The files that a finished run leaves, with numbers of a likely size."""
    rng = np.random.default_rng(seed)

    def lines(stage: str, rows: list[dict]) -> None:
        (run_dir / stage).mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps({"step": i + 1, "time": 1.0 + i, **row}) + "\n" for i, row in enumerate(rows))
        (run_dir / stage / "metrics.jsonl").write_text(text)

    def noise(scale: float) -> float:
        return float(rng.normal() * scale)

    pretrain = [{"pretrain/loss": 3.9 + 4.4 * math.exp(-i / 45) - i / 900 + noise(0.08)} for i in range(400)]
    for i in range(49, 400, 50):
        loss = 3.95 + 4.3 * math.exp(-i / 45) - i / 900
        pretrain[i] |= {"pretrain/val_loss": loss, "pretrain/val_bits_per_byte": loss * 0.49}
    lines("pretrain", pretrain)
    sft = [{"sft/loss": 2.6 + 2.2 * math.exp(-i / 60) + noise(0.1)} for i in range(300)]
    for i in range(49, 300, 50):
        sft[i]["sft/val_loss"] = 2.8 + 2 * math.exp(-i / 60)
    lines("sft", sft)
    reward = [
        {"reward/loss": 0.5 + 0.2 * math.exp(-i / 50) + noise(0.05), "reward/accuracy": 0.76 - 0.26 * math.exp(-i / 50) + noise(0.06)}
        for i in range(200)
    ]
    for i in range(49, 200, 50):
        reward[i] |= {"reward/val_loss": 0.5 + 0.1 * math.exp(-i / 50), "reward/pair_accuracy": 0.76 - 0.2 * math.exp(-i / 50)}
    lines("reward", reward)
    ppo = []
    for i in range(40):
        ppo.append({"ppo/reward": -0.4 + i * 0.05 + noise(0.1), "ppo/reward_sd": 1.1 - i / 100, "ppo/kl": 0.12 * i + abs(noise(0.1))})
        ppo[-1] |= {
            "ppo/log_prob_gap": 4e-6 * math.exp(noise(0.4)),
            "sync/log_prob_gap": 2e-6 * math.exp(noise(0.5)),
            "ppo/response_tokens": 18 + noise(1),
        }
    lines("ppo", ppo)
    words = [
        "the film is a mess, and not even a funny one",
        "a warm, funny and beautifully acted film that stays with you",
        "it is what it is",
    ]
    starts = ["the", "a warm", "it is", "one of"]
    samples = [
        {
            "prompt": f"<|user|>Write a line of a film review that begins with: {starts[i % 4]}<|end|><|assistant|>",
            "sft": words[i % 3],
            "aligned": words[(i + 1) % 3],
            "sft_reward": -0.8 + 0.2 * i,
            "aligned_reward": 1.4 - 0.25 * i,
            "sft_independent": -2.0 + i,
            "aligned_independent": 4.0 - 0.5 * i,
        }
        for i in range(6)
    ]
    figures = {
        "data": {"data/train_tokens": 2_901_233, "data/bytes_per_token": 4.06},
        "pretrain": {"pretrain/val_loss": 3.51, "pretrain/val_bits_per_byte": 1.742, "pretrain/parameters": 4_198_144},
        "sft": {"sft/val_loss": 2.8},
        "reward": {"reward/pair_accuracy": 0.7693},
        "ppo": {"ppo/log_prob_gap_max": 8.1e-06, "ppo/reward_first": -0.41, "ppo/reward_last": 1.55},
        "evaluate": {
            "evaluate/pretrain_bits_per_byte": 1.742,
            "evaluate/sft_bits_per_byte": 2.011,
            "evaluate/aligned_bits_per_byte": 2.034,
            "evaluate/gzip_bits_per_byte": 2.662,
            "evaluate/xz_bits_per_byte": 2.158,
            "evaluate/sft_reward": -0.38,
            "evaluate/aligned_reward": 1.49,
            "evaluate/reward_gain_sd": 1.63,
            "evaluate/kl_nats": 4.7,
            "evaluate/independent_scorer": "afinn",
            "evaluate/sft_independent": 0.21,
            "evaluate/aligned_independent": 1.77,
            "evaluate/independent_gain": 1.56,
        },
    }
    seconds = {"data": 31.2, "pretrain": 262.0, "sft": 61.5, "reward": 48.0, "ppo": 171.9, "evaluate": 34.8}
    summary: dict = {}
    for stage, numbers in figures.items():
        out = run_dir / stage
        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.json").write_text(json.dumps(numbers))
        manifest = {
            "stage": stage,
            "hash": f"{abs(hash(stage)):064x}"[-64:],
            "made_at": "2026-11-22T22:40:00+00:00",
            "wall_seconds": seconds[stage],
        }
        (out / "manifest.json").write_text(json.dumps(manifest))
        summary |= numbers | {f"{stage}/wall_seconds": seconds[stage]}
    (run_dir / "evaluate" / "samples.json").write_text(json.dumps(samples))
    (run_dir / "summary.json").write_text(json.dumps(summary | {"wall_seconds": sum(seconds.values())}))
    return run_dir


class Page(HTMLParser):
    """Checks that tags nest, and collects what they are, their attributes and the text."""

    VOID = {"meta", "br", "img", "link", "input", "hr"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


def read(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert "img" not in page.tags
    for name, value in page.attributes:
        assert not name.startswith("on"), f"{name}={value}"
        assert name not in ("src", "href") or (value or "").startswith("#"), f"{name}={value}"
        assert name != "xlink:href" or (value or "").startswith("#"), f"{name}={value}"
    return page


def test_a_whole_run(tmp_path: Path) -> None:
    path = report.write(make_run(tmp_path / "quickstart"))
    assert path == tmp_path / "quickstart" / "report.html"
    assert path.stat().st_size < 400_000, "small enough to mail"
    page = read(path)
    for text in ("quickstart", "1.742", "76.9", "+1.63", "+1.56", "4.70", "8.1 × 10⁻⁶", "gzip −9", "xz −9", "4,198,144", "afinn"):
        assert text in page.text, text
    assert page.text.count("Write a line of a film review") == 6
    assert "<|user|>" not in page.text
    assert page.tags.count("svg") == 9
    assert "evaluate/kl_nats" in page.text


def test_the_same_numbers_draw_the_same_curves(tmp_path: Path) -> None:
    def drawings() -> list[str]:
        return re.findall(r"<svg.*?</svg>", report.write(make_run(tmp_path / "r")).read_text(), flags=re.DOTALL)

    assert drawings() == drawings()


def test_colours_and_font_are_the_pages(tmp_path: Path) -> None:
    html = report.write(make_run(tmp_path / "r")).read_text()
    assert "prefers-color-scheme: dark" in html
    for svg in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        assert not re.findall(r"#[0-9a-f]{6}\b", svg)
        assert "DejaVu" not in svg
        for target in re.findall(r'url\(#([^)"]+)\)|href="#([^"]+)"', svg):
            assert f'id="{target[0] or target[1]}"' in svg


@pytest.mark.parametrize("there", [[], ["data"], ["data", "pretrain"], ["data", "pretrain", "sft", "reward"], ["evaluate"]])
def test_a_part_of_a_run(tmp_path: Path, there: list[str]) -> None:
    import shutil

    run_dir = make_run(tmp_path / "part")
    (run_dir / "summary.json").unlink()
    for stage in ("data", "pretrain", "sft", "reward", "ppo", "evaluate"):
        if stage not in there:
            shutil.rmtree(run_dir / stage)
    page = read(report.write(run_dir))
    assert ("1.742" in page.text) == ("pretrain" in there or "evaluate" in there)
    assert page.text.count("not made") == 6 - len(there)
    assert report.curves(run_dir, tmp_path / "curves.png").stat().st_size > 1000


def test_a_run_that_learned_from_a_teacher(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "r")
    (run_dir / "recipe.yaml").write_text("align: distill\n")
    (run_dir / "summary.json").unlink()
    (run_dir / "ppo").rename(run_dir / "distill")
    names = {"divergence": 0.5, "log_prob_gap": 2e-6, "response_tokens": 12.0}
    rows = [{"step": i, "sync/log_prob_gap": 1e-6, **{f"distill/{name}": v / i for name, v in names.items()}} for i in (1, 2, 3)]
    (run_dir / "distill" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = {"distill/divergence_first": 0.5, "distill/divergence_last": 0.167, "distill/log_prob_gap_max": 2e-6}
    (run_dir / "distill" / "metrics.json").write_text(json.dumps(figures))
    page = read(report.write(run_dir))
    for text in (
        "Distance from the teacher",
        "0.167",
        "It began at 0.500.",
        "Engine against policy",
        "2.0 × 10⁻⁶",
        "Length of the responses",
    ):
        assert text in page.text, text


def test_while_a_stage_runs(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "r")
    (run_dir / "ppo" / "manifest.json").unlink()
    (run_dir / "ppo" / "started.json").write_text(json.dumps({"hash": "ab" * 32}))
    with (run_dir / "ppo" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "time": 42.0, "ppo/rew')
    page = read(report.write(run_dir))
    assert "half made" in page.text
    assert "abababababab" in page.text


def test_numbers_that_are_none_leave_gaps(tmp_path: Path) -> None:
    rows = [{"step": 1, "sft/loss": 2.0}, {"step": 2, "sft/loss": None}, {"step": 3}, {"step": 4, "sft/loss": 1.0}]
    steps, values = charts.series(rows, "sft/loss")
    assert steps.tolist() == [1.0, 4.0]
    assert values.tolist() == [2.0, 1.0]
    assert charts.draw(charts.CHARTS["sft"][0], [{"step": 1, "sft/loss": None}], {}) is None


def test_long_runs_stay_small() -> None:
    rows = [{"step": i, "sft/loss": float(i)} for i in range(10_001)]
    steps, values = charts.series(rows, "sft/loss")
    assert len(steps) == charts.POINTS
    assert values.mean() == pytest.approx(5000, rel=0.01)
    assert len(charts.draw(charts.CHARTS["sft"][0], rows, {}) or "") < 30_000


def test_every_word_is_escaped(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "r")
    sample = {
        "prompt": ATTACK,
        "sft": ATTACK,
        "aligned": ATTACK,
        "sft_reward": 0.0,
        "aligned_reward": 1.0,
        "sft_independent": 0.0,
        "aligned_independent": 0.0,
    }
    (run_dir / "evaluate" / "samples.json").write_text(json.dumps([sample]))
    summary = json.loads((run_dir / "summary.json").read_text())
    (run_dir / "summary.json").write_text(json.dumps({**summary, "evaluate/independent_scorer": ATTACK, f"x/{ATTACK}": 1}))
    page = read(report.write(run_dir))  # refuses script, img and on... wherever they come out as tags
    assert page.text.count(ATTACK) >= 5


def test_states(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "r")
    for stage, tries in (("pretrain", 1), ("sft", 2)):
        (run_dir / stage / "tb").mkdir()
        for i in range(tries):
            (run_dir / stage / "tb" / f"events.out.tfevents.{i}").touch()
    states = {s.name: s.state for s in report.stages(run_dir, {})}
    assert states == {"data": "made", "pretrain": "made", "sft": "resumed", "reward": "made", "ppo": "made", "evaluate": "made"}
    (run_dir / "recipe.yaml").write_text("name: r\n")  # the next run has begun
    for stage in ("ppo", "evaluate"):
        manifest = json.loads((run_dir / stage / "manifest.json").read_text())
        (run_dir / stage / "manifest.json").write_text(json.dumps({**manifest, "made_at": "2999-01-01T00:00:00+00:00"}))
    states = {s.name: s.state for s in report.stages(run_dir, {})}
    assert states == {"data": "kept", "pretrain": "kept", "sft": "kept", "reward": "kept", "ppo": "made", "evaluate": "made"}


def test_picture(tmp_path: Path) -> None:
    path = report.curves(make_run(tmp_path / "r"), tmp_path / "curves.png")
    assert path.read_bytes().startswith(b"\x89PNG")
