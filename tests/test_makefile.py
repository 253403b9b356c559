"""What make says before it does anything.

Red when: a model that is not there is found out by SGLang, after the environment was installed.
"""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def would_serve(model: str) -> subprocess.CompletedProcess[str]:
    """The commands of `make serve`, none of which is run.

    As from a shell: under `make test` it would take that one's flags and say which folder it enters.
    """
    shell = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"}
    return subprocess.run(
        ["make", "-n", "serve", f"MODEL={model}"], cwd=ROOT, env=shell, capture_output=True, text=True
    )


def test_serve_wants_a_folder_that_is_there_or_a_name(tmp_path: Path) -> None:
    missing = would_serve(str(tmp_path / "none"))
    assert missing.returncode == 2 and f"there is no model at {tmp_path}/none" in missing.stderr and not missing.stdout
    folder = tmp_path / "of two words"
    folder.mkdir()
    for model in (str(folder), "owner/name"):
        done = would_serve(model)
        assert done.returncode == 0 and f"--model-path '{model}'" in done.stdout, done.stderr
