"""Switch the attention policy of a running server, so that several are measured over one radix cache.

The switch is a request of one token whose custom logit processor runs in the scheduler process: start the server with
`benchmarks.forced.FLAGS`, from the repository's root, with one scheduler process and no other request in flight.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

from benchmarks.policies import POLICIES
from benchmarks.policies.places import PlaceRecorder
from benchmarks.policies.recorder import CountWriter, Recorder
from benchmarks.servers import Server
from sglang_clusterkv.clusters.engine import ClusterEngine, SparseDecode
from sglang_clusterkv.config import STEP_OPTIONS
from sglang_clusterkv.kernels.decode import sparse_decode
from sglang_clusterkv.serving import runtime

_at_start: WeakKeyDictionary[ClusterEngine, dict[str, Any]] = (
    WeakKeyDictionary()
)  # step options before the first switch


class UsePolicy(CustomLogitProcessor):
    """Runs in the scheduler. `custom_params`: the arguments of `switch`."""

    def __call__(self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None) -> torch.Tensor:
        """Switch, and leave the logits as they are."""
        engine = runtime.engine()
        assert engine is not None, "the server was not started with --attention-backend clusterkv"
        for params in custom_param_list or []:
            switch(engine, params["policy"], params["options"], params.get("record"))
        return logits


def switch(engine: ClusterEngine, policy: str, options: dict[str, Any], record: dict[str, Any] | None = None) -> None:
    """Make an engine decode by a policy; step options that are not given are those at the start.

    Args:
        engine: of the server.
        policy: a name of `POLICIES`.
        options: step options.
        record: `file` of a `PlaceRecorder`, `file` and `heads` of a `Recorder`, or `file` and `counts` (anything) of a
            `CountWriter`; it writes at the next switch.
    """
    at_start = _at_start.setdefault(engine, {name: getattr(engine.config, name) for name in STEP_OPTIONS})
    chosen = POLICIES[policy]
    values = at_start | options | chosen.options
    values["candidate_tokens"] = max(values["candidate_tokens"], values["budget_tokens"])
    before: object = engine.sparse_decode
    if isinstance(before, Recorder | PlaceRecorder | CountWriter):
        before.write()
    engine.set_step_options(**values)
    decode: SparseDecode = sparse_decode if chosen.make is None else chosen.make(engine.config.budget_tokens)
    if record and "heads" in record:
        decode = Recorder(decode, len(engine.key_buffers), int(record["heads"]), Path(record["file"]))
    elif record and "counts" in record:
        decode = CountWriter(decode, Path(record["file"]))
    elif record:
        decode = PlaceRecorder(decode, engine, Path(record["file"]))
    engine.sparse_decode = decode


class ForgetClusters(CustomLogitProcessor):
    """Runs in the scheduler: every page is unclustered from the next forward on, and its KV stays."""

    def __call__(self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None) -> torch.Tensor:
        """Forget, and leave the logits as they are."""
        engine = runtime.engine()
        assert engine is not None, "the server was not started with --attention-backend clusterkv"
        engine.stream.run(engine.index.invalidate_all)
        return logits


def forget_clusters(server: Server) -> None:
    """Whoever finds KV in the radix cache from now on clusters it afresh."""
    server.generate(
        [1, 2, 3],
        1,
        sampling_params={"temperature": 0, "max_new_tokens": 1},
        custom_logit_processor=ForgetClusters.to_str(),
    )


def use(server: Server, policy: str, *, record: dict[str, Any] | None = None, **options: Any) -> None:
    """Switch a running server to a policy of `POLICIES`, with step options such as `budget_tokens`; `record`: see `switch`."""
    assert policy in POLICIES, f"{policy} is none of {', '.join(POLICIES)}"
    params = {"policy": policy, "options": options, "record": record}
    server.generate(
        [1, 2, 3],
        1,
        sampling_params={"temperature": 0, "max_new_tokens": 1, "custom_params": params},
        custom_logit_processor=UsePolicy.to_str(),
    )
