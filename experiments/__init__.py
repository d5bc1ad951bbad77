"""What people run. A file here is a command, `python -m experiments.NAME`; what it is made of lies in the rooms.

Imports go one way: commands, then sweeps, then training, then measuring, then peers, cost, statistics and tracking,
then data; upsampling stands on measuring. Reports take plain results. `settings`, `atomic` and `lock` serve all of
them.
"""

import os

# Before torch loads: its threads otherwise wait by spinning, and one busy neighbour on the machine makes a forward
# ten times slower. Sleeping costs a few per cent when the machine is idle.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
