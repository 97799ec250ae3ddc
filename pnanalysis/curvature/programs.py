"""Running the program of a traced product: once for each vector, for many vectors at a time, or compiled.

Small operations take less time than calling them does. Where that is so, many vectors share a call by ``torch.vmap``;
where operations are large, their results for many vectors no longer fit into the caches of the processor, and one
vector after the other is faster. A size that is read off the program decides, so that round-off does not depend on
timings.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pnanalysis.curvature.product_check import largest_difference, tolerance
from pnanalysis.errors import CurvatureError, reason

#: Largest mean size of an operation's result, in bytes, for which vectors share calls: up to here that took 0.4 to 0.9
#: of the time, for results of 0.3 MB and more 1.0 to 1.9 (a perceptron, LeNet-5 and a transformer on one CPU core).
_SMALL = 2**16
#: Most memory for the results of a shared call, were they all kept, and most vectors.
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
        How many vectors share a call.
    """

    def __init__(self, program: fx.GraphModule, compile: bool = False) -> None:
        self.program = program
        self.at_once = 1 if compile else _vectors_at_once(program.graph)
        self._compiled: Any = torch.compile(program, fullgraph=True, dynamic=False) if compile else None
        self._verified = False

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
        for start in range(0, len(directions), self.at_once):
            chunk = directions[start : start + self.at_once]
            mapped = self._mapped(kept, chunk) if len(chunk) > 1 else None
            yield from (self.of(kept, v) for v in chunk) if mapped is None else mapped

    def _mapped(self, kept: Sequence[Any], directions: Sequence[Direction]) -> Iterator[list[Tensor]] | None:
        """The products by one call; ``None`` where that is not possible or not right."""
        stacked = [torch.stack(parts) for parts in zip(*directions, strict=True)]
        dims = (*[None] * len(kept), *[0] * len(stacked))
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # vmap names operations that it repeats in a loop
                found = torch.vmap(lambda *arguments: tuple(self.program(*arguments)), dims)(*kept, *stacked)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # vmap cannot map what writes into its arguments, for example
            self.at_once = 1
            return None
        if not self._verified:
            expected = self.of(kept, directions[-1])
            names = [str(i) for i in range(len(expected))]
            if largest_difference([part[-1] for part in found], expected, names)[0] > tolerance(expected[0].dtype):
                self.at_once = 1
                return None
            self._verified = True
        return ([part[j] for part in found] for j in range(len(directions)))


class Program:
    """A product at what the first part of a traced one has left.

    Parameters
    ----------
    second : SecondProgram
    kept : sequence
    """

    def __init__(self, second: SecondProgram, kept: Sequence[Any]) -> None:
        self._second, self._kept = second, kept

    def __call__(self, v: Direction) -> list[Tensor]:
        return self._second.of(self._kept, v)

    def of_many(self, directions: Sequence[Direction]) -> Iterator[list[Tensor]]:
        """The products with many vectors, in their order."""
        return self._second.of_many(self._kept, directions)


def _vectors_at_once(graph: fx.Graph) -> int:
    values = [node.meta.get("val") for node in graph.nodes if node.op == "call_function"]
    sizes = [value.numel() * value.dtype.itemsize for value in values if isinstance(value, Tensor)]
    if not sizes or sum(sizes) > _SMALL * len(sizes):
        return 1
    return max(1, min(_MOST_VECTORS, _MOST_BYTES // max(sum(sizes), 1)))


__all__ = ["Program", "SecondProgram"]
