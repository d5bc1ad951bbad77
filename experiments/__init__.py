"""The commands (a file NAME.py here is `python -m experiments.NAME`), and the rooms with the code behind them.

Imports go one way: commands, then sweeps, training, measuring, then peers, cost, statistics and tracking, then data;
upsampling stands beside training, and page, the demo, on upsampling. Reports take plain results. `errors`, `progress`,
`schedule`, `settings`, `atomic` and `lock` are no commands; they serve all rooms.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

# Set before torch loads. Otherwise its threads wait by spinning, and one other busy process on the machine makes a
# forward ten times slower. Sleeping instead costs a few per cent on an idle machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if __name__ == "experiments":  # as anyup_lab.experiments it looks for no module called core
    _found = getattr(sys.modules.get("core"), "__spec__", None) or find_spec("core")
    if _found is not None and _found.origin != str(Path(__file__).parents[1] / "core" / "__init__.py"):
        raise ImportError(
            f"another module called core is in the way: {_found.origin or _found.submodule_search_locations}; use "
            "`python -m anyup_lab.experiments.COMMAND`, or in Python `import anyup_lab`"
        )
