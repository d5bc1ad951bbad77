"""Peers: other ways to upsample features, called as AnyUp is, and the ceilings that no way can be expected to pass.

One file is one method or one family; `register_peer` offers a class by name, and dropping a file in is all it takes.
`experiments.measuring.ceilings` is no peer: its entries know the answer, or run the encoder again.
"""

from experiments.peers.base import Peer, make_peer, peers, register_peer

__all__ = ["Peer", "make_peer", "peers", "register_peer"]
