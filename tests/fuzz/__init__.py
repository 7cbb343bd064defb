"""Structure-aware fuzzing: whatever a file holds, the answer is a result or one line, within 10 seconds and 6 GB.

`python -m tests.fuzz --executions 100000` is the hour by hand; `test_fuzz.py` is the minute of CI. Both run
`targets.TARGETS` from the seeds of `seeds.py`, changed by `mutate.py`; an execution is named by its target and its
number, and is the same everywhere.
"""
