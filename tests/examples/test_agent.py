"""What the demo says to a user, without a server.

Red when: the command that it names does not give the server the options that it means.
"""

import shlex

import pytest

from examples.agent import Counts, DemoError, larger_than_the_device
from sglang_clusterkv.config import ENVIRONMENT, parse_config


def test_the_command_for_a_host_tier_reaches_the_server_as_it_is_meant() -> None:
    no_tier = Counts(0, 0, 0, 0, 0, 0, 0, dense_steps={}, tier={})
    with pytest.raises(DemoError) as raised:
        larger_than_the_device(no_tier, 6000)
    setting, make, target, argument = shlex.split(str(raised.value).split("`")[1])
    variable, _, config = setting.partition("=")
    assert (variable, make, target) == (ENVIRONMENT, "make", "serve")
    assert parse_config(config).host_ratio == 10
    name, _, flags = argument.partition("=")
    assert name == "SERVE_ARGS" and flags.startswith("--")
    # A shell reads them once more.
    assert shlex.split(flags) == flags.split()
