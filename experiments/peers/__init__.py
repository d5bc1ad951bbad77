"""Peers: other ways to upsample features, called as AnyUp is.

One file is one method or one family; `register_peer` offers a class by name, and dropping a file in is all it takes.
Arms of sweeps and evaluations name a peer with its settings and weights, `peer_from_config` makes it. The ceilings,
which no method can be expected to pass, are no peers (`experiments.measuring.ceilings`): they know the answer, or run
the encoder again.
"""

from experiments.peers.base import (
    CannotUpsample,
    Peer,
    make_peer,
    named_peers,
    peer_from_config,
    peer_identity,
    peers,
    register_peer,
)

__all__ = [
    "CannotUpsample",
    "Peer",
    "make_peer",
    "named_peers",
    "peer_from_config",
    "peer_identity",
    "peers",
    "register_peer",
]
