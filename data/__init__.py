"""The data room: text becomes tokens. It knows nothing of models, losses or machines.

From the source to the model, one file each:

    catalog.py      real corpora by name, fetched with pip (packages.py), as jsonl;  snippets.py builds pairs, reasoning.py problems
    stores.py       where files are: paths, globs, and URIs of object stores
    readers.py      records of .jsonl, .parquet, .txt, .html (html.py) and .warc (warc.py), packed or not (unpacking.py)
    parts.py        files are cut into fixed pieces of work
    reading.py      records as a Ray Dataset; what cannot be read is listed with file, line and first bytes
    formats.py      the spellings of conversations, rankings, questions and documents

The refinery of pretraining text (pipeline.py is the order of its steps):

    engine.py       a function over all parts, on Ray Data: watched, resumed part by part
    refine.py       a part's first pass: everything that asks nothing but a document itself
    cleaning.py     cleaning, NFC, ids by hash, the train / validation split;  pii.py replaces personal data
    signals.py      what quality rules look at, in one pass (words.py, special_words.py, characters.py, kernels.py)
    quality.py      which rule drops a text (rules.py, c4.py);  language.py: which language it is in
    minhash.py      what nearly equal texts share (shingles.py)
    clusters.py     which documents repeat another one (pairs.py), by steps of shuffle.py
    decontamination.py  passages of evaluations in training texts
    sharding.py     a part's last pass: what is kept becomes tokens and shards
    work.py         the files of a part in between
    fates.py        what became of every row, and the counts of it
    corpus.py       the manifests; documents found and taken out
    dry_run.py      what it will take and give, from a sample
    examples.py     conversations, preferences and prompts -> parquet of token ids           (for the stages after pretraining)

    tokenizers.py   trained, named (encodings.py, ranks.py) or a model's own, fast where gigatoken agrees (fast_tokens.py), grown by new
                    pieces (vocabulary.py); saved for transformers and vLLM (tokenizer_json.py);
                    spelling.py tells which vocabulary fits a corpus
    chat.py         messages -> ids and the mask of what to learn; templates.py renders them, showing.py shows them to people
    shards.py       token shards: written here, read through memory maps;  megatron.py exports them
    order.py        which sample comes when: arithmetic, not state
    mixture.py      which source comes when, where sources are mixed by weight, moving weights or buckets: arithmetic too
    packing.py      samples -> micro-batches without padding, shared evenly among workers

    errors.py       DataError: the message says what, where and what to do
    files.py        files that are whole or not there
"""
