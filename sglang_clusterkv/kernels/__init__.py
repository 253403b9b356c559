"""The arithmetic of a step and of a build: one folder per operation, and beside them what several share.

In a folder, `reference.py` is the definition in torch, `cpu.py` a numba version where it pays, and `triton.py`, or the files of
`triton/`, the version for a GPU; `__init__.py` chooses by device. `lists/` makes the lists of a step. A step is the chain in
`decode/`: score, select, refine, attend, estimate, merge; `trace/` looks at what it read. A build is kmeans, encode, movement.
A prefill on a CPU is extend. What moves between the tiers is tier.

What CPU kernels share:
    cpu_math.py          bf16, exponentials, logarithms; what every kernel is compiled with
    llvm_cpu.py          what is built in LLVM: loads, shuffles, loops, what the target can; fp8_cpu.py: floats of 8 bits
    vectors_cpu.py       products with rows and sums of rows, in float32; levels_cpu.py, codes_cpu.py: in integers
    row_cpu.py           rows of the pool, of either tier; ahead_cpu.py asks for memory that is read later
    threshold_cpu.py     a weighted top-k without a sort
    tiles_cpu.py         products of many rows with many others, as a prefill has them
    threads_cpu.py       the threads, and how work is handed to them
    bundle_cpu.py        many arrays as one argument; call_cpu.py: functions called where they are
    linkage_cpu.py       machine code that calls nothing but itself
The rest of a model's layers on a CPU:
    layer_cpu.py         norm, rotation, gate
    products_cpu.py      weights and a few tokens; token_tiles_cpu.py: and more
    decoder_cpu.py       a decoder layer in two calls
What Triton kernels share:
    triton_rows.py       rows and codes of the index, unpacked; triton_fp8.py: a pool in 8-bit floats
    triton_softmax.py    the online softmax, and how a part of an attention is left
    triton_threshold.py  a weighted top-k without a sort
    triton_tier.py       keys and values of either tier
    workspace.py         what the launches of a layer hand to each other
    grids.py             how many programs they have
    compile_case.py      what their machine code must look like
    checks.py            with `CLUSTERKV_CHECK=1`: indices held inside of what they index
How long a step takes on a GPU:
    step_model.py        its launches and bytes; step_time.py: and instructions, of instruction_counts.py
    break_even.py        where a sparse step pays
"""
