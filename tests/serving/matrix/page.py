"""docs/models.md, from what came out of the matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.serving.matrix.architectures import ON_TWO_RANKS, Architecture

PAGE = Path(__file__).parents[3] / "docs" / "models.md"
_HEAD = """# Models

Written by `python -m tests.serving.matrix`, which serves a tiny model with random weights for each architecture: the fields of
the real config.json with two to six layers, narrower, with a smaller vocabulary (`tests/serving/matrix/architectures.py`). Head
size, rope, windows, norms, biases and scales are the real ones. On a CPU, in float32, through `sgl.Engine`.

*works*: a prompt whose clusters fit the budget gets the log-probabilities of a prefill of the same text, within 0.001; a longer
one recalls in every layer that can, and only in these; a prefix that two prompts share is clustered once. It says nothing of
quality, which hangs on the weights ([quality.md](quality.md)). The reason why SGLang does not start a model, or ends at its
first prompt, is the first error in its log. `make test` runs all of it, `make test-long` {tensor} on two ranks.

SGLang runs OLMo 3 by its code for OLMo 2, and SmolLM3 and Seed-OSS in the implementation of Transformers.

<!-- no figures -->
| model | architecture | head size | attention | outcome | layers that recall |
|---|---|---|---|---|---|
"""
_OUTCOMES = {"refused": "refused", "not startable": "not startable here"}


def row_of(architecture: Architecture, result: dict[str, Any]) -> str:
    """The line of one architecture."""
    outcome, recalling = "works", f"{len(architecture.recalls)} of {architecture.layers}"
    if result["outcome"] != "works":
        reason = result["reason"].removeprefix("--attention-backend clusterkv cannot serve this: ")
        outcome, recalling = f"{_OUTCOMES[result['outcome']]}: {reason}", ""
    elif architecture.arguments:
        outcome += f" with {_flags(architecture.arguments)}"
    cells = (
        architecture.name,
        architecture.architecture,
        str(architecture.head_dim),
        architecture.about,
        outcome,
        recalling,
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _flags(arguments: dict[str, Any]) -> str:
    """Arguments of sgl.Engine as they are written on a command line."""
    flags = [(f"--{name.replace('_', '-')}", value) for name, value in arguments.items()]
    return ", ".join(flag if value is True else f"{flag} {value}" for flag, value in flags)


def head() -> str:
    """What stands above the table's rows."""
    return _HEAD.format(tensor=" and ".join(ON_TWO_RANKS))


def text(results: list[tuple[Architecture, dict[str, Any]]]) -> str:
    """The whole page."""
    return head() + "\n".join(row_of(architecture, result) for architecture, result in results) + "\n"
