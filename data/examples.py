"""Conversations, preferences and prompts become parquet files of token ids: the data of sft, reward and ppo.

    prepare_chat(files, tokenizer, out, max_tokens=256, validation_fraction=0.03, max_broken_fraction=0.01)
    train = Examples(out, "train")
    train[0]            # {"tokens": int64 [t], "mask": bool [t]}

Rows in, in the spellings that `formats.py` knows ("split": "train" | "validation" is optional, rows without it are split
by the hash of what comes before the first answer, so one question is never on both sides):

    chat            {"messages"}                       -> tokens, mask (True: the model should learn to write it)
    preferences     {"messages", "chosen", "rejected"} -> prompt, answers (best first, each ends its turn), scores
                    {"messages", "ranked": [best, ..., worst]}   any number of answers from two on
    prompts         {"messages"}                       -> prompt
                    {"messages", "answer"}             -> prompt, answer (a text, or null where a row has none)
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from data.chat import encode_answer, encode_chat, encode_prompt
from data.cleaning import id_array, in_validation, shares, text_id, validation_limit
from data.decontamination import Index, spans, strings_of, write_report
from data.engine import fetched
from data.errors import DataError
from data.files import sha256_of, write_json
from data.formats import conversation, question, ranking
from data.reading import Broken, Dropped, check_broken, ordered, read
from data.stores import File
from data.templates import Message
from data.tokenizers import Tokenizer

IDS = pa.list_(pa.int32())
CHAT = pa.schema([("tokens", IDS), ("mask", pa.list_(pa.bool_()))])
PREFERENCES = pa.schema([("prompt", IDS), ("answers", pa.list_(IDS)), ("scores", pa.list_(pa.float32()))])
PROMPTS = pa.schema([("prompt", IDS), ("answer", pa.string())])
CONTAMINATED = pa.field("contaminated", pa.large_string())
ROW_GROUP = 8192  # rows; fixed, so that a file's bytes do not depend on how Ray cut the blocks
SPLITS = ("train", "validation")
FORMAT = "roundhouse examples 2"

OPENING = 16  # tokens; below that little is saved

Encode = Callable[[Tokenizer, dict[str, Any]], tuple[list[Message], dict[str, Any]]]
"""(tokenizer, record) -> the messages that decide its split, and its columns."""


def prepare_chat(files: Sequence[File], tokenizer: Tokenizer, out_dir: Path, *, max_tokens: int, **options: Any) -> dict[str, Any]:
    """Conversations -> columns `tokens` and `mask`; returns the manifest.

    Conversations longer than `max_tokens` are cut to the most whole turns that fit; those of which nothing fits, or that
    hold no answer, are dropped and counted.
    """

    def encode(tokenizer: Tokenizer, record: dict[str, Any]) -> tuple[list[Message], dict[str, Any]]:
        messages = conversation(record)
        tokens, mask = encode_chat(tokenizer, messages, max_tokens)
        if not tokens:
            answered = any(m["role"] == "assistant" for m in messages)
            raise Dropped(f"first turn longer than {max_tokens} tokens" if answered else "no message of the assistant")
        return messages, {"tokens": tokens, "mask": mask}

    return _prepare(files, tokenizer, out_dir, encode, CHAT, **options)


def prepare_preferences(files: Sequence[File], tokenizer: Tokenizer, out_dir: Path, *, max_tokens: int, **options: Any) -> dict[str, Any]:
    """Rankings -> columns `prompt`, `answers` (best first) and `scores` (descending); returns the manifest.

    Scores tell how far apart two answers are and which are tied: `"scores"` beside `"ranked"`, or `"margin"` beside `"chosen"`, in
    any unit. Without them neighbours are 1 apart. Rankings with prompt + an answer over `max_tokens`, with equal answers, or
    without a difference are dropped and counted.
    """

    def encode(tokenizer: Tokenizer, record: dict[str, Any]) -> tuple[list[Message], dict[str, Any]]:
        messages, texts, scores = ranking(record)
        prompt = encode_prompt(tokenizer, messages)
        answers = [encode_answer(tokenizer, text) for text in texts]
        if len(prompt) + max(map(len, answers)) > max_tokens:
            raise Dropped(f"prompt + answer longer than {max_tokens} tokens")
        if len(set(map(tuple, answers))) < len(answers):
            raise Dropped("two answers are equal")
        if scores[0] == scores[-1]:
            raise Dropped("no answer is better than another")
        return messages, {"prompt": prompt, "answers": answers, "scores": scores}

    return _prepare(files, tokenizer, out_dir, encode, PREFERENCES, **options)


def prepare_prompts(files: Sequence[File], tokenizer: Tokenizer, out_dir: Path, *, max_tokens: int, **options: Any) -> dict[str, Any]:
    """Messages that wait for an answer -> columns `prompt` and, if any row has one, `answer`: the right answer, as text, or null.

    Prompts over `max_tokens` are dropped and counted.
    """

    def encode(tokenizer: Tokenizer, record: dict[str, Any]) -> tuple[list[Message], dict[str, Any]]:
        messages, answer = question(record)
        (answer or "").encode()  # half a surrogate pair is told here, as that of a prompt is
        prompt = encode_prompt(tokenizer, messages)
        if len(prompt) > max_tokens:
            raise Dropped(f"prompt longer than {max_tokens} tokens")
        return messages, {"prompt": prompt, "answer": answer}

    return _prepare(files, tokenizer, out_dir, encode, PROMPTS, **options)


def opening(folder: Path) -> int:
    """With how many tokens all prompts of `folder` begin, those held out too: a system prompt, the wording of a question. Each of them
    goes on after that. 0 where it is little."""
    columns = [Examples(folder, split).table["prompt"].combine_chunks() for split in SPLITS]
    flat = [(column.values.to_numpy(), column.offsets.to_numpy()[:-1]) for column in columns]
    first, begins = flat[0]
    shortest = int(min(pa.compute.min(pa.compute.list_value_length(column)).as_py() for column in columns))
    for n in range(shortest - 1):
        if any((values[starts + n] != first[begins[0] + n]).any() for values, starts in flat):
            return n if n >= OPENING else 0
    return shortest - 1 if shortest > OPENING else 0


def training_texts(files: Sequence[File], validation_fraction: float, fields: Mapping[str, str] | None = None) -> Iterator[str]:
    """What is said in the conversations that are not held out: texts for a vocabulary that fits them. Broken rows are passed over."""

    def convert(record: dict[str, Any]) -> dict[str, Any]:
        messages = conversation(record)
        if any("\ud800" <= c <= "\udfff" for m in messages for c in m["content"]):
            raise Broken("half a surrogate pair in the text")
        held_out = record.get("split") == "validation" or in_validation(_question(messages), validation_fraction)
        return {"text": None if held_out else "\n".join(m["content"] for m in messages)}

    with ordered():
        for batch in read(files, convert, pa.schema([("text", pa.large_string())]), fields).iter_batches(
            batch_size=None, batch_format="pyarrow"
        ):
            yield from batch["text"].drop_null().to_pylist()


def _prepare(
    files: Sequence[File],
    tokenizer: Tokenizer,
    out_dir: Path,
    encode: Encode,
    columns: pa.Schema,
    *,
    validation_fraction: float,
    max_broken_fraction: float,
    fields: Mapping[str, str] | None = None,
    evaluations: Index | None = None,
) -> dict[str, Any]:
    """Write `out_dir`/{train,validation}.parquet, broken.jsonl and, last, manifest.json. Needs a connected Ray.

    Rows that hold a passage of `evaluations` are dropped, counted, and listed in `out_dir`/contaminated.jsonl.
    """
    (out_dir / "manifest.json").unlink(missing_ok=True)
    reference, index = ray.put(tokenizer), ray.put(evaluations)
    found = [] if evaluations is None else [CONTAMINATED]

    def convert(record: dict[str, Any]) -> dict[str, Any]:
        split = record.get("split")
        if split not in (None, *SPLITS):
            raise Broken(f'"split" is {split!r}; it can be "train" or "validation"')
        try:
            messages, made = encode(fetched(reference), record)
            passages = spans(list(strings_of(record)), fetched(index)).to_pylist() if found else []
            if passages:
                return {"contaminated": json.dumps(passages)}
            return {"id": text_id(_question(messages)), "split": split, **made}
        except UnicodeEncodeError:
            raise Broken("half a surrogate pair in the text") from None
        except DataError as error:  # the template refuses this conversation, others may be fine
            raise Broken(str(error)) from None

    with ordered():
        schema = pa.schema([("id", pa.binary(16)), ("split", pa.string()), *columns, *found])
        rows = read(files, convert, schema, fields).materialize()
        counts = check_broken(rows, files, out_dir, max_broken_fraction)
        if evaluations is not None:
            counts["dropped: contaminated"] = _report(rows, files, evaluations, out_dir)
        limit = _limit(rows.select_columns(["id", "split"]), validation_fraction)
        if limit is None:
            raise DataError(f"{', '.join(map(str, files))}: nothing to learn from is left, {json.dumps(counts)}")
        if "answer" in columns.names and not _any_answer(rows):
            columns = pa.schema([field for field in columns if field.name != "answer"])
        writers = {split: _Writer(out_dir / f"{split}.parquet", columns) for split in SPLITS}
        for batch in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
            batch = batch.filter(pa.compute.is_valid(batch["id"]))
            hashed = np.where(shares(id_array(batch["id"])) < limit, "validation", "train")
            split = pa.compute.coalesce(batch["split"], pa.array(hashed, pa.string()))
            for name, writer in writers.items():
                writer.add(batch.select(columns.names).filter(pa.compute.equal(split, name)))
    written = {split: writer.finish() for split, writer in writers.items()}
    for split in SPLITS:
        if not written[split]["rows"]:
            names = ", ".join(map(str, files))
            raise DataError(f"{names}: no row is left for {split}; two different questions are needed at least. {json.dumps(counts)}")
    manifest = {"format": FORMAT, "tokenizer": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size, **counts, **written}
    write_json(out_dir / "manifest.json", manifest)
    return manifest


def _report(rows: ray.data.Dataset, files: Sequence[File], evaluations: Index, out_dir: Path) -> int:
    """Write contaminated.jsonl; returns how many rows hold a passage of an evaluation."""
    count, listed = 0, []
    for batch in rows.select_columns(["file", "at", CONTAMINATED.name]).iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in batch.filter(pa.compute.is_valid(batch[CONTAMINATED.name])).to_pylist():
            count += 1
            listed += [{**passage, "in_file": row["file"], "in_at": row["at"]} for passage in json.loads(row[CONTAMINATED.name])]
    write_report(out_dir / "contaminated.jsonl", files, listed, evaluations)
    return count


def _limit(rows: ray.data.Dataset, fraction: float) -> int | None:
    """Where to split the rows that name no split; None when there is no row at all."""
    ids, anything = [np.zeros(0, "V16")], False
    for batch in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
        batch = batch.filter(pa.compute.is_valid(batch["id"]))
        anything = anything or len(batch) > 0
        ids.append(id_array(batch.filter(pa.compute.is_null(batch["split"]))["id"]))
    unsplit = np.concatenate(ids)
    return (validation_limit(unsplit, fraction) if len(unsplit) else 0) if anything else None


def _question(messages: list[Message]) -> str:
    """What stands before the first answer; rows that share it are on the same side of the split."""
    first = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), None)
    return "\0".join(m["content"] for m in messages[:first])


def _any_answer(rows: ray.data.Dataset) -> bool:
    """Without answers there is no column for them: files without them keep their bytes, on which the sample order depends."""
    batches = rows.select_columns(["answer"]).iter_batches(batch_size=None, batch_format="pyarrow")
    return any(batch["answer"].null_count < len(batch) for batch in batches)


class _Writer:
    """One parquet file, in row groups of ROW_GROUP."""

    def __init__(self, path: Path, columns: pa.Schema) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.pending = columns.empty_table()
        self.rows = 0
        self.tokens = {field.name: 0 for field in columns if field.type in (IDS, pa.list_(IDS))}
        self.file = pq.ParquetWriter(self.partial, columns, compression="zstd")

    def add(self, rows: pa.Table) -> None:
        self.rows += len(rows)
        for name in self.tokens:
            self.tokens[name] += int(_lengths(rows[name]).sum())
        self.pending = pa.concat_tables([self.pending, rows])
        while len(self.pending) >= ROW_GROUP:
            self.file.write_table(self.pending.slice(0, ROW_GROUP).combine_chunks())
            self.pending = self.pending.slice(ROW_GROUP)

    def finish(self) -> dict[str, Any]:
        if len(self.pending):
            self.file.write_table(self.pending.combine_chunks())
        self.file.close()
        os.replace(self.partial, self.path)
        return {"rows": self.rows, "tokens": self.tokens, "sha256": sha256_of(self.path)}


class Examples:
    """One split of what a `prepare_*` function wrote, in memory as Arrow; rows come out as numpy arrays."""

    def __init__(self, folder: Path, split: str) -> None:
        """Raises DataError when the folder is half-written or the file is not the one in the manifest."""
        folder = Path(folder)
        path = folder / f"{split}.parquet"
        try:
            text = (folder / "manifest.json").read_bytes()
            self.manifest: dict[str, Any] = json.loads(text)
            expected = self.manifest[split]["sha256"]
        except FileNotFoundError:
            raise DataError(f"{folder}: no manifest.json, so these examples are missing or half-written: prepare the data again") from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder / 'manifest.json'}: damaged ({error!r}): prepare the data again") from None
        if not path.exists() or sha256_of(path) != expected:
            raise DataError(f"{path}: missing, or its sha256 is not the manifest's: prepare the data again")
        self.path = path
        self.table = pq.read_table(path).combine_chunks()
        self.fingerprint: str = self.manifest["tokenizer"]
        self.manifest_hash = hashlib.sha256(text).hexdigest()
        """The sample order depends on it, as for token shards."""

    def __len__(self) -> int:
        return len(self.table)

    def source(self, i: int) -> list[str]:
        """Where example i stands, for a message about it."""
        return [f"row {i} of {self.path}"]

    def lengths(self, column: str) -> np.ndarray:
        """Tokens in every row of `column`, of all its answers together, int64 `[rows]`."""
        return _lengths(self.table[column])

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Row i by column: ids as int64 `[t]`, `mask` as bool `[t]`, `answers` as a list of ids, `scores` as float32 `[answers]`,
        `answer` as str or None (no row has it where no prompt came with one)."""
        row: dict[str, Any] = {}
        for field in self.table.schema:
            if field.type == pa.string():
                row[field.name] = self.table[field.name][i].as_py()
                continue
            values = self.table[field.name][i].values
            if field.type == pa.list_(IDS):
                row[field.name] = [np.asarray(one, np.int64) for one in values.to_pylist()]
            else:
                found = values.to_numpy(zero_copy_only=False)
                row[field.name] = found.astype(np.int64) if field.type == IDS else found
        return row


def _lengths(column: pa.ChunkedArray) -> np.ndarray:
    """Tokens in every row of lists of ids, or of lists of lists of them, int64 `[rows]`."""
    if column.type == pa.list_(IDS):
        parts = pa.compute.list_value_length(column).to_numpy()
        inner = pa.compute.list_value_length(pa.compute.list_flatten(column)).to_numpy().astype(np.int64)
        ends = np.concatenate([[0], np.cumsum(inner)])[np.concatenate([[0], np.cumsum(parts)])]
        return np.diff(ends)
    return pa.compute.list_value_length(column).to_numpy().astype(np.int64)
