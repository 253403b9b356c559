"""The lists of a decode step: on a GPU by one launch from one packed copy, on a CPU in one pass.

`reference.sparse_step` is the definition.
"""
