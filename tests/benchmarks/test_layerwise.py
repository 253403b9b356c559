"""The evaluation that takes a text through a model a layer at a time.

Red when: the model differs from transformers', a prompt is parted otherwise than the engine parts it, steps with a budget of
everything are not dense, or a picture or a join fails.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.quality.documents import Document
from benchmarks.quality.layerwise import ORACLE, OTHERS, Prefix, index_share, run_document, table
from benchmarks.quality.llama_layers import LayeredModel
from benchmarks.quality.model_level import arms_of, join, summary
from sglang_clusterkv.config import ClusterKVConfig
from tests.support.scenes import Scene
from tests.support.tiny_model import tiny_model

TOKENS = 700


@pytest.fixture(scope="module")
def model() -> LayeredModel:
    return LayeredModel(tiny_model())


@pytest.fixture(scope="module")
def document() -> Document:
    ids = torch.randint(1000, (TOKENS + 20,), generator=torch.Generator().manual_seed(0)).tolist()
    return Document(ids[:TOKENS], ids[TOKENS:], slice(0, 12), [slice(14, 18)])


@torch.inference_mode()
def test_the_model_is_that_of_transformers(model: LayeredModel, document: Document) -> None:
    ids = document.prompt[:100]
    exact = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)(torch.tensor([ids])).logits[0]
    kept = model.prefill(ids)

    def dense(layer: int, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        torch.testing.assert_close(keys, kept[layer][0])
        logits = model.scale * torch.einsum("nhgd,mhd->hgnm", q, keys)
        hidden = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        return torch.einsum("hgnm,mhd->nhgd", logits.masked_fill(hidden, -torch.inf).softmax(-1), values)

    found = model.log_probabilities(model(ids, 0, dense))
    torch.testing.assert_close(found, exact.log_softmax(-1), atol=1e-3, rtol=1e-3)


def test_a_prompt_is_parted_as_the_engine_parts_it() -> None:
    config = ClusterKVConfig(budget_tokens=64, candidate_tokens=160, segment_tokens=256)
    for length in (333, 700, 16 + 256 + 64 + 40):
        scene = Scene(config)
        scene.prefill(1, length)
        step = scene.decode([1], [length + 1]).sparse
        assert step is not None
        prefix = Prefix([(torch.zeros(length, 1, 4),) * 2], config)
        slots = scene.slots(1, length + 1)
        pages = step.pages[0, : int(step.page_count[0])]
        assert slots[prefix.places].tolist() == (pages.unsqueeze(1) * 16 + torch.arange(16)).flatten().tolist()
        assert slots[torch.cat((prefix.base, torch.tensor([length])))].tolist() == step.base_slots[0].tolist()
        assert prefix.of_token[::16].tolist() == step.segment_of_page[0, : len(pages)].tolist()


@torch.inference_mode()
def test_a_budget_of_everything_is_dense(model: LayeredModel, document: Document, tmp_path: Path) -> None:
    done: list[dict[str, Any]] = []
    arms = arms_of(["ours", "ours-1-bit", ORACLE], [64, 640])
    found = run_document(model, document, model.prefill(document.prompt), arms, done.append)
    lines = {line["name"]: line for line in summary([found])}
    assert lines["ours-640"]["kl"] < 1e-6 < lines["ours-64"]["kl"] < lines["ours-1-bit-64"]["kl"]
    assert lines["ours-1-bit-64"]["bytes"] < lines["ours-64"]["bytes"] < lines["ours-640"]["bytes"]
    # This model's heads are sharp: its best tokens are nearly all of its attention.
    assert lines["oracle-640"]["kl"] < 1e-8 < lines["oracle-64"]["kl"] < lines["ours-64"]["kl"] / 100
    assert len(done) == 6 and table([found]).count("\n") == 7
    file = tmp_path / "one.json"
    file.write_text(json.dumps({"setting": "here", "results": {"documents": [found]}}))
    (document_,), setting = join([file, file])
    assert setting == "here" and set(document_["arms"]) == set(lines)


@torch.inference_mode()
def test_methods_of_other_papers_read_what_ours_reads(model: LayeredModel, document: Document) -> None:
    def more(found: dict[str, Any]) -> None:
        pass

    found = run_document(model, document, model.prefill(document.prompt), arms_of(["ours"], [64, 640]), more, OTHERS)
    lines = {line["name"]: line for line in summary([found])}
    for policy in OTHERS:
        some, everything = (lines[f"{policy}-equal-bytes-{budget}"] for budget in (64, 640))
        assert some["bytes"] <= lines["ours-64"]["bytes"] or some["budget"] == 16
        assert some["kl"] > lines["ours-64"]["kl"], policy
        if some["budget"] > 16:  # PQ-HSA's lists alone are more than so short a prompt
            assert everything["kl"] < some["kl"] / 4, policy
    assert table([found]).count("| - | - | - | - |") == 2 * len(OTHERS)


def test_the_picture_has_every_policy(tmp_path: Path) -> None:
    from benchmarks.quality.figures import frontier

    lines = [
        {"policy": name, "change": "", "bytes": 1e5 * i, "kl": 1e-3 * i}
        for i, name in enumerate(("ours", "ours-1-bit"), 1)
    ]
    shares = [index_share(line["policy"], 128) for line in lines]
    movement = 2 * 8 * 72 / 1024
    assert shares == pytest.approx([(66.5 + movement) / 512, 50.5 / 512])
    frontier(lines, shares, lines[:1]).savefig(tmp_path / "frontier.svg")
    assert "1-bit" in (tmp_path / "frontier.svg").read_text()
