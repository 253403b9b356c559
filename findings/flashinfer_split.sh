#!/bin/sh
# FlashInfer 0.7.2: how many programs share the KV cache of a long request in a decode step follows from how many other requests
# there are, not from its length. The plan of the tensor-core decode (`fa2`) takes the smallest chunk with which the chunks of all
# requests are no more than two for each SM, and every request has one, however short. So a request of 131,072 tokens alone
# is shared by 33 programs for each kv head; among 31 of 1,024 tokens by two; among 32 or more one program reads all of it,
# long after the other SMs have ended. FlashInfer's paper describes a scheduler that balances load; this plan does not
# divide work, and a server is slow at one long request once 33 decode together, eight kv heads to an H100.
#
# Shown with the scheduler of the package, compiled for the host, as for a GPU of 132 SMs and a model of 32 query and 8 kv heads of
# 128 channels. Needs a C++ compiler.
#
# Seen (tokens of a program of the long request, and what each would have if all programs had as many):
#   among   0 of 1,024 tokens: 33 for each kv head,   3,972 tokens each; evenly 3,971
#   among   7 of 1,024 tokens: 26 for each kv head,   5,042 tokens each; evenly 4,189
#   among  15 of 1,024 tokens: 18 for each kv head,   7,282 tokens each; evenly 4,437
#   among  31 of 1,024 tokens:  2 for each kv head,  65,536 tokens each; evenly 4,933
#   among  32 of 1,024 tokens:  1 for each kv head, 131,072 tokens each; evenly 4,964
#   among 127 of 1,024 tokens:  1 for each kv head, 131,072 tokens each; evenly 7,912

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
export TMPDIR="$dir"
"${PYTHON:-python3}" -m venv "$dir/venv"
python="$dir/venv/bin/python"
"$python" -m pip install --quiet --no-compile --no-deps flashinfer-python==0.7.2 nvidia-cuda-runtime==13.0.96 \
    nvidia-cuda-crt==13.0.88

site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
headers="$dir/headers"
mkdir -p "$headers/attention"
for name in attention/scheduler.cuh attention/heap.h allocator.h exception.h utils.cuh; do
    cp "$site/flashinfer/data/include/flashinfer/$name" "$headers/$name"
done
# Of this header, which is of the device, the scheduler needs a name.
echo 'namespace flashinfer { enum class PosEncodingMode { kNone }; }' >"$headers/pos_enc.cuh"

cat >"$dir/case.cpp" <<'CPP'
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <vector>

using std::max;
using std::min;

#include "attention/scheduler.cuh"

// What of CUDA's runtime the scheduler calls.
extern "C" cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
extern "C" cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount       ? 132
           : attribute == cudaDevAttrComputeCapabilityMajor  ? 9
           : attribute == cudaDevAttrComputeCapabilityMinor  ? 0
                                                             : 232448;  // bytes of shared memory
  return cudaSuccess;
}
extern "C" cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t) {
  return std::memcpy(to, from, size), cudaSuccess;
}
extern "C" const char* cudaGetErrorString(cudaError_t) { return ""; }

int main() {
  const int heads = 32, kv_heads = 8, channels = 128, longest = 131072, others = 1024;
  std::vector<char> memory(1 << 20), staged(1 << 20);
  for (int beside : {0, 7, 15, 31, 32, 127}) {
    const int requests = beside + 1;
    std::vector<int32_t> queries(requests + 1), begins(requests + 1);
    for (int i = 0; i < requests; ++i) {
      queries[i + 1] = i + 1;
      begins[i + 1] = begins[i] + (i ? others : longest);
    }
    flashinfer::PrefillPlanInfo info;
    if (flashinfer::PrefillPlan<int32_t>(memory.data(), size_t(1) << 40, memory.data(), staged.data(), memory.size(), info,
                                         queries.data(), begins.data(), requests, requests, heads, kv_heads, channels,
                                         channels, /*page_size=*/1, /*enable_cuda_graph=*/false, 2, -1, -1, false, 0, 0,
                                         nullptr) != cudaSuccess)
      return 1;
    const auto* of = reinterpret_cast<int32_t*>(staged.data() + info.request_indices_offset);
    const int programs = std::count(of, of + info.padded_batch_size, 0);
    const int chunk = *reinterpret_cast<int32_t*>(staged.data() + info.kv_chunk_size_ptr_offset);
    std::printf("%d %d %d %d\n", beside, programs, std::min(chunk, longest), begins[requests] * kv_heads / (2 * 132));
  }
}
CPP
c++ -std=c++17 -w -D__grid_constant__= -I"$headers" -I"$site/nvidia/cu13/include" \
    -I"$site/flashinfer/data/cccl/libcudacxx/include" "$dir/case.cpp" -o "$dir/case"

"$dir/case" >"$dir/seen"
"$python" - "$dir/seen" <<'PY'
import sys

rows = [[int(x) for x in line.split()] for line in open(sys.argv[1])]
for beside, programs, chunk, even in rows:
    print(f"among {beside:3} of 1,024 tokens: {programs:2} for each kv head, {chunk:7,} tokens each; evenly {even:,}")
assert [programs for _, programs, *_ in rows] == [33, 26, 18, 2, 1, 1], rows
PY
