"""Are the figures of README and docs those of the results that they name?

    python -m benchmarks.cited [--write]

A table that was measured has `<!-- figures: NAME -->` above it and a paragraph `Figures: ...` below it, which names its result
files. This compares each cell with what those files say, and each `SENTENCES`; exit status 1 where one differs. `--write` puts
the files' figures into the tables. It also finds results that no document cites, citations without a file, and results that
were measured with other code than this tree's, or with code that they do not name, where the paragraph has no "Since then:".
"""

from benchmarks.cited import evaluations, layerwise, memory, model_level, performance  # noqa: F401 - they register their tables
from benchmarks.cited.check import (
    check,
    check_age,
    check_citations,
    check_figures,
    differing,
    documents,
    expected,
    tables_of,
    write,
)
from benchmarks.cited.tables import SENTENCES, TABLES

__all__ = [
    "SENTENCES",
    "TABLES",
    "check",
    "check_age",
    "check_citations",
    "check_figures",
    "differing",
    "documents",
    "expected",
    "tables_of",
    "write",
]
