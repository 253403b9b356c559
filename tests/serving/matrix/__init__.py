"""The architecture matrix: what SGLang serves with plain attention, as tiny models made from real configurations.

- `architectures.py`: the table, fields of real `config.json` files with few layers and small widths.
- `tiny.py`: random weights for one of them.
- `serving.py`: serves it in a process of its own, and says what came out.
- `crowds.py`: serves some of them to many at once, with other options, each decode step by SGLang's layers and by ours.
- `__main__.py`: `python -m tests.serving.matrix` runs all of it and writes docs/models.md.
"""
