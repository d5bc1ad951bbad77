"""Reports: tables, figures and pictures from plain results. Nothing is measured here.

`markdown` formats all tables and numbers, and `tracking.provenance.Origin` all headers. Sweeps (`tables`, with their
classes in `results`), evaluations, benchmarks, training steps, correctness, power and simulations have a file each.
"""
