"""How far runs are: one row per stage.

    for stage in stages(Path("runs/quickstart")): print(stage.name, stage.state, stage.figures)

Read from the markers that the pipeline leaves; nothing is imported that trains.
"""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from rlhf.artefacts import read_json, stages_in
from rlhf.errors import RecipeError
from rlhf.monitoring import duration
from rlhf.pipeline import figures


@dataclass(frozen=True)
class StageStatus:
    name: str
    state: str  # made | started | -
    made_at: str
    took: str
    figures: str


def runs(where: Path) -> list[Path]:
    """`where` itself when it is a run, otherwise the runs in it, newest last.

    Raises RecipeError when there is none.
    """
    found = [where] if (where / "recipe.yaml").exists() else [p.parent for p in where.glob("*/recipe.yaml")]
    if not found:
        raise RecipeError(f"no run at {where}; `roundhouse run RECIPE` makes one")
    return sorted(found, key=lambda p: (p / "recipe.yaml").stat().st_mtime)


def stages(run_dir: Path) -> list[StageStatus]:
    """Every stage of a run in order, whether it is there or not."""
    rows = []
    for name in stages_in(run_dir):
        manifest = read_json(run_dir / name / "manifest.json")
        if manifest:
            made = datetime.fromisoformat(manifest["made_at"]).strftime("%d %b %H:%M")
            rows.append(StageStatus(name, "made", made, duration(manifest["wall_seconds"]), figures(run_dir, name)))
        else:
            state = "started" if read_json(run_dir / name / "started.json") else "-"
            rows.append(StageStatus(name, state, "", "", figures(run_dir, name)))
    return rows
