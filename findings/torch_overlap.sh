#!/bin/sh
# torch 2.13.0 on a CPU, beside numpy 2.3.5: `x[:, 1:] = x[:, :-1]`, to move all columns on by one. Where source and target share memory
# torch refuses, and tells to clone; but it looks only at tensors without gaps. One row, or one dimension, is such a tensor and is
# refused; with two rows or more the same line runs and is wrong, without a word. So does `+=`. In narrow rows the first column
# is everywhere; in wide ones a number is lost at each border of what the CPU copies at once, so that most of it looks right.
# Moved to the left it is right. numpy copies what overlaps. A check that was seen to catch it in one dimension says nothing.
#
# Seen:
#   x[..., 1:] = x[..., :-1]    (8,)        refused
#   x[..., 1:] = x[..., :-1]    (1, 8)      refused
#   x[..., 1:] = x[..., :-1]    (2, 4)      wrong: 0 0 0 0 4 4 4 4, numpy 0 0 1 2 4 4 5 6
#   x[..., 1:] += x[..., :-1]   (2, 4)      wrong: 0 1 3 6 4 9 15 22, numpy 0 1 3 5 4 9 11 13
#   x[..., :-1] = x[..., 1:]    (2, 4)      right
#   x[..., 1:] = x[..., :-1]    (2, 1000)   wrong in 136 of 2,000

set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
export TMPDIR="$dir"
"${PYTHON:-python3}" -m venv "$dir/venv"
python="$dir/venv/bin/python"
"$python" -m pip install --quiet --no-compile torch==2.13.0
"$python" -m pip install --quiet --no-compile numpy==2.3.5

cat >"$dir/case.py" <<'PY'
import math

import numpy as np
import torch

torch.set_num_threads(1)


def on(x):
    x[..., 1:] = x[..., :-1]


def added(x):
    x[..., 1:] += x[..., :-1]


def back(x):
    x[..., :-1] = x[..., 1:]


def numbers(x):
    return " ".join(f"{number:g}" for number in x.flatten().tolist())


CASES = [
    (on, "x[..., 1:] = x[..., :-1]", (8,), "refused"),
    (on, "x[..., 1:] = x[..., :-1]", (1, 8), "refused"),
    (on, "x[..., 1:] = x[..., :-1]", (2, 4), "wrong"),
    (added, "x[..., 1:] += x[..., :-1]", (2, 4), "wrong"),
    (back, "x[..., :-1] = x[..., 1:]", (2, 4), "right"),
    (on, "x[..., 1:] = x[..., :-1]", (2, 1000), "wrong"),
]
for function, name, shape, expected in CASES:
    plain = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    x = torch.tensor(plain)
    function(plain)
    try:
        function(x)
    except RuntimeError as error:
        assert "single memory location" in str(error)
        told = "refused"
    else:
        others = int((x.numpy() != plain).sum())
        told = f"wrong: {numbers(x)}, numpy {numbers(plain)}" if others else "right"
        if others and x.numel() > 8:
            told = f"wrong in {others} of {x.numel():,}"
    print(f"{name:27} {shape!s:11} {told}")
    assert told.startswith(expected), (name, shape, told)
PY
"$python" "$dir/case.py"
