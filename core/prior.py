"""What an attention adds to its logits beside the similarity of query and key."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor


class Prior(ABC):
    """Terms of the logits for one call of a `core.attention.CrossAttention`, made by its `prior`.

    There are H + 1 terms. One is added to the logits of each of the H heads. The last is the logits of one more head,
    which looks at nothing else.
    """

    share: Tensor
    """(), from 0 to 1: what the further head's weights count beside the mean of the others."""

    @abstractmethod
    def of_tiles(self, rows: slice, columns: slice, keys: tuple[Tensor, Tensor]) -> Iterator[Tensor]:
        """Yields the H + 1 terms of tiles of queries, (P,M,K) each, P = B·m·n.

        Args:
            rows, columns: of the query grid, in m and n tiles of one size each; a tile has M queries.
            keys: (m,Kh) rows and (n,Kw) columns of the key grid that each tile sees. K = Kw·Kh, rows vary fastest.
        """

    @abstractmethod
    def at(self, coords: Tensor, cells: Tensor) -> Tensor:
        """(n,2) points of the image, (n,K) numbers of the cells that each sees -> (B,n,H+1,K)."""
