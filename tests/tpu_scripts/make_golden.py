"""Writes golden/: the exact arguments of every dry run. Read the difference before it is committed."""

import tempfile
from pathlib import Path

from pod import BACKENDS, HERE, dry_runs

for backend in BACKENDS:
    with tempfile.TemporaryDirectory() as folder:
        (HERE / "golden" / f"{backend}.txt").write_text(dry_runs(Path(folder), backend))
