from pathlib import Path
from glob import glob
from rlhf.artefacts import digest
def source_digest(source): return " ".join(digest(Path(p)) for p in sorted(glob(source)))
