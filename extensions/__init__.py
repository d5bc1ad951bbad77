"""One idea per file, or per folder where it is large. Importing this package registers all of them, so a new file needs
no further change.

A file imports only `core` at its top. It imports further packages where it uses them, so that a missing package
disables only that idea.
"""

import importlib
import pkgutil

for _module in sorted(found.name for found in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")
