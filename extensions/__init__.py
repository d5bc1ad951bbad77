"""One idea per file. Importing this package registers them all: dropping a file in is all it takes.

A file needs nothing but `core`. What it needs beyond that it imports where it uses it, so that a missing package
stops that idea alone.
"""

import importlib
import pkgutil

for _module in sorted(found.name for found in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")
