"""How many vectors a search for eigenpairs may hold, told before its first product.

Lanczos with thick restarts finds ``k`` pairs in any number of vectors above ``k``: the fewer there are, the more
products it takes. So the vectors between restarts are the default number, or as many as there is room for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from pnanalysis.checks import human
from pnanalysis.errors import CurvatureError
from pnanalysis.io.unfinished import Unfinished
from pnanalysis.spectra.lanczos import basis_dtype
from pnanalysis.spectra.memory import Storage, memory_limit
from pnanalysis.spectra.sharing import part_of

#: Vectors of a search for ``k`` pairs by default, and the fewest with which it gets anywhere: ``k`` and so many more.
FURTHER, FEWEST_FURTHER = 10, 4
#: Vectors of a search of the complement beside those that are looked for, by default.
N_SEARCH = 20
#: The vector that is multiplied, the operator's copy, the product and the work space of Gram-Schmidt.
WORKING = 4
#: What a search of the complement holds besides: its start, what it looks for, and projections around products.
_IN_COMPLEMENT = 4


@dataclass(frozen=True)
class PairsPlan:
    """Vectors of P numbers in memory while ``k`` pairs are searched and verified.

    Attributes
    ----------
    k : int
    n_vectors : int
        Of the basis of the first search.
    n_search : int
        Of the basis of a search of the complement, beside those that are looked for.
    """

    k: int
    n_vectors: int
    n_search: int

    @property
    def kept(self) -> int:
        """The most vectors beside the :data:`WORKING` ones: of a search, or of what it is verified by."""
        with_pairs = self.n_vectors + max(self.k + 1 - WORKING, 0)  # and with the pairs that it ends with
        in_complement = 2 * self.k + self.n_search + _IN_COMPLEMENT
        return max(with_pairs, in_complement, 3 * self.k + 1)  # the last, where one is added to those that were found


def storage_of(operator: Any) -> Storage:
    """How the vectors of a search are kept: in the precision of the arithmetic, on the operator's device."""
    part = part_of(operator)
    return Storage(basis_dtype(operator), operator.device, part=None if part.is_all else part)


def default_vectors(k: int, n_parameters: int) -> int:
    """Vectors between restarts, where there is room: ``2 k + 10``."""
    return min(2 * k + FURTHER, n_parameters)


def vectors_of_search(operator: Any, k: int, n_wanted: int, max_memory_bytes: int | None) -> int:
    """How many of ``n_wanted`` vectors between restarts there is room for, with the ``k`` pairs at the end.

    Raises
    ------
    CurvatureError
        If there is none for ``k + 4``.
    """
    fewest = min(k + FEWEST_FURTHER, n_wanted)
    return _most(operator, k, max_memory_bytes, 0, fewest, n_wanted, lambda n: n + max(k + 1, WORKING))


def plan_pairs(
    operator: Any,
    k: int,
    max_hvp: int,
    *,
    n_vectors: int | None = None,
    beside: int = 0,
    max_memory_bytes: int | None = None,
    state: Unfinished | None = None,
    name: str = "pairs",
) -> PairsPlan:
    """How many vectors to search and verify ``k`` pairs in.

    Parameters
    ----------
    operator : LinearOperator
    k, max_hvp : int
        See :func:`pnanalysis.spectra.verified_pairs.verified_pairs`.
    n_vectors : int, optional
        The most of the first search; by default :func:`default_vectors`.
    beside : int
        Further vectors that are kept meanwhile.
    max_memory_bytes : int, optional
        The bound; 60 % of what is free on the device by default. Without it, a given ``n_vectors`` is taken as it is.
    state, name
        Unfinished work, which goes on in as many vectors as it began with, whatever is free now.

    Raises
    ------
    CurvatureError
        If there is no room.
    """
    n_parameters = operator.shape[0]
    k = min(k, n_parameters)
    saved = None if state is None else state.load(f"{name}-vectors")
    if saved is not None:
        return PairsPlan(**saved[1])
    wanted = min(n_vectors or default_vectors(k, n_parameters), n_parameters, max_hvp - k)
    plan = PairsPlan(k, wanted, N_SEARCH)
    if n_vectors is None or max_memory_bytes is not None:

        def smaller(further: int) -> PairsPlan:
            return PairsPlan(k, min(k + further, wanted), min(further, N_SEARCH))

        def needed(further: int) -> int:
            return smaller(further).kept + WORKING

        most = max(wanted - k, N_SEARCH)
        found = _most(operator, k, max_memory_bytes, beside, min(FEWEST_FURTHER, most), most, needed)
        plan = smaller(found)
    if state is not None:
        state.save(f"{name}-vectors", {}, **asdict(plan))
    return plan


def _most(
    operator: Any, k: int, max_memory_bytes: int | None, beside: int, fewest: int, most: int,
    needed: Callable[[int], int],
) -> int:  # fmt: skip
    """The largest number from ``fewest`` to ``most`` with which the vectors that are needed fit into memory."""
    storage, n_parameters = storage_of(operator), operator.shape[0]
    limit = memory_limit(operator, storage.dtype, operator.device, max_memory_bytes)

    def n_bytes(n: int) -> int:
        whole = 0 if storage.part is None else storage.part.n_whole * n_parameters * storage.dtype.itemsize
        return storage.vectors_bytes(n_parameters, needed(n) + beside) + whole

    for n in range(most, fewest - 1, -1):
        if n_bytes(n) <= limit:
            return n
    halves = f", {beside} of them over parts of the examples" if beside else ""
    less = ", take none over parts (data_error, --data-error examples)" if beside else ""
    if max_memory_bytes is None or max_memory_bytes <= limit:  # else the bound is what is free
        less += ", or raise max_memory_bytes (--memory)"
    raise CurvatureError(
        f"{k} eigenpairs of {n_parameters:,} parameters need {human(n_bytes(fewest))} ({needed(fewest) + beside} "
        f"vectors{halves}), the bound is {human(limit)}: look for fewer pairs (k, -k){less}"
    )


__all__ = ["PairsPlan", "default_vectors", "plan_pairs", "storage_of", "vectors_of_search"]
