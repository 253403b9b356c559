"""Commands of the benchmarks that a person mistypes.

Red when: a wrong option ends in a traceback instead of a sentence.
"""

from __future__ import annotations

import pytest

from benchmarks import step_time


@pytest.mark.parametrize(
    ("options", "told"),
    [(["nope", "3"], "unknown key 'nope'"), (["candidate_tokens", "x"], "not valid JSON")],
)
def test_a_wrong_option_is_told(options: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        step_time.main(["--set", *options])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_another_configuration_changes_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    step_time.main([])
    served = capsys.readouterr().out
    step_time.main(["--set", "tokens_per_cluster", "16"])
    assert capsys.readouterr().out != served
