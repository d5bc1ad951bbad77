"""Statistics: `scores` is the table that measuring fills and `score_files` keeps it on disk, `intervals` and `verdicts`
compare its arms, `power` and `simulation` say what a design can show. `experiments/reports` writes it all up.
"""
