"""The data room: text becomes tokens. It knows nothing of models, losses or machines.

From the source to the model, one file each:

    catalog.py      real corpora by name, fetched with pip (packages.py), as jsonl;  snippets.py builds preference pairs
    stores.py       where files are: paths, globs, and URIs of object stores
    readers.py      records of .jsonl, .parquet, .txt, .html (html.py) and .warc (warc.py); what cannot be read is told, not raised
    parts.py        files are cut into fixed pieces of work
    reading.py      records as a Ray Dataset; what cannot be read is listed with file, line and first bytes
    cleaning.py     cleaning, NFC, ids by hash, exact duplicates, the train / validation split;  pii.py replaces personal data
    quality.py      which texts are good enough: the rules (rules.py) over counts of a text (signals.py), chosen by language.py;  c4.py drops
                    lines.  words.py splits texts as spaCy does (special_words.py), over code points (characters.py), compiled (kernels.py)
    formats.py      the spellings of conversations, rankings and questions
    pipeline.py     documents -> vocabulary -> token shards                                  (for pretraining)
    examples.py     conversations, preferences and prompts -> parquet of token ids           (for the stages after it)

    tokenizers.py   trained, named (encodings.py) or a model's own; saved for transformers and vLLM (tokenizer_json.py)
    chat.py         messages -> ids and the mask of what to learn; templates.py renders them, showing.py shows them to people
    shards.py       token shards: written here, read through memory maps
    order.py        which sample comes when: arithmetic, not state
    mixture.py      which source comes when, where sources are mixed by weight: arithmetic too
    packing.py      samples -> micro-batches without padding, shared evenly among workers

    errors.py       DataError: the message says what, where and what to do
    files.py        files that are whole or not there
"""
