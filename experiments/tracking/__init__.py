"""Tracking: a `run` is journalled on disk first (`spool`), sent on beside the work (`uploader`, `recording`), and
kept by MLflow (`store`, the only file that imports it). `sync` sends on what was left on disk, `provenance` says what
made a result.
"""
