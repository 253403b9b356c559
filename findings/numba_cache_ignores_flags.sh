#!/bin/sh
# numba 0.65.1: a function that is cached on disk is found again by its file, line and argument types alone. Its compile
# flags are no part of the key: after a run with fastmath=True, fastmath=False loads the machine code of fastmath=True, which
# takes it that there are no NaNs, and the other way round. Flags that come from the environment, a configuration or a
# constant of another module therefore stay what they were at the first run, until the function's own file is touched.
#
# Seen:
#   fastmath=True: 0 NaNs, from the cache: False
#   fastmath=False: 0 NaNs, from the cache: True
#   an empty cache, the other order:
#   fastmath=False: 2 NaNs, from the cache: False
#   fastmath=True: 2 NaNs, from the cache: True

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
export TMPDIR="$dir" HF_HUB_OFFLINE=1 HF_HOME="$dir/hf" NUMBA_CACHE_DIR="$dir/numba"
"${PYTHON:-python3}" -m venv "$dir/venv"
python="$dir/venv/bin/python"
"$python" -m pip install --quiet --no-compile numba==0.65.1 numpy==2.3.5

cat >"$dir/case.py" <<'PY'
import os

import numpy as np
from numba import njit

FAST = os.environ["FAST"] == "1"


@njit(cache=True, fastmath=FAST)
def count_nans(values):
    found = 0
    for value in values:
        if value != value:
            found += 1
    return found


found = count_nans(np.array([1.0, np.nan, np.nan]))
hits = sum(count_nans.stats.cache_hits.values())
print(f"fastmath={FAST}: {found} NaNs, from the cache: {bool(hits)}")
assert found == int(os.environ["EXPECT"])
PY
FAST=1 EXPECT=0 "$python" "$dir/case.py"
FAST=0 EXPECT=0 "$python" "$dir/case.py"
echo "an empty cache, the other order:"
rm -r "$dir/numba"
FAST=0 EXPECT=2 "$python" "$dir/case.py"
FAST=1 EXPECT=2 "$python" "$dir/case.py"
