"""Runs the whole matrix on one rank and writes docs/models.md.

python -m tests.serving.matrix
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.serving.matrix import page, serving
from tests.serving.matrix.architectures import ARCHITECTURES


def main() -> None:
    """Also says how far what was decoded is from a prefill."""
    serving.imports()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number, architecture in enumerate(ARCHITECTURES):
            result = serving.run(architecture, Path(folder) / str(number))
            offs = {name: result[name] for name in ("reason", "short_off", "long_off") if name in result}
            print(architecture.name, result["outcome"], offs, flush=True)
            if result["outcome"] != architecture.outcome:
                sys.exit(f"{architecture.name} was to be {architecture.outcome}: {result}")
            found.append((architecture, result))
    page.PAGE.write_text(page.text(found))


if __name__ == "__main__":
    main()
