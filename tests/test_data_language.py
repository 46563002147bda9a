"""Languages by script, by marks, by fastText's model; and that kernels work where nothing can be written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.language import CHINESE, identify

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Four score and seven years ago our fathers brought forth, upon this continent, a new nation.", "en"),
        ("Nous sommes réunis ici pour parler de ce qui nous importe le plus.", "fr"),
        ("Wir haben uns heute hier versammelt, um über das zu sprechen, was uns bewegt.", "de"),
        ("床前明月光，疑是地上霜。", "zh"),
        ("用法：git clone [选项] 仓库 目录。把一个仓库克隆到新建的目录里。", "zh"),
        ("これは日本語の文章です。漢字もあります。", "ja"),
        ("def area(width, height):\n    if width < 0:\n        raise ValueError(width)\n    return width * height\n", "code"),
        ("for (int i = 0; i < n; i++) {\n  sum += values[i];\n}\n", "code"),
        ("", ""),
        ("12.5 % -- 3/4 \n\n", ""),
    ],
)
def test_languages(text: str, code: str) -> None:
    codes, scores = identify([text])
    assert codes == [code]
    assert scores.dtype == np.float32
    assert scores[0] == 0 if not code else scores[0] > CHINESE


def test_a_language_does_not_depend_on_the_neighbours() -> None:
    texts = ["Once upon a time there was a king. " * 40, "从前有一个国王。" * 30, "x = [1, 2]\n" * 5, "Il était une fois un roi. " * 40]
    codes, scores = identify(texts)
    assert codes == ["en", "zh", "code", "fr"]
    alone = [identify([text]) for text in texts]
    assert [(c[0], float(s[0])) for c, s in alone] == list(zip(codes, scores.tolist(), strict=True))


def test_kernels_work_from_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    """The package and the home both: a container's image, a node's shared disk."""
    shutil.copytree(ROOT / "data", tmp_path / "data", ignore=shutil.ignore_patterns("__pycache__"))
    code = "from data.kernels import kernel; from data import language; print(language.identify(['床前明月光，疑是地上霜。'])[0])"
    (tmp_path / "data" / "__pycache__").write_text("a file, so that nobody, not even root, can make the folder")
    env = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "HOME": "/proc/nowhere",
        "XDG_CACHE_HOME": "/proc/nowhere",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == "['zh']\n", done.stderr


def test_a_kernel_is_compiled_anew_when_another_file_changes(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("kernels.py", "errors.py"):
        shutil.copy(ROOT / "data" / name, tmp_path / "data" / name)
    (tmp_path / "data" / "use.py").write_text(
        "from data.kernels import kernel\nfrom data.table import VALUE\n\n@kernel\ndef value():\n    return VALUE\n\nprint(value())\n"
    )
    for value in (1, 2, 2):
        (tmp_path / "data" / "table.py").write_text(f"VALUE = {value}\n")
        command, env = [sys.executable, "-m", "data.use"], {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.stdout == f"{value}\n", done.stderr
    assert len(list((tmp_path / "data" / "__pycache__").glob("kernels-*/**/*.nbi"))) == 1
