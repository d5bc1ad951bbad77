"""The commands (a file NAME.py here is `python -m experiments.NAME`), and the rooms with the code behind them.

Imports go one way: commands, then sweeps, training, measuring, then peers, cost, statistics and tracking, then data;
upsampling stands beside training. Reports take plain results. `errors`, `progress`, `schedule`, `settings`, `atomic`
and `lock` are no commands; they serve all rooms.
"""

import os

# Set before torch loads. Otherwise its threads wait by spinning, and one other busy process on the machine makes a
# forward ten times slower. Sleeping instead costs a few per cent on an idle machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
