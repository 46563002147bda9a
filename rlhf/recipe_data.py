"""The recipe's sections on text: where it comes from, what is kept of it, how it becomes tokens."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from rlhf.recipe_base import Section, Source, key
from rlhf.recipe_quality import Quality

FIELDS = (
    *("text", "source", "target", "category", "messages", "conversations", "system", "instruction", "input", "output"),
    *("prompt", "answer", "chosen", "rejected", "margin", "ranked", "scores", "split"),
)
"""What `data` knows by name in a row."""


def _known_field(name: str) -> str:
    if name not in FIELDS:
        raise ValueError(f"{name!r} is none of {', '.join(FIELDS)}")
    return name


FieldName = Annotated[str, AfterValidator(_known_field)]


class Clean(Section):
    """What is done to pretraining texts besides Unicode's normal form. All of it looks at one text alone."""

    html: bool = key(False, "The texts are HTML pages: keep their main content. (.html and .warc files are read so in any case.)")
    repair: bool = key(False, "Undo wrong decodings, Ã© for é, where ftfy sees any.", source="https://github.com/rspeer/python-ftfy")
    control: bool = key(False, "Take out control characters and byte order marks; all line ends become \\n.")
    boilerplate: bool = key(
        False, "Take out lines that speak of javascript, cookie and privacy policies or terms of use.", source="arXiv:1910.10683"
    )
    pii: list[Literal["email", "ip", "phone", "chinese_phone", "chinese_id"]] = key(
        [],
        "Personal data to replace by addresses and numbers that belong to nobody; IP addresses if they are public.",
        source="arXiv:2406.17557",
    )
    drop_missing: bool = key(False, "Rows without a text are dropped and counted; else they are broken.")


class Decontaminate(Section):
    """Texts that hold passages of evaluations are taken out of everything that is trained on."""

    against: list[Source] = key(
        [],
        "Evaluation texts: `name:kind` of the catalogue, or paths, globs and URIs. What shares a passage with one is dropped and listed.",
    )
    ngram: int = key(
        13,
        "Words in a row that are a passage, or twice as many Chinese or Japanese characters. Shorter evaluation texts count as a whole, "
        "from 8 words on.",
        unit="words",
        ge=5,
        source="arXiv:2005.14165, appendix C",
    )


class Data(Section):
    pretrain: list[Source] = key(
        ...,
        "Texts to pretrain on: `name:text` of the catalogue (`roundhouse data list`), or paths, globs and URIs (s3, gs, hf) of "
        ".jsonl, .parquet, .txt, .html and .warc files, also .gz and .zst.",
        min_length=1,
    )
    sft: list[Source] = key(
        ..., "Conversations to fine-tune on: `name:chat`, or .jsonl files of {messages: [{role, content}]}.", min_length=1
    )
    preferences: list[Source] = key(
        [],
        "Human rankings: `name:preferences`, or .jsonl files of {messages, chosen, rejected} or {messages, ranked: [best, ...]}. "
        "A recipe with `ppo.reward_function` needs none.",
    )
    prompts: list[Source] = key(
        ...,
        "What PPO answers: `name:prompts`, or .jsonl files of {messages}, with {answer} for some of `ppo.reward_function`.",
        min_length=1,
    )
    fields: dict[FieldName, Source] = key(
        {}, "Under which names the files have what is called so here, as {text: content}; a row without that name keeps its own."
    )
    clean: Clean = key(Clean(), "What is done to pretraining texts; nothing by default.")
    quality: Quality | None = key(None, "Rules that a pretraining text must keep; none by default, `{}` takes the published ones.")
    near_duplicates: bool = key(
        False,
        "Drop documents that repeat most of an earlier one: linked by pairs that share .8 of their 5-grams of words, or of characters.",
        source="arXiv:2406.17557",
    )
    earlier: list[Source] = key(
        [],
        "Directories of runs whose pretraining texts stood earlier: what repeats one of theirs, as far as this recipe looks, is dropped.",
    )
    decontaminate: Decontaminate = key(Decontaminate(), "What must not be trained on; nothing by default.")
    cache_dir: str = key("~/.cache/roundhouse", "Where fetched corpora and rank files are kept.", unit="path")
    validation_fraction: float = key(0.03, "Share of documents held out, chosen by the hash of their text.", unit="fraction", gt=0, lt=0.5)
    max_broken_fraction: float = key(
        0.01, "Unreadable files and lines are skipped, counted and listed; above this share the run stops.", unit="fraction", ge=0, le=1
    )
    exclude: str | None = key(
        None, "A text file of document ids, one a line, that are left out: what was taken out with `roundhouse data drop`.", unit="path"
    )
    part_bytes: int = key(8 << 20, "Of the pretraining files, as stored, what one task works on.", unit="bytes", ge=1 << 16)
    shard_tokens: int = key(10_000_000, "Tokens in one shard file.", unit="tokens", ge=1024)


class Tokenizer(Section):
    encoding: Literal["train", "gpt2", "r50k_base", "p50k_base", "cl100k_base", "o200k_base", "model"] = key(
        "train",
        "`train` learns a BPE on the pretraining and sft texts; a name takes that tiktoken encoding; `model` takes `model.init`'s.",
        source="https://github.com/openai/tiktoken",
    )
    extend: str | None = key(
        None,
        'A .jsonl file of {"piece": "..."}, words to become tokens of a ready vocabulary. Their rows start as means of the old ones.',
        unit="path",
    )
    extend_from_corpus: int = key(
        0,
        "So many tokens are added to a ready vocabulary: those that save most tokens in the pretraining and sft texts.",
        unit="tokens",
        ge=0,
    )
    vocab_size: int = key(4096, "Size of a trained vocabulary, special tokens included; 261 are the bytes alone.", unit="tokens", ge=261)


class Phase(Section):
    steps: int = key(..., "Optimizer steps of this phase.", unit="steps", ge=1)
    weights: dict[Source, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = key(
        None,
        "Share of the tokens by source, named as in data.pretrain (or by category, `pretrain.mix_by`); shares count relative to each "
        "other, sources without one are left out. Default: all, by their size.",
        min_length=1,
    )
    weights_to: dict[Source, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = key(
        None, "The shares when the phase ends, if they are to move on a line from `weights` to these.", min_length=1
    )
    bins: int | None = key(
        None,
        "Instead of weights: every source is cut into so many bins, a bucket is one bin of each, and buckets are trained on in turn.",
        unit="bins",
        ge=1,
        source="https://github.com/hpcaitech/ColossalAI (Colossal-LLaMA-2)",
    )
    sequence_length: int | None = key(None, "Tokens of one window in this phase. Default: pretrain.sequence_length.", unit="tokens", ge=16)
    max_epochs: float | None = key(
        None,
        "Training does not start when this phase would show a source more often; up to 4 passes are nearly as good as new text.",
        unit="epochs",
        gt=0,
        source="arXiv:2305.16264",
    )

    @model_validator(mode="after")
    def one_way_to_mix(self) -> "Phase":
        if self.weights is None and self.weights_to is not None:
            raise ValueError("weights_to needs the weights from which it starts")
        if self.weights is not None and self.bins is not None:
            raise ValueError("weights and bins are two ways to mix: buckets take of every source by its size")
        return self
