"""Which axes of the tensors in a forward pass count examples and units, followed through every operation."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from math import prod
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pnanalysis.activations.axes import EXAMPLE, FEATURE, UNIT, Axes, Factor, blank, normalised
from pnanalysis.activations.axis_rules import CONSTANT, WEIGHT, Call, Origin, State, name_of, rule_of, tensors_in

#: Stands for a change of sign among the parameters of an origin: a unit and its negative are two.
_NEGATED = -1


class Known(NamedTuple):
    """Which axes of a tensor are known."""

    units: bool = True
    examples: bool = True


class AxisTracker:
    """Labels of the tensors of one forward pass at a time.

    Parameters
    ----------
    network : torch.nn.Module
        Its parameters, and whatever is computed from these alone, are weights: the axis that they add in a product
        counts units.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.n_examples = 0
        self._states: dict[int, tuple[weakref.ref[Tensor], Axes | str, Origin]] = {}

    def start(self, inputs: Any) -> None:
        """Begin a pass: the first dim of each input counts examples, where it is as long as that of the first one."""
        self._states.clear()
        for module in self.network.modules():
            for value in (*module.buffers(recurse=False), *vars(module).values()):
                if isinstance(value, Tensor):
                    self._set(value, CONSTANT)
        found = [tensor for tensor in tensors_in(inputs) if tensor.ndim]
        self.n_examples = len(found[0]) if found else 0
        for tensor in found:
            dims = [(Factor(size),) for size in tensor.shape]
            if len(tensor) == self.n_examples:
                dims[0] = (Factor(self.n_examples, EXAMPLE),)
                if tensor.ndim == 2 and tensor.is_floating_point():
                    dims[1] = (Factor(tensor.shape[1], FEATURE),)
            self._set(tensor, tuple(dims))

    def follow(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """Label the outputs of an operation that has just been called."""
        name = name_of(function)
        outputs = [args[0]] if name == "setitem" else list(tensors_in(output))
        if not outputs or any(tensor.is_nested for tensor in outputs):
            return
        operands = list(tensors_in((args, kwargs)))
        states = [self.state(tensor) for tensor in operands]
        origin = frozenset[int]().union(*map(self.origin, operands), {_NEGATED} if name == "neg" else ())
        if not any(state is None or isinstance(state, tuple) for state in states):
            for tensor in outputs:
                self._set(tensor, WEIGHT if WEIGHT in states else CONSTANT, origin)
            return
        rule = rule_of(name)
        call = Call(function, name, tuple(args), dict(kwargs), outputs, self.state, self.origin, self.n_examples)
        try:
            found = [] if rule is None else rule(call)
        except Exception:  # called in a way that the rule does not expect: nothing is known
            found = []
        for tensor, axes in zip_longest(outputs, found):
            axes = blank(tensor.shape) if axes is None else normalised(axes)
            fits = [prod(f.size for f in dim) for dim in axes] == list(tensor.shape)
            self._set(tensor, axes if fits else blank(tensor.shape), origin)

    def follow_like(self, inputs: Any, output: Tensor) -> None:
        """Label the output of a function of single numbers as its input, where it has not been followed itself."""
        source = next(tensors_in(inputs), None)
        state = None if source is None else self.state(source)
        if self.state(output) is None and source is not None and source.shape == output.shape and state is not None:
            self._set(output, state, self.origin(source))

    def state(self, tensor: Tensor) -> State:
        """What is known of a tensor."""
        if isinstance(tensor, nn.Parameter):
            return WEIGHT
        found = self._found(tensor)
        return None if found is None else found[0]

    def origin(self, tensor: Tensor) -> Origin:
        """All parameters that a tensor was computed with: of the units of two layers they are not the same."""
        if isinstance(tensor, nn.Parameter):
            return frozenset({id(tensor)})
        found = self._found(tensor)
        return frozenset() if found is None else found[1]

    def _found(self, tensor: Tensor) -> tuple[Axes | str, Origin] | None:
        """What was noted of this tensor, and not of one that had its id before."""
        entry = self._states.get(id(tensor))
        return None if entry is None or entry[0]() is not tensor else entry[1:]

    def arranged(self, tensor: Tensor) -> tuple[Tensor, Known]:
        """The tensor as (examples, units, rest), and which of these are known; unknown axes have size 1, all in rest.

        An example that consists of one number has one unit.
        """
        state = self.state(tensor)
        axes = state if isinstance(state, tuple) and len(state) == tensor.ndim else blank(tensor.shape)
        factors = [factor for dim in axes for factor in dim]
        labels = [factor.label for factor in factors]
        unit = UNIT if UNIT in labels else FEATURE
        groups: list[list[int]] = [[], [], []]
        for i, label in enumerate(labels):
            groups[0 if label == EXAMPLE else 1 if label == unit else 2].append(i)
        sizes = [prod(factors[i].size for i in group) for group in groups]
        values = tensor.reshape([factor.size for factor in factors]).permute([i for group in groups for i in group])
        known = Known(unit in labels or (EXAMPLE in labels and sizes[2] == 1), EXAMPLE in labels)
        return values.reshape(sizes if groups[2] else sizes[:2]), known

    def by_example(self, tensor: Tensor) -> Tensor | None:
        """The tensor as (examples, rest); ``None`` where its examples are unknown."""
        values, known = self.arranged(tensor)
        if known.examples:
            return values.flatten(1)
        # what was not followed (graphs) may still be told by its size, if only one dim has it
        only = tensor.ndim > 0 and len(tensor) == self.n_examples and list(tensor.shape).count(self.n_examples) == 1
        return tensor.reshape(len(tensor), -1) if only else None

    def _set(self, tensor: Tensor, state: Axes | str, origin: Origin = frozenset()) -> None:
        self._states[id(tensor)] = (weakref.ref(tensor), state, origin)


class FollowAxes(TorchFunctionMode):
    """A mode in which a tracker follows every operation, except while ``paused``."""

    def __init__(self, tracker: AxisTracker) -> None:
        super().__init__()
        self.tracker = tracker
        self.paused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self.paused:
            self.tracker.follow(func, args, kwargs or {}, output)
            self.called(func, args, kwargs or {}, output)
        return output

    def called(self, function: Any, args: Any, kwargs: Any, output: Any) -> None:
        """What else to do after an operation."""

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Follow nothing within the body."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False
