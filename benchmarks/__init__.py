"""Benchmarks: plain peers and the harness that times the package against them (installed as fastgpt.benchmarks)."""
