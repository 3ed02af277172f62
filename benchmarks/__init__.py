"""Measurements: sbm_fast beside plain torch and torch.compile, in one process.

    pytest benchmarks --benchmark-only     every implementation of a workload in one group
    python -m benchmarks.report            the ratio table, and benchmarks/results/cpu.json

`baselines` holds what we compare with, `implementations` ours, `workloads` what is measured and the
goals, `measure` how. Both commands take their ratios from the same interleaved measurement.
"""
