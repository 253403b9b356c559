#!/usr/bin/env bash
# What a GPU machine without a network lacks for benchmarks.gpu, as one archive: SGLang and FlashInfer, trimmed, the packages that
# they import, pytest, this project. The machine has Python 3.12, torch 2.11 for CUDA 13 with torchvision, Triton 3.6, transformers.
#
#     benchmarks/gpu/kit.sh OUT [AOT]     writes OUT/gpu-site.tar.xz, about 30 MB; PY names a python3.12 with pip
#
# There: mkdir build/gpu-site && tar -C build/gpu-site -xJf gpu-site.tar.xz, then `make test-gpu`.
# AOT: a folder of FlashInfer's compiled modules, each NAME/NAME.so, as FlashInfer leaves them in its cache's folder cached_ops
# where it has compiled for the same GPU; without it nothing runs by FlashInfer there unless it may compile, for minutes.
#
# SGLang's kernel package is compiled for a newer torch: the four operators of it that a Llama needs are torch's here. So its FA3 is
# missing, and dense attention is Triton's or FlashInfer's.
set -euo pipefail
out=$1 aot=${2:-} py=${PY:-python3.12}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
wheels=$work/wheels site=$work/site
mkdir -p "$out" "$wheels" "$site"
out=$(cd "$out" && pwd)

"$py" -m pip download -q --no-deps --only-binary=:all: -d "$wheels" \
    sglang==0.5.23 sglang-kernel==0.4.10 flashinfer_python==0.7.2 apache-tvm-ffi==0.1.11 orjson pybase64 starlette msgspec pydantic \
    pydantic-core pyzmq ipython traitlets typing-inspection uvicorn uvloop fastapi annotated-types opentelemetry-api dill \
    compressed-tensors==0.18.0 loguru gguf openai==2.8.0 sniffio distro partial-json-parser setproctitle jsonschema referencing \
    rpds-py jsonschema-specifications xgrammar==0.2.7 soundfile==0.13.1 cffi pycparser python-multipart prometheus-client sentencepiece tiktoken \
    pytest pluggy iniconfig pytest-xdist execnet hypothesis sortedcontainers psutil requests
"$py" -m pip install -q --no-index --no-deps --no-compile --target "$site" \
    $(find "$wheels" -name '*.whl' | grep -v -e sglang -e flashinfer_python)

unpack() { "$py" -m zipfile -e "$wheels"/$1*.whl "$work/$1"; }
unpack sglang-0
unpack sglang_kernel
unpack flashinfer_python
for name in sglang-0 sglang_kernel flashinfer_python; do cp -r "$work/$name/." "$site/"; done
rm -rf "$site"/sglang/multimodal_gen "$site"/sglang/srt/rust_extensions/*.so
find "$site/sgl_kernel" -name '*.so' -delete
rm -rf "$site"/flashinfer/data/{cutlass,cccl,spdlog} "$site"/flashinfer/fused_moe/backends/cudnn_frost/artifacts
[ -z "$aot" ] || rm -rf "$site/flashinfer/data/include"
# The templates are read to name a module, even where it is there compiled.
find "$site/flashinfer/data/csrc" -mindepth 1 -maxdepth 1 ! -name '*.jinja' ! -name 'batch_decode*' ! -name 'batch_prefill*' \
    -exec rm -rf {} +
cp "$root/benchmarks/gpu/torch_operators.py" "$site/sgl_kernel/load_utils.py"
sed -i 's/_has_flashinfer = True/_has_flashinfer = False/' "$site/sgl_kernel/elementwise.py"
if [ -n "$aot" ]; then
    for folder in "$aot"/*/; do
        name=$(basename "$folder")
        [ -f "$folder/$name.so" ] || continue
        mkdir -p "$site/flashinfer/data/aot/$name"
        cp "$folder/$name.so" "$site/flashinfer/data/aot/$name/"
    done
fi
# Installed, with its dist-info: SGLang finds plugins by their entry points.
"$py" -m pip install -q --no-deps --no-compile --target "$site" "$root"
tar -C "$site" -cf - . | xz -6 -T0 >"$out/gpu-site.tar.xz"
ls -l "$out/gpu-site.tar.xz"
