// FlashInfer's scheduler as it was installed, for the host: a plan without a GPU, whose memory is the host's.

#include <algorithm>
#include <cstring>

using std::max;  // CUDA's compiler has them without a name
using std::min;

#include "attention/scheduler.cuh"

namespace {
int sms;
}

extern "C" {

// What of CUDA's runtime the scheduler calls.
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = sms; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
    default: return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, size);
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t) { return "refused"; }

// Plan one query of each of `lists` lists, which begin at kv_indptr; info gets 15 numbers. 0: it was planned.
int plan(int32_t* qo_indptr, int32_t* kv_indptr, uint32_t lists, uint32_t group, uint32_t channels, int graph, int count,
         uint8_t* staged, uint8_t* memory, size_t memory_bytes, uint8_t* partial, size_t partial_bytes, int64_t* info) {
  sms = count;
  flashinfer::PrefillPlanInfo planned;
  try {
    if (flashinfer::PrefillPlan<int32_t>(partial, partial_bytes, memory, staged, memory_bytes, planned, qo_indptr,
                                         kv_indptr, lists, lists, group, 1, channels, channels, 1, graph != 0, 2, -1,
                                         -1, false, 0, 0, nullptr) != cudaSuccess)
      return 1;
  } catch (const std::exception& error) {
    std::cerr << error.what() << std::endl;
    return 2;
  }
  const auto numbers = planned.ToVector();
  std::copy(numbers.begin(), numbers.end(), info);
  return 0;
}
}
