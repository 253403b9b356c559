"""What `make test-compiled` looks for in the machine code of Triton's kernels.

Red when: it misses that a kernel spills, uses local memory, divides integers in a loop, needs more registers or fits fewer
programs on an SM than its case states, or lost its tensor cores or 16-byte loads; or it leaves a kernel of the package
out; a case is taken from the file of earlier results although something that it is made from has changed, or a wrong entry
stays unnoticed; or a kernel may have, or execute, more instructions than it did, unnoticed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.compiled import KEPT as KEPT_FILE
from benchmarks.compiled import read_kept
from benchmarks.machine_code import MODEL_TARGET, programs_per_sm

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
        for name in re.findall(r"^@triton\.jit(?:\([^)]*\))?\ndef (\w+_kernel)\(", path.read_text(), re.MULTILINE)
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


# The table of the case "sound" with a file of earlier results in several states, and hashes of what differs a little.
KEPT = """
import json, sys
from dataclasses import replace
from pathlib import Path

from benchmarks import compiled
from benchmarks.machine_code import hash_of

path, key = Path(sys.argv[1]), ("sound", 90)

def table(**how):
    return [*compiled.lines(("tests.support.losing_kernels",), "sound", [90], path, **how)][1:]

tables = {"kept": table(keep=True), "known": table()}
(entry,) = compiled.read_kept(path).values()
hash_, result = entry.hash, entry.result
assert entry.most_instructions == result.instructions * 51 // 50 > 20
assert entry.most_executed == result.executed * 51 // 50 >= entry.most_instructions
compiled.write_kept(path, {key: entry._replace(result=replace(result, registers=1))})
tables["wrong"] = table()
compiled.RECHECKED = 0
tables["not compiled"] = table()
tight = entry._replace(most_instructions=result.instructions - 1)
compiled.write_kept(path, {key: tight})
tables["too many"], tables["too many, kept"], tables["raised"] = table(), table(keep=True), table(keep=True, raised=True)
tables["allowed"] = table()
compiled.write_kept(path, {key: entry._replace(most_executed=result.executed - 1)})
tables["executes too many"] = table()
compiled.write_kept(path, {key: entry._replace(result=replace(result, executed=None), most_executed=None)})
compiled.RECHECKED = 1
tables["not counted"] = table()
compiled.write_kept(path, {key: entry._replace(hash="of another source", result=replace(result, registers=1))})
tables["changed"] = table()

cases = compiled.collect(("tests.support.losing_kernels",))
sound = cases["sound"]
hashes = [hash_of(sound, 90), hash_of(sound, 80), hash_of(replace(sound, num_warps=2), 90)]
hashes += [hash_of(replace(sound, num_stages=2), 90), hash_of(replace(sound, constexprs={"SIZE": 8}), 90)]
hashes += [hash_of(replace(sound, aligned=()), 90), hash_of(replace(sound, signature={**sound.signature, "steps": "i64"}), 90)]
stated = hash_of(replace(sound, name="other", tensor_cores=9), 90)
sound.kernel._unsafe_update_src(sound.kernel.src.replace("sums += ", "sums -= "))
hashes.append(hash_of(sound, 90))
print(json.dumps([tables, hash_, hashes, stated]))
"""


def test_what_is_known_by_its_hash_is_taken_from_the_file_and_a_few_are_compiled_again(tmp_path: Path) -> None:
    done = python("-c", KEPT, str(tmp_path / "kept.json"))
    assert done.returncode == 0, done.stderr
    tables, kept, hashes, stated = json.loads(done.stdout.splitlines()[-1])
    counts = {name: lines[-1][0] for name, lines in tables.items()}
    assert counts["known"] == counts["wrong"] == "1 of 1 were known by their hash, 1 of them compiled again; 0 new"
    assert counts["not compiled"].startswith("1 of 1 were known by their hash, 0 of them")
    assert counts["kept"] == counts["changed"] == "0 of 1 were known by their hash, 0 of them compiled again; 1 new"
    assert tables["kept"][0] == tables["known"][0] == tables["changed"][0]
    line, held = tables["wrong"][0]
    assert not held and "LOST: kept was Compiled(registers=1," in line, line
    assert tables["not compiled"][0][0].split()[2] == "1", "the file's registers"
    for name in ("too many", "too many, kept"):
        line, held = tables[name][0]
        assert not held and re.search(r"LOST: more than [\d,]+ instructions$", line), line
    line, held = tables["executes too many"][0]
    assert not held and re.search(r"LOST: executes more than [\d,]+$", line), line
    assert all(tables[name][0][1] for name in ("raised", "allowed", "not counted"))
    assert hashes[0] == kept == stated, "what a case states is compared anew"
    assert len(set(hashes)) == len(hashes), hashes


def test_every_kernel_has_a_limit_of_instructions() -> None:
    """And of those that it executes, for the generation that the model of a step counts for."""
    kept = read_kept(KEPT_FILE)
    assert len(kept) > 270
    for (name, target), one in kept.items():
        assert one.result.instructions <= one.most_instructions, name
        if target == MODEL_TARGET:
            assert one.result.executed is not None and one.most_executed is not None, name
            assert one.result.instructions <= one.result.executed <= one.most_executed, name
