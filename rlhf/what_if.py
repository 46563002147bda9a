"""What other quality rules would drop of a corpus that is prepared already: counted from its signals, no text is read.

now, then = what_if(Path("runs/mine"), ["data.quality.gopher.min_words=20"])
then["gopher@1: min_words"]         # (documents, tokens)
"""

from pathlib import Path

from data.quality import count
from data.rules import Quality
from rlhf import artefacts, recipe_file, recipe_quality
from rlhf.errors import RecipeError

Counts = dict[str, tuple[int, int]]


def what_if(run_or_recipe: Path, overrides: list[str]) -> tuple[Counts, Counts]:
    """Reason -> (documents, tokens that it drops), by the run's own rules and by those with `overrides`; "kept" is among the reasons.

    What is dropped as a duplicate later counts as kept here. Raises RecipeError for a run without signals, and for keys that would change
    the texts themselves.
    """
    path = run_or_recipe / "recipe.yaml" if run_or_recipe.is_dir() else run_or_recipe
    recipe, other = recipe_file.load(path), recipe_file.load(path, overrides)
    foreign = [key for key in (o.partition("=")[0].strip() for o in overrides) if not key.startswith("data.quality.")]
    if foreign:
        raise RecipeError(f"{foreign[0]} is no rule on texts; keys of data.quality are, see `roundhouse data rules`")
    now, then = _rules(recipe.data.quality), _rules(other.data.quality)
    c4 = [
        code
        for code in {*now.by_language, *then.by_language}
        if ("c4@1" in (now.sets_of(code) or ())) != ("c4@1" in (then.sets_of(code) or ()))
    ]
    if now.c4_lines != then.c4_lines or c4:
        raise RecipeError("c4@1 takes lines out of the texts: what is left under other settings is known after another `roundhouse run`")
    run_dir = run_or_recipe if run_or_recipe.is_dir() else artefacts.run_directory(recipe)
    files = sorted((run_dir / "data" / "pretrain" / "documents").glob("*.parquet"))
    if not files:
        raise RecipeError(f"{run_dir} has no prepared corpus; `roundhouse run {path} --only data` makes it")
    return count(files, now), count(files, then)


def _rules(quality: recipe_quality.Quality | None) -> Quality:
    if quality is None:
        raise RecipeError("the recipe has no data.quality, so nothing was measured")
    return quality.rules()
