"""Instructions of one warp of the pieces of a step's kernels: head_dim 128, 4 query heads to a kv head, sm_90.

Made by `python -m benchmarks.instructions`.
"""

PIECES = {
    "score, a program of clusters": 197,
    "score, a tile of clusters": 1507,
    "score, a segment of a tile": 156,
    "score, a program of tokens": 263,
    "score, a tile of tokens": 304,
    "score, a rotation": 351,
    "select, a program": 1435,
    "select, tiles of log-sum-exps": 342,
    "select, a block of masses": 561,
    "select, a halving": 115,
    "select, a block of the list": 277,
    "select, a program, large": 1758,
    "select, tiles of log-sum-exps, large": 343,
    "select, a block of masses, large": 572,
    "select, a halving, large": 183,
    "select, a block of the list, large": 321,
    "values, 64": 865,
    "values, 256": 1920,
    "choice, a program": 1801,
    "choice, a halving of each": 202,
    "choice, a block of the list": 400,
    "choice, a program, large": 1972,
    "choice, a halving of each, large": 260,
    "choice, a block of the list, large": 223,
    "attend, a program": 930,
    "attend, a tile of the base": 467,
    "attend, a tile of recalled tokens": 441,
    "estimate, a program of own values": 550,
    "estimate, a tile of own values": 578,
    "estimate, a program of the rest": 482,
    "estimate, a tile of the rest": 607,
    "merge, a program": 883,
}
