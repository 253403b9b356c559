"""Requests to give memory away and to take it back, on our CPU platform: they are answered, and nothing is done.

SGLang gives away what its memory saver took, which needs an accelerator, and waits for the device that torch was built for.
"""

from __future__ import annotations

import logging
from typing import Any

from sglang_clusterkv.serving.request_checks import send

logger = logging.getLogger(__name__)


def is_answered(scheduler: Any, request: Any) -> bool:
    """Whether a scheduler's request is one of these: then its sender has the answer."""
    from sglang.srt.managers.io_struct import (
        ReleaseMemoryOccupationReqInput,
        ReleaseMemoryOccupationReqOutput,
        ResumeMemoryOccupationReqInput,
        ResumeMemoryOccupationReqOutput,
    )

    answers = {
        ReleaseMemoryOccupationReqInput: ReleaseMemoryOccupationReqOutput,
        ResumeMemoryOccupationReqInput: ResumeMemoryOccupationReqOutput,
    }
    answer = answers.get(type(request))
    if answer is None:
        return False
    logger.warning("clusterkv: on a CPU no memory is given away: %s changes nothing", type(request).__name__)
    send(scheduler, "send_control_output", answer(), request)
    return True
