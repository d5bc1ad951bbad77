"""Measuring: `evaluation` opens a task, data and an encoder, and measures any number of arms. `bench` gives a task
images with low-resolution features, which all arms share; `tasks` has one file for each family of measures; rows
of scores come out (`experiments/statistics/scores.py`).
"""
