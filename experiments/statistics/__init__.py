"""Statistics. `scores` is the table that measuring fills, and `score_files` stores it on disk. `intervals` and
`verdicts` compare its arms. `power` and `simulation` say what a number of seeds and images can show.
`experiments/reports` writes the tables.
"""
