"""Reports: tables, figures and pictures from plain results; nothing is measured here.

`markdown` is how all tables and numbers look, `tracking.provenance.Origin` how all headers begin. A file each for the
sweep (`tables`, of what `results` describes), the evaluation, the benchmark, training steps, correctness, power and
simulations.
"""
