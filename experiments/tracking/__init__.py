"""Tracking. A `run` is written to a journal on disk first (`spool`), sent in the background (`uploader`, `recording`)
or later (`sync`), and kept by MLflow (`store`, the only file that imports it). `provenance` records what a result was
made with.
"""
