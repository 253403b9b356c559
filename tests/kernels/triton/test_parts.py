"""Attend and the estimate in one launch give what the torch references give, however their programs divide the work.

Red when: programs of a (request, kv head) divide its work otherwise than the model of the step does, one leaves its part where
another's lies, a part is nobody's, or one kind reads an argument of the other.
"""

from __future__ import annotations

import msgspec
import pytest
import torch
import triton
import triton.language as tl

from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels import grids
from sglang_clusterkv.kernels.decode.triton_parts import division
from sglang_clusterkv.kernels.estimate import triton_own
from sglang_clusterkv.kernels.grids import divided, part_programs
from tests.support.filled import SCALE, Filled, assert_close, merged

CONFIG = ClusterKVConfig(budget_tokens=48, candidate_tokens=160, segment_tokens=256, estimate_clusters=20)


@triton.jit
def division_kernel(out, of, MOVES: tl.constexpr):
    i = tl.program_id(0)
    splits, own = division(
        tl.load(of + 5 * i), tl.load(of + 5 * i + 1), tl.load(of + 5 * i + 2), tl.load(of + 5 * i + 3),
        tl.load(of + 5 * i + 4), MOVES,
    )  # fmt: skip
    tl.store(out + 2 * i, splits)
    tl.store(out + 2 * i + 1, own)


@pytest.mark.parametrize("moves", [False, True])
def test_programs_divide_the_work_as_the_model_has_it(moves: bool, device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    most = torch.tensor([61, 3000, 2049, 20000, 1024])
    of = (torch.rand(200, 5, generator=generator) ** 3 * most).int() + torch.tensor([4, 1, 0, 1, 1], dtype=torch.int32)
    out = torch.zeros(200, 2, dtype=torch.int32, device=device)
    division_kernel[(200,)](out, of.to(device), MOVES=moves)
    parts = [divided(*row, moves) for row in of.tolist()]
    assert out.tolist() == [[part.splits, part.own] for part in parts]
    for (programs, _, _, clusters, limit), part in zip(of.tolist(), parts, strict=True):
        assert sum(part) == programs and min(part[:2]) >= 1
        assert part.rest >= 1 if clusters > limit or moves else part.rest == 0


def test_programs_are_as_many_as_run_at_once_but_for_large_batches(as_served: None) -> None:
    assert [part_programs(pairs) for pairs in (1, 8, 64, 99, 224, 4096)] == [64, 49, 6, 4, 4, 4]
    assert divided(6, 80, 512, 4086, 512) == (1, 2, 3)
    assert divided(49, 80, 512, 16374, 512) == (4, 5, 40)


@pytest.mark.parametrize("programs", [4, 5, 23])
@pytest.mark.parametrize(
    ("fields", "head_dim", "group", "dtype"),
    [
        ({}, 64, 3, torch.float32),
        ({"centroid_dtype": "int8"}, 96, 1, torch.float32),
        ({"estimate_clusters": 10_000}, 64, 1, torch.bfloat16),
        ({"moving_values": "always"}, 64, 3, torch.float32),
        ({"moving_values": "always", "estimate_clusters": 10_000}, 96, 1, torch.float32),
    ],
)
def test_both_parts_equal_the_references(
    programs: int, fields: dict[str, object], head_dim: int, group: int, dtype: torch.dtype, device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(grids, "part_programs", lambda pairs: programs)
    filled = Filled(
        msgspec.structs.replace(CONFIG, **fields), device, head_dim=head_dim, group=group, dtype=dtype, kv_heads=1
    )
    decoder, w = filled.decoder, filled.decoder.workspace
    if filled.config.estimate_clusters < 64:
        triton_own.choose_own(filled.index, filled.step, w)
    decoder.attend_and_estimate(filled.q, filled.keys, filled.values, 0, SCALE)
    filled.guarded.assert_untouched()
    batch = filled.step.batch
    exact, rest = w.exact(batch, programs), w.rest(batch, programs)
    for b in range(batch):
        count = int(w.exact_count[b, 0])
        assert 1 <= count < programs
        for (output, lse), kept, expected in (
            (exact, count, filled.exact()),
            (rest, programs - count, filled.estimated()),
        ):
            assert lse[b, :, kept:].isnan().all(), "a part that is nobody's was written"
            output, lse = output[b : b + 1, :, :kept], lse[b : b + 1, :, :kept]
            found = merged(output.masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0), lse)  # which has no output
            assert_close(found.output[0], expected.output[b], dtype)
            assert_close(found.lse[0], expected.lse[b], dtype)
