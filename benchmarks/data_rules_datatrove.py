"""datatrove's side of `benchmarks.data_rules`, run by .venv-data-peers: what each of its filters says of every text.

data_rules_datatrove.py TEXTS.jsonl OUT.jsonl        # {"text"} -> {"gopher": reason or null, ..., "c4_text": what C4 leaves}
"""

import json
import sys

from datatrove.data import Document
from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter

FILTERS = {
    "gopher": GopherQualityFilter(),
    "gopher_repetition": GopherRepetitionFilter(),
    "c4": C4QualityFilter(),
    "fineweb": FineWebQualityFilter(),
}


def main(texts: str, out: str) -> None:
    with open(texts, encoding="utf-8") as lines, open(out, "w", encoding="utf-8") as written:
        for line in lines:
            said: dict[str, str | None] = {}
            for name, rule in FILTERS.items():
                document = Document(text=json.loads(line)["text"], id="")
                try:
                    kept = rule.filter(document)
                except ZeroDivisionError:  # a text without words or lines
                    kept = False, "nothing to divide by"
                said[name] = None if kept is True else kept[1]
                if name == "c4":
                    said["c4_text"] = document.text if kept is True else None
            written.write(json.dumps(said, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
