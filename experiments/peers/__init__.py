"""Peers: other ways to upsample features, called as AnyUp is, and the ceilings that no way can be expected to pass.

One file is one method or one family; `register_peer` offers a class by name, and dropping a file in is all it takes.
`experiments.measuring.ceilings` is no peer: its entries know the answer, or run the encoder again.
"""

import importlib
import pkgutil

from experiments.peers.base import Peer, make_peer, peers, register_peer

__all__ = ["Peer", "make_peer", "peers", "register_peer"]

for _module in sorted(found.name for found in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")
