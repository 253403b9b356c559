"""What a machine with a GPU is asked: one command, in parts, none longer than a few minutes, without network and pip.

    python -m benchmarks.gpu                        # all parts, at most 8 minutes; `make test-gpu`
    python -m benchmarks.gpu --parts operations graphs
    python -m benchmarks.gpu --dry                  # without a GPU: every part up to its launches

Each part is a process of its own with a limit. It leaves NAME.json and NAME.log in the folder of the run, however it ends, and
can be run alone. Beside each measured figure stands what the model of the step (sglang_clusterkv/kernels/step_model.py)
predicted. docs/gpu.md says how to bring what is missing to a machine that has no network.
"""
