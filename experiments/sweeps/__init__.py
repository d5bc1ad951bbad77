"""Sweeps. `arms` reads the arms from the configuration. A member (`members`) is one arm with one seed. `sweep` runs all
members, `results` gathers their scores, and `stored` reads them back from the tracking store. `board` makes one sweep
per encoder, for a leaderboard.
"""
