"""The recipe's sections on text: where it comes from, what is kept of it, how it becomes tokens."""

from typing import Literal

from rlhf.recipe_base import Section, Source, key


class Data(Section):
    pretrain: list[Source] = key(
        ...,
        "Texts to pretrain on: `name:text` of the catalogue (`roundhouse data list`), or paths and globs of .txt / .jsonl files.",
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
    cache_dir: str = key("~/.cache/roundhouse", "Where fetched corpora and rank files are kept.", unit="path")
    validation_fraction: float = key(0.03, "Share of documents held out, chosen by the hash of their text.", unit="fraction", gt=0, lt=0.5)
    max_broken_fraction: float = key(
        0.01, "Unreadable files and lines are skipped, counted and listed; above this share the run stops.", unit="fraction", ge=0, le=1
    )
    shard_tokens: int = key(10_000_000, "Tokens in one shard file.", unit="tokens", ge=1024)


class Tokenizer(Section):
    encoding: Literal["train", "gpt2", "r50k_base", "p50k_base", "cl100k_base", "o200k_base", "model"] = key(
        "train",
        "`train` learns a BPE on the pretraining and sft texts; a name takes that tiktoken encoding; `model` takes `model.init`'s.",
        source="https://github.com/openai/tiktoken",
    )
    extend: str | None = key(
        None,
        'With `model`: a .jsonl file of {"piece": "..."}, words to become tokens of their own. Their rows start as means of the old ones.',
        unit="path",
    )
    vocab_size: int = key(4096, "Size of a trained vocabulary, special tokens included.", unit="tokens", ge=300)
