"""Sweeps. `arms` reads the arms from the configuration. A member (`members`) is one arm with one seed. `sweep` runs all
members, and `results` gathers their scores. `code_version` says which code a result depends on.
"""
