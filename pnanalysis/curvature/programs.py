"""Running the program of a traced product: once for each vector, for many vectors or batches at a time, or compiled.

Small operations take less time than calling them does. Where that is so, many vectors share a call by ``torch.vmap``,
or a single vector's products with the matrices of many batches do; where operations are large, their results no longer
fit into the caches of the processor, and one after the other is faster. A size that is read off the program decides, so
that round-off does not depend on timings.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pnanalysis.curvature.product_check import largest_difference, tolerance
from pnanalysis.errors import CurvatureError, reason

#: Largest mean size of an operation's result, in bytes, for which vectors share calls: up to here that took 0.4 to 0.9
#: of the time, for results of 0.3 MB and more 1.0 to 1.9 (a perceptron, LeNet-5 and a transformer on one CPU core).
_SMALL = 2**16
#: Most memory for the results that a shared call holds at a time, and most vectors or batches.
_MOST_BYTES, _MOST_VECTORS = 2**26, 16

#: A vector by parameters.
Direction = Sequence[Tensor]


class SecondProgram:
    """The part of a traced product that depends on the vector.

    Parameters
    ----------
    program : GraphModule
        Of what the first part leaves, and a vector.
    compile : bool
        Whether ``torch.compile`` compiles it, as one graph.

    Attributes
    ----------
    at_once : int
        How many vectors, or batches, share a call.
    """

    def __init__(self, program: fx.GraphModule, compile: bool = False) -> None:
        self.program = program
        self.at_once = 1 if compile else _vectors_at_once(program.graph)
        self._compiled: Any = torch.compile(program, fullgraph=True, dynamic=False) if compile else None
        self._verified: set[str] = set()

    def of(self, kept: Sequence[Any], v: Direction) -> list[Tensor]:
        """The product with one vector.

        Raises
        ------
        CurvatureError
            If it cannot be compiled.
        """
        with torch.no_grad():
            if self._compiled is None:
                return list(self.program(*kept, *v))
            try:
                with torch.compiler.set_stance("default"):  # all else runs in eager mode meanwhile
                    return list(self._compiled(*kept, *v))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # the compiler of torch, or the one that it calls
                raise CurvatureError(
                    f"torch.compile fails on the product ({reason(error)}); leave out compile"
                ) from error

    def of_many(self, kept: Sequence[Any], directions: Sequence[Direction]) -> Iterator[list[Tensor]]:
        """The products with many vectors, one after the other."""
        at_once = self.at_once  # which is one from now on where the first call fails
        for start in range(0, len(directions), at_once):
            chunk = directions[start : start + at_once]
            mapped = self._mapped(kept, chunk) if len(chunk) > 1 and self.at_once > 1 else None
            yield from (self.of(kept, v) for v in chunk) if mapped is None else mapped

    def of_batches(self, kept: Sequence[Any], dims: Sequence[int | None], v: Direction) -> list[Tensor] | None:
        """The products with one vector at what is kept of many batches; ``None`` where they cannot share a call.

        Parameters
        ----------
        kept : sequence
            Stacked along a first dim where ``dims`` is 0.
        dims : sequence of {0, None}
        v : sequence of Tensor

        Returns
        -------
        list of Tensor, optional
            By parameters, each with the batches along its first dim.
        """

        def last() -> list[Tensor]:
            return self.of([part if dim is None else part[-1] for part, dim in zip(kept, dims, strict=True)], v)

        return self._by_vmap([*kept, *v], [*dims, *[None] * len(v)], "batches", last)

    def _mapped(self, kept: Sequence[Any], directions: Sequence[Direction]) -> Iterator[list[Tensor]] | None:
        """The products with many vectors by one call; ``None`` where that is not possible or not right."""
        stacked = [torch.stack(parts) for parts in zip(*directions, strict=True)]
        dims = [*[None] * len(kept), *[0] * len(stacked)]
        found = self._by_vmap([*kept, *stacked], dims, "vectors", lambda: self.of(kept, directions[-1]))
        return None if found is None else ([part[j] for part in found] for j in range(len(directions)))

    def _by_vmap(
        self, arguments: Sequence[Any], dims: Sequence[int | None], over: str, last: Callable[[], list[Tensor]]
    ) -> list[Tensor] | None:
        """The results of one call, the last of which is compared with what ``last`` gives before any is used."""
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # vmap names operations that it repeats in a loop
                found = list(torch.vmap(lambda *each: tuple(self.program(*each)), tuple(dims))(*arguments))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # vmap cannot map what writes into its arguments, for example
            self.at_once = 1
            return None
        if over not in self._verified:
            expected = last()
            names = [str(i) for i in range(len(expected))]
            if largest_difference([part[-1] for part in found], expected, names)[0] > tolerance(expected[0].dtype):
                self.at_once = 1
                return None
            self._verified.add(over)
        return found


class Program:
    """A product at what the first part of a traced one has left.

    Parameters
    ----------
    second : SecondProgram
    kept : sequence
    """

    def __init__(self, second: SecondProgram, kept: Sequence[Any]) -> None:
        self._second, self._kept = second, list(kept)

    def __call__(self, v: Direction) -> list[Tensor]:
        return self._second.of(self._kept, v)

    def of_many(self, directions: Sequence[Direction]) -> Iterator[list[Tensor]]:
        """The products with many vectors, in their order."""
        return self._second.of_many(self._kept, directions)


class Batches:
    """Products by one program at what its first part has left for several batches, which share calls.

    Parameters
    ----------
    programs : mapping of int to Program
        By the numbers of the batches; of one second part. They are left with views of what is stacked here.
    """

    def __init__(self, programs: Mapping[int, Program]) -> None:
        self._programs = programs
        self._second = next(iter(programs.values()))._second
        columns = list(zip(*(one._kept for one in programs.values()), strict=True))
        self._dims = [None if _is_shared(column) else 0 for column in columns]
        self._kept: list[Any] = []
        for i, dim in enumerate(self._dims):  # one after the other, so that no more than one is there twice
            column = [one._kept[i] for one in programs.values()]
            self._kept.append(column[0] if dim is None else torch.stack(column))
            if dim == 0:
                for one, part in zip(programs.values(), self._kept[-1], strict=True):
                    one._kept[i] = part

    def products(self, v: Direction) -> Iterator[tuple[int, list[Tensor]]]:
        """Number of each batch, and its product with one vector."""
        several = self._second.at_once > 1 and 0 in self._dims  # a batch by itself leaves nothing to map over
        found = self._second.of_batches(self._kept, self._dims, v) if several else None
        for j, (i, one) in enumerate(self._programs.items()):
            yield i, one(v) if found is None else [part[j] for part in found]


def sharing_calls(programs: Mapping[int, Any]) -> list[Batches]:
    """The products of batches, by number, that can share calls; none unless all can be had so.

    A program of small operations is one call for at most as many batches as vectors would share it.
    """
    by_program: dict[int, dict[int, Program]] = {}
    for i, one in programs.items():
        if not isinstance(one, Program) or one._second.at_once < 2:
            return []
        by_program.setdefault(id(one._second), {})[i] = one
    found = []
    for own in by_program.values():
        numbers, at_once = list(own), next(iter(own.values()))._second.at_once
        for begin in range(0, len(numbers), at_once):
            found.append(Batches({i: own[i] for i in numbers[begin : begin + at_once]}))
    return found


def _is_shared(column: Sequence[Any]) -> bool:
    """Whether batches have a value in common: the parameters, and what is no tensor."""
    first = column[0]
    if not isinstance(first, Tensor):
        return True
    place = first.data_ptr(), first.shape, first.stride()
    return all((one.data_ptr(), one.shape, one.stride()) == place for one in column)


def _vectors_at_once(graph: fx.Graph) -> int:
    calls = [node for node in graph.nodes if node.op == "call_function"]
    sizes = {node: _bytes_of(node) for node in calls}
    if not any(sizes.values()) or sum(sizes.values()) > _SMALL * len(calls):
        return 1
    last = {source: node for node in graph.nodes for source in node.all_input_nodes}
    live = most = 0
    for node in calls:
        live += sizes[node]
        most = max(most, live)
        live -= sum(sizes.get(source, 0) for source in node.all_input_nodes if last[source] is node)
    return max(1, min(_MOST_VECTORS, _MOST_BYTES // most))


def _bytes_of(node: fx.Node) -> int:
    """Of a result; views count as if they were copies."""
    value = node.meta.get("val")
    return value.numel() * value.dtype.itemsize if isinstance(value, Tensor) else 0


__all__ = ["Batches", "Program", "SecondProgram", "sharing_calls"]
