"""The CPU kernels do what the torch references define, stage by stage and as a chain.

Red when: a kernel reads a wrong row, segment or head, unpacks a format wrongly, breaks a tie upwards, counts an empty
or padding cluster, or divides by zero where the reference is finite; buffers grow with the configuration instead of the step.
"""

from __future__ import annotations

import functools
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sglang_clusterkv
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels import cpu_math
from sglang_clusterkv.kernels.decode import cpu, prepare, reference
from sglang_clusterkv.kernels.refine.reference import candidate_logits, candidate_scores, recall
from sglang_clusterkv.kernels.score.reference import score
from sglang_clusterkv.kernels.select.reference import select
from sglang_clusterkv.memory.fp8 import FP8
from sglang_clusterkv.memory.masses import SPREAD_CAP
from sglang_clusterkv.memory.rotation import rotation_matrix
from sglang_clusterkv.memory.step import SparseStep
from tests.support.scenes import Scene

SCALE = 0.2
ALONE = {"code_bits": 1}  # of scenes with one query head per kv head, for which one kernel is compiled


def scene_and_step(config: ClusterKVConfig, **sizes: object) -> tuple[Scene, object]:
    scene = Scene(config, **sizes)
    lengths = [700, 333, 1300]
    for row, length in enumerate(lengths, 1):
        scene.prefill(row, length)
    step = scene.decode([1, 2, 3], [length + 1 for length in lengths])
    assert step.sparse is not None and step.dense is None, "the scene must decode sparsely"
    return scene, step.sparse


def config_of(**fields: object) -> ClusterKVConfig:
    small = {"budget_tokens": 48, "candidate_tokens": 160, "segment_tokens": 256, "estimate_clusters": 20}
    return ClusterKVConfig(**({"moving_values": "always"} | small | fields))


# Few combinations, for each is a compilation; together they have every format, code width and way of unpacking.
@pytest.mark.parametrize(
    ("centroid_dtype", "head_dim", "group", "bits"),
    [("int4", 64, 3, 2), ("int4", 32, 1, 1), ("int8", 80, 5, 1), ("bf16", 96, 2, 2), ("int4", 256, 2, 2)],
)
def test_the_chain_equals_the_reference(centroid_dtype: str, head_dim: int, group: int, bits: int) -> None:
    scene, step = scene_and_step(config_of(centroid_dtype=centroid_dtype, code_bits=bits), head_dim=head_dim)
    q = scene.queries(3, 2 * group)
    for layer, sinks in ((0, None), (1, 3 * torch.randn(2 * group, generator=scene.generator) + 5)):
        arguments = (q, scene.keys[layer], scene.values[layer], scene.index, layer, step, SCALE, None, sinks)
        torch.testing.assert_close(
            cpu.sparse_decode(*arguments), reference.sparse_decode(*arguments), atol=2e-5, rtol=2e-5
        )


@pytest.mark.parametrize("chain", [cpu, reference], ids=["cpu", "reference"])
@pytest.mark.parametrize("fields", [{}, {"estimate": False}])
def test_a_learned_sink_is_an_attended_token_without_a_value(chain: object, fields: dict[str, bool]) -> None:
    """So it takes its share of the mass, from what is ranked, too; with one query head per kv head there is such a key."""
    scene, step = scene_and_step(config_of(**ALONE, **fields))
    keys, values, index = scene.keys[0], scene.values[0], scene.index
    lists = {name: value[:1] for name, value in step._asdict().items() if isinstance(value, torch.Tensor)}
    step = step._replace(batch=1, **lists)
    q, sinks = scene.queries(1, 2), torch.tensor([12.0, 9.0])
    plain = chain.sparse_decode(q, keys, values, index, 0, step, SCALE)
    index.mass_cells.zero_()
    with_sinks = chain.sparse_decode(q, keys, values, index, 0, step, SCALE, None, sinks)
    mass = index.mass[0].clone()
    if chain is cpu:
        base = cpu.last_read(cpu.decoder_of(index, 1, torch.float32), 0).base_logit
        assert torch.equal(base[..., -1].flatten(), sinks) and base.shape[-1] == int(step.base_count[0]) + 1

    keys[0] = q[0] * (sinks / (SCALE * q[0].square().sum(-1))).unsqueeze(-1)  # of the padding page
    values[0] = 0
    slots = step.base_slots[:, : int(step.base_count[0])]
    longer = step._replace(base_slots=torch.nn.functional.pad(slots, (0, 1)), base_count=step.base_count + 1)
    index.mass_cells.zero_()
    expected = chain.sparse_decode(q, keys, values, index, 0, longer, SCALE)
    torch.testing.assert_close(with_sinks, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mass, index.mass[0], atol=1e-5, rtol=1e-5)
    assert (with_sinks - plain).norm() > 0.1 * plain.norm(), "the sinks changed nothing"


def test_a_bf16_pool_gives_what_the_reference_gives() -> None:
    scene, step = scene_and_step(config_of(), dtype=torch.bfloat16)
    q = scene.queries(3, 4).bfloat16()
    arguments = (q, scene.keys[1], scene.values[1], scene.index, 1, step, SCALE)
    torch.testing.assert_close(cpu.sparse_decode(*arguments), reference.sparse_decode(*arguments), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("dtype", FP8)
def test_a_pool_in_fp8_gives_what_the_reference_gives_and_what_its_numbers_in_float32_give(dtype: torch.dtype) -> None:
    scene, step = scene_and_step(config_of(), dtype=dtype, head_dim=128)
    arguments = (scene.index, 1, step, SCALE)
    q, pool, wide = (
        scene.queries(3, 4),
        (scene.keys[1], scene.values[1]),
        (scene.keys[1].float(), scene.values[1].float()),
    )
    output = cpu.sparse_decode(q, *pool, *arguments)
    torch.testing.assert_close(output, reference.sparse_decode(q, *pool, *arguments), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(output, cpu.sparse_decode(q, *wide, *arguments), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    "fields", [{"estimate": False}, {"refine": False}, {"estimate_clusters": 4096}, {"estimate_codes": False}]
)
def test_every_switch_does_what_it_does_in_the_reference(fields: dict[str, object]) -> None:
    scene, step = scene_and_step(config_of(**fields))
    q = scene.queries(3, 4)
    arguments = (q, scene.keys[0], scene.values[0], scene.index, 0, step, SCALE)
    torch.testing.assert_close(cpu.sparse_decode(*arguments), reference.sparse_decode(*arguments), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("sharpness", [1.0, 30.0])
def test_an_estimate_wider_than_the_choice_gives_what_the_reference_gives(sharpness: float) -> None:
    """Then its largest logit is above all of the choice's, by the cap at most, and neither is measured by the other."""
    scene, step = scene_and_step(config_of(choice_spread=0.0, estimate_spread=1.0))
    q = sharpness * scene.queries(3, 4)
    arguments = (q, scene.keys[0], scene.values[0], scene.index, 0, step, SCALE)
    expected = reference.sparse_decode(*arguments)
    assert expected.isfinite().all()
    torch.testing.assert_close(cpu.sparse_decode(*arguments), expected, atol=2e-4, rtol=2e-4)
    scores = score(q.unflatten(1, (2, 2)), scene.keys[0], scene.index, 0, step, SCALE)
    over = ((scores.dot + scores.estimate_bonus).amax(-1) - scores.dot.amax(-1)).amax()
    assert 0 < over <= SPREAD_CAP, f"the estimate's peak is {over} above the choice's"


@functools.cache
def scene_of_all() -> tuple[Scene, SparseStep]:
    return scene_and_step(config_of())


@settings(max_examples=40)
@given(st.integers(1, 200), st.integers(0, 400), st.integers(1, 90), st.booleans(), st.booleans())
def test_every_token_counts_once(budget: int, more: int, own: int, codes: bool, refine: bool) -> None:
    """A query of nothing weighs all tokens alike, so the mass of all is their number, whatever is read and estimated how."""
    scene, step = scene_of_all()
    scene.index.config = config_of(
        budget_tokens=budget,
        candidate_tokens=budget + more,
        estimate_clusters=own,
        estimate_codes=codes,
        refine=refine,
    )
    decoder = cpu.CpuDecoder(scene.index, 2, torch.float32)
    decoder.prepare(step, 2, 2, 32)
    q = np.zeros((3, 2, 2, 32), np.float32)
    decoder.run(q, scene.keys[0].numpy(), scene.values[0].numpy(), 0, SCALE, np.empty_like(q))
    u, base = decoder.buffers, step.base_count.numpy()[:, None, None]
    clustered = step.page_count.numpy()[:, None, None] * 16
    assert len(np.unique(u.recalled[2, 1, :budget])) == budget
    np.testing.assert_allclose(np.exp(u.exact_lse), np.broadcast_to(base + budget, u.lse.shape), rtol=1e-5)
    np.testing.assert_allclose(np.exp(u.lse), np.broadcast_to(base + clustered, u.lse.shape), rtol=1e-5)


def test_codes_tell_what_is_left_better_than_mean_keys() -> None:
    """Where all tokens are candidates, so that no cluster's mean makes up for another's."""
    scene, step = scene_of_all()
    q = 2 * scene.queries(3, 4)
    grouped, errors = q.unflatten(1, (2, 2)).numpy(), []
    exact = torch.stack([dense_lse(scene, row, length, q[row - 1]) for row, length in enumerate((701, 334, 1301), 1)])
    for codes in (False, True):
        scene.index.config = config_of(candidate_tokens=10_000, estimate_codes=codes)
        decoder = cpu.CpuDecoder(scene.index, 2, torch.float32)
        decoder.prepare(step, 2, 2, 32)
        pool = scene.keys[0].numpy(), scene.values[0].numpy()
        decoder.run(grouped, *pool, 0, SCALE, np.empty_like(grouped))
        errors.append(np.abs(decoder.buffers.lse - exact.numpy()).mean())
    assert errors[1] < 0.75 * errors[0], errors


def dense_lse(scene: Scene, row: int, length: int, q: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp of all tokens' logits of a request with two query heads per kv head, [H, 2]."""
    keys = scene.keys[0][scene.slots(row, length)]
    return (SCALE * torch.einsum("hgd,thd->hgt", q.unflatten(0, (2, 2)), keys)).logsumexp(-1)


def test_a_division_by_zero_raises_in_no_kernel() -> None:
    """By the error model of the kernels' own `njit`, which all of them are made by."""
    assert np.isposinf(cpu_math.njit(lambda x: np.float32(1.0) / x)(np.float32(0.0)))
    folder = Path(sglang_clusterkv.__file__).parent
    others = [
        path
        for path in folder.rglob("*.py")
        if re.search(r"import.*\bnumba\b|from numba import.*jit", path.read_text()) and path.name != "cpu_math.py"
    ]
    assert not others, f"{others} may make kernels of their own"


@pytest.mark.parametrize("refine", [True, False])
def test_buffers_are_as_large_as_the_step_whatever_the_configuration(refine: bool) -> None:
    few = config_of(refine=refine, candidate_tokens=1536, budget_tokens=48 if refine else 1536)
    many = config_of(refine=refine, candidate_tokens=4 * 10**9, budget_tokens=48 if refine else 4 * 10**9)
    outputs = []
    for config in (few, many):
        scene, step = scene_and_step(config_of(refine=refine))  # a budget below what is clustered: the step is sparse
        scene.index.config = config
        scene.index.scratch.clear()
        prepare(scene.index, 2, torch.float32, step)
        decoder = cpu.decoder_of(scene.index, 2, torch.float32)
        buffers = decoder.buffers
        most = step.recallable_tokens + 255
        assert max(buffers.value.shape[2], buffers.place.shape[2], buffers.recalled.shape[2]) <= most
        arguments = (scene.queries(3, 4), scene.keys[0], scene.values[0], scene.index, 0, step, SCALE)
        outputs.append(cpu.sparse_decode(*arguments))
        assert decoder.buffers is buffers, "made with the lists of the step, not by its first layer"
    assert torch.equal(*outputs), "with all recallable tokens as candidates more change nothing"


def test_a_step_that_no_memory_was_found_for_is_not_taken_for_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    scene, step = scene_and_step(config_of())
    other = step._replace(base_slots=step.base_slots.repeat(1, 9))
    decoder = cpu.decoder_of(scene.index, 2, torch.float32)
    make = cpu.make_buffers

    def fails(*_: int) -> cpu.Buffers:
        raise MemoryError

    monkeypatch.setattr(cpu, "make_buffers", fails)
    for _ in range(2):
        with pytest.raises(MemoryError):
            decoder.prepare(other, 2, 2, 32)
    monkeypatch.setattr(cpu, "make_buffers", make)
    decoder.prepare(other, 2, 2, 32)
    assert decoder.buffers.base_logit.shape[3] >= other.base_slots.shape[1]


def test_each_stage_equals_its_reference() -> None:
    scene, step = scene_and_step(config_of())
    grouped = scene.queries(3, 4).unflatten(1, (2, 2))
    decoder = cpu.decoder_of(scene.index, 2, torch.float32)
    decoder.prepare(step, 2, 2, 32)
    decoder.score(grouped.numpy(), scene.keys[0].numpy(), 0, SCALE)
    expected = score(grouped, scene.keys[0], scene.index, 0, step, SCALE)
    buffers, clusters = decoder.buffers, expected.size.shape[-1]
    for b, h in itertools.product(range(3), range(2)):
        own = int(step.page_count[b]) * 2
        np.testing.assert_array_equal(buffers.size[b, h, :own], expected.size[b, h, :own])
        np.testing.assert_array_equal(buffers.begin[b, h, :own], expected.begin[b, h, :own])
        np.testing.assert_allclose(buffers.dot[b, h, :, :own], expected.dot[b, h, :, :own], atol=1e-5)
        np.testing.assert_allclose(buffers.log_mass[b, h, :own], expected.log_mass[b, h, :own], rtol=1e-6, atol=2e-5)
    np.testing.assert_allclose(buffers.total, expected.total, rtol=1e-5)

    decoder.select()
    chosen = select(expected, scene.index, 0, step, 160)
    np.testing.assert_array_equal(buffers.candidates, chosen.count)
    for b, h in itertools.product(range(3), range(2)):
        named = chosen.cluster[b, h, : int(chosen.count[b, h])]
        own = int(step.page_count[b]) * 2
        np.testing.assert_array_equal(buffers.taken[b, h, :own], np.bincount(named, minlength=clusters)[:own])

    decoder.rotate(grouped.numpy())
    np.testing.assert_allclose(buffers.rotated, grouped @ rotation_matrix(32).T, atol=1e-5)
    decoder.refine(0, SCALE)
    logits = candidate_logits(grouped, expected, chosen, scene.index, 0, SCALE)
    value = candidate_scores(logits, expected, chosen)
    for b, h in itertools.product(range(3), range(2)):
        count = int(chosen.count[b, h])
        order = np.argsort(buffers.place[b, h, :count])
        np.testing.assert_array_equal(buffers.place[b, h, :count][order], chosen.position[b, h, :count])
        np.testing.assert_allclose(buffers.value[b, h, :count][order], value[b, h, :count], rtol=1e-4)
        masses = (logits - expected.total.unsqueeze(-1)).exp()[b, h, :, :count]
        np.testing.assert_allclose(buffers.by_code[b, h, :, :count][:, order], masses, rtol=1e-4, atol=1e-30)

    decoder.recall()
    recalled = recall(value, expected, chosen, 48)
    for b, h in itertools.product(range(3), range(2)):
        count = int(chosen.count[b, h])
        gone = torch.isin(chosen.slot[b, h, :count], recalled.slots[b, h])
        rest = buffers.place[b, h, :count][buffers.rest[b, h, :count] == 1]
        assert sorted(rest.tolist()) == chosen.position[b, h, :count][~gone].tolist() and len(rest) == count - 48


def test_ties_go_to_the_lower_position() -> None:
    scene = Scene(config_of(**ALONE, budget_tokens=32, candidate_tokens=64))
    for buffer in scene.keys:
        buffer[:] = buffer[0]
    scene.prefill(1, 600)
    step = scene.decode([1], [601]).sparse
    q = scene.queries(1, 2)
    arguments = (q, scene.keys[0], scene.values[0], scene.index, 0, step, SCALE)
    torch.testing.assert_close(cpu.sparse_decode(*arguments), reference.sparse_decode(*arguments), atol=2e-5, rtol=2e-5)
    decoder = cpu.decoder_of(scene.index, 1, torch.float32)
    assert decoder.buffers.recalled[0, 0].tolist() == scene.slots(1, 601)[16:48].tolist()
