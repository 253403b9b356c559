"""Which segments to make, cut and forget: decided on the host, a file per rule of docs/design.md.

`planner.py` has the order of the steps, `plan.py` what goes in and comes out, `records.py` what each running row sees. A plan
in the making (`draft.py`) knows how pages will look once it has run (`view.py`) and where segments may begin and end
(`borders.py`). The steps: `found.py` cuts and closes what a match found, `own.py` clusters what a row wrote itself,
`merging.py` joins short neighbours. With `reproducible` it is `reproducible.py`, which makes what a row would have made itself.
"""
