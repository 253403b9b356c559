"""Which configuration this process serves with: kept on SGLang's own record of arguments, which is pickled to every child."""

from __future__ import annotations

from typing import Any

from sglang_clusterkv.config import ClusterKVConfig

_RESOLVED = "_clusterkv_resolved"  # attribute of ServerArgs; present when clusterkv is the chosen backend


def active_config() -> ClusterKVConfig | None:
    """The configuration that this process serves with, or None where clusterkv is not the chosen backend."""
    from sglang.srt.runtime_context import get_server_args

    try:
        return config_of(get_server_args())
    except ValueError:  # nothing is published in this process
        return None


def config_of(server_args: Any) -> ClusterKVConfig | None:
    """The resolved configuration of a ServerArgs record, or None where clusterkv is not its backend."""
    return getattr(server_args, _RESOLVED, None)


def ranks() -> int:
    """Processes that serve the model beside this one, itself among them; 1 where nothing is published."""
    from sglang.srt.runtime_context import get_server_args

    try:
        return ranks_of(get_server_args())
    except ValueError:
        return 1


def ranks_of(server_args: Any) -> int:
    """Processes that a server with this ServerArgs record has for its model."""
    return server_args.dp_size * server_args.tp_size * server_args.pp_size


def keep_config(server_args: Any, config: ClusterKVConfig) -> None:
    """Note on a ServerArgs record that clusterkv is its backend, with this configuration."""
    setattr(server_args, _RESOLVED, config)
