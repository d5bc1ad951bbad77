"""Tracking: a `run` is journalled on disk first (`spool`), sent on beside the work (`uploader`, `recording`), and
kept by MLflow (`store`, the only file that imports it). `provenance` says what made a result.
"""
