"""Sharp heads: one request whose queries' logits deviate by as much as a test asks for, and exact attention to compare with.

The spread term g of a cluster grows with the square of that deviation.

    python -m tests.support.sharp

prints the table of docs/quality.md, "Sharp heads": errors as served, and with no cap of the estimate's spread.
"""

from __future__ import annotations

import math
from unittest.mock import patch

import torch

from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.decode import reference
from sglang_clusterkv.kernels.score import reference as score_reference
from sglang_clusterkv.memory.step import SparseStep
from tests.support.scenes import PAGE, Scene

HEAD_DIM, GROUP, KV_HEADS = 64, 3, 2  # the CPU kernels of many tests
SCALE = 0.125
DEVIATIONS = (8, 16, 24, 32, 48, 64, 96)
SEEDS = range(9)
TOKENS = 4000


class SharpScene:
    """A request of `tokens` tokens, clustered by the engine, that decodes its next token.

    Args:
        config: of the engine.
        tokens: of the prompt.
        seed: of keys, values and queries.
    """

    def __init__(self, config: ClusterKVConfig, tokens: int, seed: int = 0) -> None:
        sizes = {"layers": 1, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
        self.scene = Scene(config, **sizes, pages=tokens // PAGE + 9, rows=2, context=tokens + PAGE, seed=seed)
        self.keys, self.values = self.scene.keys[0], self.scene.values[0]
        self.index = self.scene.index
        self.scene.prefill(1, tokens)
        step = self.scene.decode([1], [tokens + 1])
        assert step.sparse is not None and step.dense is None, "the scene must decode sparsely"
        self.step: SparseStep = step.sparse
        slots = self.scene.slots(1, tokens + 1)
        self._keys, self._values = (x[slots].double().repeat_interleave(GROUP, 1) for x in (self.keys, self.values))
        self._directions = self.scene.queries(1, KV_HEADS * GROUP)[0].double()

    def _logits(self, q: torch.Tensor) -> torch.Tensor:
        return SCALE * torch.einsum("hd,thd->ht", q, self._keys)

    def queries(self, deviation: float) -> torch.Tensor:
        """float32 [1, heads, D]: the logits of each over all tokens deviate by this."""
        size = deviation / self._logits(self._directions).std(1, keepdim=True)
        return (size * self._directions).float().unsqueeze(0)

    def arguments(self, q: torch.Tensor) -> tuple[object, ...]:
        """Of `sparse_decode`."""
        return q, self.keys, self.values, self.index, 0, self.step, SCALE

    def errors(self, output: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """Distance of an output [1, heads, D] from exact attention over its norm, float64 [heads]."""
        exact = torch.einsum("ht,thd->hd", self._logits(q[0].double()).softmax(-1), self._values)
        return (output[0].double() - exact).norm(dim=1) / exact.norm(dim=1)

    def bonus(self, q: torch.Tensor) -> torch.Tensor:
        """The spread terms g of all clusters and query heads, flat."""
        grouped = q.unflatten(1, (KV_HEADS, GROUP))
        scores = score_reference.score(grouped, self.keys, self.index, 0, self.step, SCALE)
        return scores.bonus[(scores.size > 0).unsqueeze(2).expand_as(scores.bonus)]


def main() -> None:
    """Print the table."""
    scenes = [SharpScene(ClusterKVConfig(), TOKENS, seed) for seed in SEEDS]
    print(
        "| deviation | g: median, largest | error, mean | largest | heads above 1 % | no cap: mean | heads above 1 % |"
    )
    print("|---|---|---|---|---|---|---|")
    for deviation in DEVIATIONS:
        bonus = torch.cat([scene.bonus(scene.queries(deviation)) for scene in scenes])
        found = []
        for cap in (score_reference.SPREAD_CAP, math.inf):
            with patch.object(score_reference, "SPREAD_CAP", cap):
                outputs = [reference.sparse_decode(*scene.arguments(scene.queries(deviation))) for scene in scenes]
            errors = [scene.errors(out, scene.queries(deviation)) for scene, out in zip(scenes, outputs, strict=True)]
            found.append(torch.cat(errors))
        served, uncapped = found
        print(
            f"| {deviation} | {bonus.median():.0f}, {bonus.max():.0f} | {served.mean():.4f} | {served.max():.3f} "
            f"| {int((served > 0.01).sum())} of {len(served)} | {uncapped.mean():.4f} | {int((uncapped > 0.01).sum())} |"
        )


if __name__ == "__main__":
    main()
