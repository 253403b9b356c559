#!/bin/sh
# torch 2.13.0, CPU: whether a sum by index of bf16 is added in fp32 depends on which of the operations that make it is called, and
# on the shape. A thousand ones that go to one place are 1000, or 256, for 257 rounds to 256. index_add_ of scalars stops there and
# of rows does not, and so the gradient of index_select; index_reduce_ is the other way round, so that a mean of ones is .256;
# index_put_ with accumulate, the gradient of x[index] and segment_reduce always stop; scatter_add_ and scatter_reduce_ never do.
# So means of groups and gradients of tokens that come often are short, or not, by how they were written.
#
# Seen (scalars, rows of 8):
#   sum                      1000     1000
#   index_add_                256     1000
#   index_put_ accumulate     256      256
#   index_reduce_ mean          1 0.255859
#   scatter_add_             1000     1000
#   scatter_reduce_ mean        1        1
#   segment_reduce sum        256      256
#   gradient of x[index]      256      256
#   gradient of index_select  256     1000

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
import torch

torch.set_num_threads(1)
N = 1000
index = torch.zeros(N, dtype=torch.long)


def gradient(take, width):
    """Of one row that was taken N times, by ones."""
    x = torch.zeros((1, *width), dtype=torch.bfloat16, requires_grad=True)
    take(x).backward(torch.ones((N, *width), dtype=torch.bfloat16))
    return x.grad


def sums(width):
    """By operation, what becomes of N ones (or N rows of them) that all go to place 0."""
    ones, none = torch.ones((N, *width), dtype=torch.bfloat16), torch.zeros((1, *width), dtype=torch.bfloat16)
    places = index.reshape(N, *(1 for _ in width)).expand(ones.shape)
    return {
        "sum": ones.sum(0),
        "index_add_": none.clone().index_add_(0, index, ones),
        "index_put_ accumulate": none.clone().index_put_((index,), ones, accumulate=True),
        "index_reduce_ mean": none.clone().index_reduce_(0, index, ones, "mean", include_self=False),
        "scatter_add_": none.clone().scatter_add_(0, places, ones),
        "scatter_reduce_ mean": none.clone().scatter_reduce_(0, places, ones, "mean", include_self=False),
        "segment_reduce sum": torch.segment_reduce(ones, "sum", lengths=torch.tensor([N])),
        "gradient of x[index]": gradient(lambda x: x[index], width),
        "gradient of index_select": gradient(lambda x: x.index_select(0, index), width),
    }


SHORT = torch.tensor(256 / N).bfloat16().item()
EXPECTED = {
    "sum": (N, N),
    "index_add_": (256, N),
    "index_put_ accumulate": (256, 256),
    "index_reduce_ mean": (1, SHORT),
    "scatter_add_": (N, N),
    "scatter_reduce_ mean": (1, 1),
    "segment_reduce sum": (256, 256),
    "gradient of x[index]": (256, 256),
    "gradient of index_select": (256, N),
}
scalars, rows = sums(()), sums((8,))
for name in EXPECTED:
    seen = scalars[name].flatten()[0].item(), rows[name].flatten()[0].item()
    print(f"{name:24} {seen[0]:>4g} {seen[1]:>8g}")
    assert seen == EXPECTED[name], (name, seen)
PY
"$python" -W ignore "$dir/case.py"
