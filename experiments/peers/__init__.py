"""Peers: other methods to upsample features, called like AnyUp.

Each file is one method or one family of methods. `register_peer` gives a class its name; a new file is all it takes.
Arms of sweeps and evaluations name a peer with its settings and weights, and `peer_from_config` makes it. Ceilings
(`experiments.measuring.ceilings`) are not peers: they know the answer or run the encoder again, so no method is
expected to beat them.
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
