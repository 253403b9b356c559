from sglang_clusterkv.kernels.decode.reference import sparse_decode  # noqa
