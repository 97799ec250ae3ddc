"""Every private or experimental name of torch that the project relies on, under a name of our own.

torch may move or change any of these in any release. ``tests/test_torch_internals.py`` checks, for each of them, the
behaviour that the project depends on: run it before raising the upper bound on torch's version.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

try:
    # Tensors with shapes and types but no memory: user code is tried out and traced on them at no cost.
    from torch._subclasses.fake_tensor import FakeTensorMode

    # The one tracer that sees through torch.func's transforms (jvp of grad) and records plain tensor operations.
    from torch.fx.experimental.proxy_tensor import make_fx
except ImportError:  # moved: products are then computed without tracing, more slowly
    FakeTensorMode = make_fx = None  # type: ignore[assignment,misc]

# The common base classes of layers of one, two and three dimensions, SyncBatchNorm and the lazy layers included:
# torch has no public one, and a list of the concrete classes would miss subclasses of users.
from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.conv import _ConvNd as ConvolutionBase
from torch.nn.modules.conv import _ConvTransposeNd as TransposedConvolutionBase

# Nests of tuples, lists, dicts and named tuples. torch.func and make_fx flatten their arguments with this very module,
# so a nest means the same to them and to us (classes that users register included).
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten


def in_own_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns that traces user code, in a thread of its own.

    A trace that fails within a transform leaves the state of its thread in disorder: autograd is off.
    """
    if FakeTensorMode is not None:
        # torch 2.11 crashes at the second use of fake tensors if the first was in a thread that has ended
        with FakeTensorMode():
            pass
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


def _operation(name: str) -> Any:
    """A private operation, or ``None`` if it was renamed: no node of a trace has that target, then."""
    return getattr(getattr(torch.ops.aten, name, None), "default", None)


#: Zeros without memory, which autograd makes for tangents that vanish. Some operations refuse them outside of autograd.
ZEROS_WITHOUT_MEMORY = _operation("_efficientzerotensor")
#: Zeros that forward-mode differentiation makes to copy a tangent into, where the tangent's storage is not laid out
#: as the tensor's own (a view of part of a flat vector, for example).
ZEROS_FOR_TANGENT = _operation("_new_zeros_with_same_feature_meta")
#: What both forms of weight_norm call; its second derivative is wrong on CPUs (torch 2.15).
WEIGHT_NORM = getattr(torch, "_weight_norm", None)
#: What ``Tensor.to`` becomes in a trace.
CONVERSION = _operation("_to_copy")
#: What a reshape of the result of a matrix product becomes: a view, although its schema does not say so.
UNSAFE_VIEW = _operation("_unsafe_view")


@contextmanager
def without_checkpointing(note: Callable[[Any], object] | None = None) -> Iterator[None]:
    """Within the body, ``torch.utils.checkpoint`` runs what it is given and keeps the activations.

    ``note`` is called with each function that it is given.

    Its second run, in the backward pass, would see the parameters of the module itself, and not those that a
    functional call puts in their place; its reentrant form has no second derivative.
    """
    module, before = torch.utils.checkpoint, {}

    class RunDirectly:
        @staticmethod
        def apply(function: Any, preserve_rng_state: bool, *arguments: Any) -> Any:
            if note is not None:
                note(function)
            return function(*arguments)

    def without_second_run(function: Any, *arguments: Any, **keywords: Any) -> Iterator[None]:
        if note is not None:
            note(function)
        yield

    for name, replacement in (
        ("CheckpointFunction", RunDirectly),
        ("_checkpoint_without_reentrant_generator", without_second_run),
        ("_checkpoint_without_reentrant_generator_impl", without_second_run),  # its name since torch 2.15
    ):
        if hasattr(module, name):
            before[name] = getattr(module, name)
            setattr(module, name, replacement)
    try:
        yield
    finally:
        for name, original in before.items():
            setattr(module, name, original)


def writes_into_argument(target: Any) -> bool:
    """Whether the target of a traced node is an operation that changes one of its arguments in place."""
    # the schema is where torch itself records this; the trailing underscore in names is only a convention
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


#: Functions of single elements that torch does not tag as such.
_ELEMENTWISE = {"hardswish", "_prelu_kernel", "log_sigmoid_forward", "prelu", "clip", "softsign"}


def is_elementwise(target: Any) -> bool:
    """Whether the target of a traced node is a function of single elements of its arguments, with broadcasting."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    name = target._schema.name.split("::")[-1].rstrip("_")
    # an operation in place is tagged only sometimes: see that of the same name which is not
    plain = getattr(getattr(torch.ops.aten, name, None), target._overloadname, target)
    return name in _ELEMENTWISE or any(torch.Tag.pointwise in operation.tags for operation in (target, plain))


def returns_view(target: Any) -> bool:
    """Whether the target of a traced node returns a tensor that may share memory with an argument."""
    if target == UNSAFE_VIEW:
        return True
    schema = getattr(target, "_schema", None)  # plain Python functions in a trace have none
    return schema is not None and any(value.alias_info is not None for value in schema.returns)


def is_view_of(tensor: Tensor, base: Tensor) -> bool:
    """Whether a tensor is another one, or shares its memory."""
    return tensor is base or tensor._base is base


def compiler_is_loaded() -> bool:
    """Whether anything can have been compiled by ``torch.compile`` in this process."""
    return "torch._dynamo" in sys.modules  # which torch imports at the first use


def is_vmapped(tensor: Tensor) -> bool:
    """Whether a tensor has a dim that ``torch.vmap`` hides."""
    return torch._C._functorch.is_batchedtensor(tensor)


def convolve(layer: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a convolution layer with another weight and bias; its stride, groups and padding mode stay."""
    # the public functions know zero padding only; the layer's own method implements every padding mode
    result: Tensor = layer._conv_forward(inputs, weight, bias)
    return result


def versions_in(state: Any) -> Any:
    """The versions of modules that ``state_dict()`` records, by module name; ``None`` where they are not known.

    Modules translate weights of their earlier versions when they load them.
    """
    return getattr(state, "_metadata", None)


def record_versions(state: Any, versions: Any) -> None:
    """Give an ``OrderedDict`` of tensors the versions that :func:`versions_in` found."""
    state._metadata = versions


def times_written(tensor: Tensor) -> int:
    """How often a tensor was changed in place."""
    return tensor._version


__all__ = [
    "CONVERSION",
    "UNSAFE_VIEW",
    "WEIGHT_NORM",
    "ZEROS_FOR_TANGENT",
    "ZEROS_WITHOUT_MEMORY",
    "BatchNormBase",
    "ConvolutionBase",
    "FakeTensorMode",
    "NormBase",
    "TransposedConvolutionBase",
    "TreeSpec",
    "compiler_is_loaded",
    "convolve",
    "in_own_thread",
    "is_elementwise",
    "is_view_of",
    "is_vmapped",
    "make_fx",
    "record_versions",
    "returns_view",
    "times_written",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_unflatten",
    "versions_in",
    "without_checkpointing",
    "writes_into_argument",
]
