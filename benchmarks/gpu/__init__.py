"""The GPU laboratory's parts; `benchmarks/gpu_lab.py` is its command.

`runner` starts the phases of `phases`, each in a process of its own, and keeps the record; it
imports nothing but the standard library, so that no broken build takes it down. `worker` is that
process: it goes through the cases of one module (`machine`, `em`, `pc`, `noise`, `network`) and
writes what it has after each. `build` and `conformance` are processes of their own kind. `subjects`
and `baselines` hold what is measured, `checks` asks first whether it is right, `timing` and
`comparison` measure, `table` and `readme` show the record.
"""
