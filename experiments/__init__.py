"""What people run. Each experiment is a module with a function and a command line of the same settings."""

import os

# Before torch loads: its threads otherwise wait by spinning, and one busy neighbour on the machine makes a forward
# ten times slower. Sleeping costs a few per cent when the machine is idle.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
