"""What `make test-compiled` looks for in the machine code of Triton's kernels.

Red when: it misses that a kernel spills, uses local memory, divides integers in a loop, needs more registers or fits fewer
programs on an SM than its case states, or lost its tensor cores or 16-byte loads; or it leaves a kernel of the package out.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.machine_code import programs_per_sm

ROOT = Path(__file__).parents[2]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own: in this one, kernels may be interpreted."""
    command = [sys.executable, *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def compiled(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the check."""
    return python("-m", "benchmarks.compiled", *arguments)


def test_every_kernel_is_compiled() -> None:
    """As the source names them, whatever the files are called that they lie in."""
    names = "f'{case.kernel.__module__}.{case.kernel.__name__}' for case in collect(()).values()"
    found = python("-c", f"from benchmarks.compiled import collect; print(*{{{names}}})")
    written = {
        ".".join((*path.relative_to(ROOT).with_suffix("").parts, name))
        for path in (ROOT / "sglang_clusterkv").rglob("*.py")
        for name in re.findall(r"^@triton\.jit.*\ndef (\w+_kernel)\(", path.read_text(), re.MULTILINE)
    }
    assert len(written) > 10 and set(found.stdout.split()) == written, found.stderr


def test_small_gpus_are_asked_no_more_than_whether_a_kernel_fits() -> None:
    assert (programs_per_sm(89, 128, 99 << 10, 4), programs_per_sm(89, 128, (99 << 10) + 1, 4)) == (1, 0)
    assert programs_per_sm(90, 128, (99 << 10) + 1, 4) == 2
    done = compiled("tests.support.losing_kernels", "--target", "89")
    assert done.returncode == 0 and "LOST" not in done.stdout, done.stdout + done.stderr


def test_the_check_names_what_a_kernel_lost() -> None:
    done = compiled("tests.support.losing_kernels", "--target", "90")
    assert done.returncode == 1, done.stdout + done.stderr
    lost = {line[: line.index(" 90 ")].strip(): line.partition("LOST: ")[2] for line in done.stdout.splitlines()[1:]}
    assert lost == {
        "sound": "",
        "spills": "uses local memory",
        "no tensor cores": "fewer than 1 tensor-core instructions",
        "no wide loads": "fewer than 1 LDG.128 and LDGSTS.128",
        "no async loads": "fewer than 1 LDGSTS.128",
        "registers": "more than 16 registers",
        "programs": "fewer than 32 programs per SM",
        "divides": "divides integers in a loop",
    }
