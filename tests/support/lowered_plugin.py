"""A plugin of SGLang that lowers the limit of request_checks: ids that the model would serve are refused.

So the guard is tested with requests that do no harm where it fails.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

LIMIT = 49_000  # of the 49,152 tokens of the demo model's tokenizer


def register() -> None:
    """Called by SGLang in each of its processes."""
    from sglang_clusterkv.serving import request_checks

    original = request_checks.takes_of

    def lowered(scheduler: Any) -> request_checks.Takes:
        return replace(original(scheduler), ids=range(LIMIT), logits=range(LIMIT))

    request_checks.takes_of = lowered
