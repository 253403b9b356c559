"""Merge on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from sglang_clusterkv.kernels.cpu_math import njit, part


@part
def merge_pair(b: Any, h: Any, output: Any, u: Any) -> None:
    """Merge the estimate of one (request, kv head) into `output` [B, H, G, D] and `lse`; a part of -inf counts nothing."""
    for g in range(output.shape[2]):
        exact, estimated = u.lse[b, h, g], u.estimate_lse[b, h, g]
        u.exact_lse[b, h, g] = exact
        most = max(exact, estimated)
        mine, others = np.exp(exact - most), np.exp(estimated - most)
        share = others / (mine + others)
        u.lse[b, h, g] = most + np.log(mine + others)
        for d in range(output.shape[3]):
            output[b, h, g, d] += share * (u.estimate[b, h, g, d] - output[b, h, g, d])


@njit(cache=True, nogil=True)
def sinks_kernel(output: Any, lse: Any, sinks: Any) -> None:
    """As `merge.reference.add_sinks`, in place: output [B, H, G, D], lse [B, H, G], sinks [H, G]."""
    for b in range(lse.shape[0]):
        for h in range(lse.shape[1]):
            for g in range(lse.shape[2]):
                most = max(lse[b, h, g], sinks[h, g])
                tokens = np.exp(lse[b, h, g] - most)
                all_of_it = tokens + np.exp(sinks[h, g] - most)
                lse[b, h, g] = most + np.log(all_of_it)
                for d in range(output.shape[3]):
                    output[b, h, g, d] *= tokens / all_of_it


@njit(cache=True, nogil=True)
def mass_kernel(mass: Any, lse: Any, other_lse: Any, other_is_whole: bool) -> None:
    """As `merge.reference.note_mass`. `other_lse` is the estimate's, or the whole's if `other_is_whole`."""
    total = 0.0
    for b in range(lse.shape[0]):
        for h in range(lse.shape[1]):
            for g in range(lse.shape[2]):
                ratio = np.exp(np.float64(other_lse[b, h, g]) - lse[b, h, g])
                if other_is_whole:
                    share = 1.0 if ratio < 1.0 else 1.0 / ratio
                else:
                    share = 1.0 / (1.0 + ratio)
                if not np.isnan(share):
                    total += share
    mass[0] += total
    mass[1] += lse.size
