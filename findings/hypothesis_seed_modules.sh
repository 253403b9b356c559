#!/bin/sh
# hypothesis 6.170.17: a test with a fixed seed, no database and no health checks draws other examples as soon as another module
# of the same project is loaded, though it never uses that module. Constants of every loaded local module are mixed into what
# integers, floats, text and bytes draw. So a test fails in a whole run and passes alone, with the same seed; the blob of
# `print_blob` (reproduce_failure) has the choices themselves and is not concerned.
#
# Seen:
#   alone, twice the same   True
#   beside another module   other examples, 1 of 400 of them are its number
#   without that module     0 of 400

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
export TMPDIR="$dir"
"${PYTHON:-python3}" -m venv "$dir/venv"
python="$dir/venv/bin/python"
"$python" -m pip install --quiet --no-compile hypothesis==6.170.17

mkdir "$dir/project"
echo "UNRELATED = 918273645" >"$dir/project/elsewhere.py"
cat >"$dir/project/draws.py" <<'PY'
import importlib
import sys

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

for name in sys.argv[1:]:
    importlib.import_module(name)
drawn = []


@seed(0)
@settings(max_examples=400, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(st.integers())
def draw(number):
    drawn.append(number)


draw()
print(*drawn)
PY
cat >"$dir/case.py" <<'PY'
import subprocess
import sys

folder = sys.argv[1]


def draws(*modules):
    command = [sys.executable, "draws.py", *modules]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.split()


alone, again, beside = draws(), draws(), draws("elsewhere")
number = "918273645"
print(f"alone, twice the same   {alone == again}")
print(f"beside another module   {'the same' if beside == alone else 'other'} examples, {beside.count(number)} of {len(beside)} of them are its number")
print(f"without that module     {alone.count(number)} of {len(alone)}")
assert alone == again and alone != beside
assert number in beside and number not in alone
PY
"$python" "$dir/case.py" "$dir/project"
