"""The platform under which SGLang serves without an accelerator; SGLang loads it by the name that `activate` gives.

Import sglang before this module: while sglang is being imported it may ask for this class.
"""

import os
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from sglang_clusterkv.serving import active
from sglang_clusterkv.serving.compat import BACKEND
from sglang_clusterkv.serving.platform import OMP_BINDING, OVERLAP, SLEEP, default_omp_binding
from sglang_clusterkv.serving.sglang_decoder_symbols import DECODER
from sglang_clusterkv.serving.sglang_differences import of_release

DISPATCH_KEY = "clusterkv_cpu"


class ClusterKVCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """SGLang on the CPU with torch's own kernels."""

    _enum = PlatformEnum.OOT
    # What this process wrote into OMP_BINDING: a later engine of the same process may have another tp_size.
    _written_binding: str | None = None

    def get_device(self, device_id: int = 0) -> str:
        """A string, not a torch.device: SGLang splits it at the colon when --device is left out."""
        return "cpu"

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False

    def get_torch_profiler_activity_str(self) -> str:
        """What a profile (POST /start_profile) records; SGLang asks every platform from outside, and ends without an answer."""
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Bind each rank's threads unless the user did, by the environment of the ranks; with clusterkv leave the overlap out.

        There is nothing to overlap: who launches a forward here computes it, and a result would wait for the next one too.
        And with clusterkv a scheduler that has nothing to do sleeps until something comes: its checks of itself, again and
        again, would take a core from those who receive requests and send answers. It looks up once a second, and whatever comes
        wakes it. Nothing of ours goes on meanwhile: a host tier moves pages within forwards. With HiCache it is left awake, for
        copies end meanwhile. SGLang's prefill delayer wants the overlap, and counts a delay by the passes of one that is awake.

        Their threads sleep while they wait, unless OMP_WAIT_POLICY says otherwise: threads that spin hold up whatever else
        runs on the cores, and themselves by it.
        """
        args = server_args
        named = (args.attention_backend, args.prefill_attention_backend, args.decode_attention_backend)
        if BACKEND in named and not args.enable_prefill_delayer:
            if os.environ.get(OVERLAP) != "1":
                args.disable_overlap_schedule = True
            if os.environ.get(SLEEP) != "0" and not args.enable_hierarchical_cache:
                args.sleep_on_idle = True
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        if os.environ.get(OMP_BINDING) in (None, "", self._written_binding):
            binding = default_omp_binding(sorted(os.sched_getaffinity(0)), active.ranks_of(server_args))
            os.environ[OMP_BINDING] = ClusterKVCpuPlatform._written_binding = binding

    def get_dispatch_key_name(self) -> str:
        """Under which SGLang finds our forwards of its layers; layers without one run their `forward_native`."""
        return DISPATCH_KEY

    def init_backend(self) -> None:
        """A worker starts: SGLang is told our forwards of its layers, which are its own until `post_load_model`."""
        from sglang_clusterkv.serving import cpu_layers

        cpu_layers.install(DISPATCH_KEY)

    def post_load_model(self, model: torch.nn.Module) -> None:
        """A model is there: with clusterkv its layers run by our kernels."""
        if active.active_config() is None:
            return
        from sglang_clusterkv.serving import cpu_layers

        cpu_layers.take_over(model, active.ranks())
        if of_release(DECODER):
            from sglang_clusterkv.serving import cpu_decoder

            cpu_decoder.take_over(model)

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        """Our KV pool when this process serves with clusterkv, else what SGLang would take."""
        default = super().get_kv_pool_cls(kind=kind)
        if active.active_config() is None:
            return default
        from sglang_clusterkv.serving import pool

        return pool.kv_pool_cls(default, kind)

    def get_paged_allocator_cls(self) -> type | None:
        """Our allocator when this process serves with clusterkv, else what SGLang would take."""
        default = super().get_paged_allocator_cls()
        if active.active_config() is None:
            return default
        from sglang_clusterkv.serving import pool

        return pool.paged_allocator_cls(default)
