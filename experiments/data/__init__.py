"""Data sets: what training and evaluation read. `open_data(config.data)` gives one, whatever its layout on disk.

A data set is an ordered list of samples with unique names. It is opened once: opening lists the files, checks that they
belong together, and computes a fingerprint. Reading a sample decodes files (or renders a scene) and works from any
process. Each file of this package is one family of layouts; `register_data` offers a class as `data=NAME`.
`code_version` and `identity` say which code, settings, files and data a result depends on.
"""

from experiments.data.base import IGNORE, DataError, DataSet, Sample, data_sets, open_data, register_data

__all__ = ["IGNORE", "DataError", "DataSet", "Sample", "data_sets", "open_data", "register_data"]
