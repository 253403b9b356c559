#!/bin/sh
# numba 0.65.1: cached functions that call each other's callees. A compiled function brings copies of what it calls, and calls a copy
# that was not inlined by its name. That is made of the callee's module, qualified name and argument types, and of a count of what
# the process has compiled: functions that a factory makes differ in nothing but the count, and in that only where one process
# compiled both. Where two did, each as its second function, both are called the same; in a process that loads both callers from the
# cache, the one that is loaded second calls the callee of the first. No error, no warning; the numbers are another function's.
# Here the callee calls itself, so that LLVM does not inline it.
#
# Seen, for the numbers 1 to 4:
#   one process: squares 30, compiled
#   another: cubes 100, compiled
#   a third: squares 30, from the cache; cubes 30, from the cache
#   a fourth: cubes 100, from the cache; squares 100, from the cache
#   a fifth, without a cache: squares 30, compiled; cubes 100, compiled

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
export TMPDIR="$dir" NUMBA_CACHE_DIR="$dir/numba"
"${PYTHON:-python3}" -m venv "$dir/venv"
python="$dir/venv/bin/python"
"$python" -m pip install --quiet --no-compile numba==0.65.1 numpy==2.3.5

cat >"$dir/case.py" <<'PY'
import sys

import numpy as np
from numba import njit


def sum_of_powers(exponent):
    @njit
    def total(x):
        if len(x) == 1:
            return x[0] ** exponent
        half = len(x) // 2
        return total(x[:half]) + total(x[half:])

    return total


of_squares, of_cubes = sum_of_powers(2), sum_of_powers(3)


@njit(cache=True)
def squares(x):
    return of_squares(x)


@njit(cache=True)
def cubes(x):
    return of_cubes(x)


told = []
for argument in sys.argv[2:]:
    name, expected = argument.split("=")
    function = globals()[name]
    seen = function(np.arange(1.0, 5.0))
    told.append(f"{name} {seen:g}, {'from the cache' if function.stats.cache_hits else 'compiled'}")
    assert seen == float(expected), told
print(f"{sys.argv[1]}:", "; ".join(told))
PY
"$python" "$dir/case.py" "one process" squares=30
"$python" "$dir/case.py" "another" cubes=100
"$python" "$dir/case.py" "a third" squares=30 cubes=30
"$python" "$dir/case.py" "a fourth" cubes=100 squares=100
rm -r "$dir/numba"
"$python" "$dir/case.py" "a fifth, without a cache" squares=30 cubes=100
