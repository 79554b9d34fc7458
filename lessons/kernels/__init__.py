"""Ladder two: kernels, each rung one idea better than the last. ``python -m lessons.kernels softmax`` climbs one.

- ``tasks``: what is computed: inputs, the truth, how far from it a rung may be.
- ``rung``: a file, the header that says what it does, and its promises.
- ``cuda_rung``, ``triton_rung``: how a rung of that language is built, run, counted, and read when it is compiled; both
  have ``COUNTERS``, ``build(rungs)``, ``run(rung, problem, count=...)`` and ``resources(rung)``.
- ``climb``: what comes of a whole ladder.
- ``command``: the command line, which ``__main__`` runs in a process of its own.
"""
