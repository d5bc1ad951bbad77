"""Statistics: `scores` is the table that measuring fills, `intervals` and `verdicts` compare its arms, `power` and
`simulation` say what a design can show.
"""
