"""Sweeps: `arms` are read from the configuration, a `members` entry is an arm with a seed, `results` gathers what they
reached, `sweep` runs them all, `stored` reads them back from the tracking store; `code_version` says which code a
result depends on.
"""
