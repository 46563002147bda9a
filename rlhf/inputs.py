"""What the stages read from outside a run, as digests: they are part of a stage's identity (`artefacts.identities`).

found = outside_inputs(recipe)          # stage -> {what: digest}; nothing is fetched
"""

from pathlib import Path

from rlhf.artefacts import digest
from rlhf.preflight import teachers
from rlhf.recipe import Recipe


def outside_inputs(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Digests of what the stages read from outside the run: the sources, the model that training starts from, teachers."""
    data = recipe.data
    sources = dict.fromkeys([*data.pretrain, *data.sft, *data.preferences, *data.prompts, *data.decontaminate.against])
    found: dict[str, dict[str, str]] = {"data": {s: source_digest(s) for s in sources}}
    if recipe.model.init is not None:
        model = Path(recipe.model.init).expanduser()
        found["pretrain"] = {"model.init": digest(model)}
        if recipe.tokenizer.encoding == "model":
            names = [n for n in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja") if (model / n).exists()]
            found["data"] |= {f"model.init/{n}": digest(model / n) for n in names}
    for run in data.earlier:
        found["data"][f"data.earlier/{run}"] = digest(Path(run).expanduser() / "data" / "pretrain" / "train" / "manifest.json")
    if data.exclude is not None:
        found["data"]["data.exclude"] = digest(Path(data.exclude).expanduser())
    if recipe.tokenizer.extend is not None:
        found["data"]["tokenizer.extend"] = digest(Path(recipe.tokenizer.extend).expanduser())
    if (function := recipe.ppo.reward_function) is not None:
        path, colon, name = function.rpartition(":")
        counted = f"{digest(Path(path).expanduser())} {name}" if colon else name
        found |= {stage: {"ppo.reward_function": counted} for stage in ("ppo", "evaluate")}
    for stage, (key, teacher) in teachers(recipe).items():
        found[stage] = {key: digest(teacher)}
    return found


def source_digest(source: str) -> str:
    """What is behind a source, as a short text: of the catalogue its pinned package, of files their content, of an object store's
    their size and time.

    Nothing is fetched.
    """
    from data.catalog import CATALOG, resolve
    from data.stores import stamp

    name, colon, _ = source.partition(":")
    if colon and (base := name.partition("?")[0]) in CATALOG:  # options stand in the recipe itself
        dataset = CATALOG[base]
        return f"{dataset.package.name} {dataset.package.version} {dataset.package.sha256} {dataset.version}"
    return " ".join(digest(file) if isinstance(file, Path) else stamp(file) for file in resolve(source, ""))
