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
    "select, a program": 1355,
    "select, tiles of log-sum-exps": 341,
    "select, a block of masses": 383,
    "select, a halving": 108,
    "select, a block of the list": 195,
    "select, a program, large": 1732,
    "select, tiles of log-sum-exps, large": 345,
    "select, a block of masses, large": 410,
    "select, a halving, large": 184,
    "select, a block of the list, large": 235,
    "values, 64": 865,
    "values, 256": 1920,
    "choice, a program": 1683,
    "choice, a halving of each": 127,
    "choice, a block of the list": 396,
    "choice, a program, large": 2080,
    "choice, a halving of each, large": 169,
    "choice, a block of the list, large": 537,
    "attend, a program": 944,
    "attend, a tile of the base": 462,
    "attend, a tile of recalled tokens": 441,
    "estimate, a program of own values": 464,
    "estimate, a tile of own values": 485,
    "estimate, a program of the rest": 566,
    "estimate, a tile of the rest": 978,
    "merge, a program": 883,
}
