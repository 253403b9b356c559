"""The lists of a decode step, made on a GPU by one launch from one packed copy; `memory.step.sparse_step` is the definition."""
