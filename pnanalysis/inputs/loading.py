"""Weights of any origin into a network: torch loads them, and what it reports says whether they fit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, equal, nn
from torch.nn.parameter import is_lazy

from pnanalysis.errors import ModelError, reason
from pnanalysis.inputs.copies import copied
from pnanalysis.io.weights import State, StateDicts, is_extra_state, state_dicts
from pnanalysis.torch_internals import record_versions, times_written, versions_in

#: Modules around a network that make their names part of those of its weights.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
#: What scripts of training call the network within a larger module, whose other tensors (class weights of a loss,
#: statistics of a metric) may then be left out.
_NETWORKS = {"model", "module", "net", "network"}


def load_weights(model: nn.Module, weights: Mapping[str, Any], origin: str = "weights") -> nn.Module:
    """Put weights and buffers into ``model``, in place; nothing may be missing, left over, or of another shape.

    The model's own ``load_state_dict`` does it, so whatever its modules translate (weights of before a change of their
    names, parametrisations) is translated. Of parameters that share memory, one is enough. Names may have the prefixes
    that ``DistributedDataParallel`` and ``torch.compile`` add, or one that all of them share.

    Parameters
    ----------
    model : Module
        In an undefined state if the weights do not fit.
    weights : mapping
        A state dict, or nested mappings with one that fits, as training saves them.
    origin : str
        What messages call the weights.

    Raises
    ------
    ModelError
        If the weights are of another architecture (the message names the first difference), are not finite, or if
        several of those in a checkpoint fit.
    """
    _fit(model, state_dicts(weights), origin)
    check_finite(model, origin)
    return model


def check_finite(network: nn.Module, origin: str) -> None:
    """Refuse networks with weights that are not finite, or that have none yet.

    Raises
    ------
    ModelError
    """
    check_has_values(network, origin)
    if (name := first_not_finite(network)) is not None:
        raise ModelError(
            f"{origin}: {name!r} holds values that are not finite: training diverged; give an earlier checkpoint"
        )


def first_not_finite(network: nn.Module) -> str | None:
    """The name of the first parameter or buffer that is not finite, if there is one.

    Buffers may hold infinities, as masks do, but for running statistics.
    """
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    for name, tensor in network.state_dict().items():
        if not isinstance(tensor, Tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        strict = name in parameters or name.rpartition(".")[2].startswith("running_")
        if not tensor.isfinite().all() if strict else tensor.isnan().any():
            return name
    return None


def check_has_values(network: nn.Module, origin: str) -> None:
    """Refuse networks whose weights have no values yet: lazy modules before their first batch, or the meta device.

    Raises
    ------
    ModelError
    """
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if is_lazy(tensor):
            raise ModelError(
                f"{origin}: {name!r} has no shape yet; run the network on one batch first, or give its trained weights"
            )
    _check_not_meta(network, origin)


def _check_not_meta(network: nn.Module, origin: str) -> None:
    # loading into such tensors does nothing, without a word
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.is_meta:
            raise ModelError(f"{origin}: {name!r} is on the meta device and has no values; build the network on a CPU")


class WeightNames:
    """Finds a network's parameters in state dicts of any origin, by the names they have there.

    The network's own loading tells which tensor becomes which parameter. It is asked once for all state dicts with
    tensors of the same names and shapes, and no values are read.

    Parameters
    ----------
    network : Module
        The architecture; not modified.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._known: dict[object, dict[str, tuple[str, str]] | None] = {}

    def find(self, found: StateDicts, origin: str) -> dict[str, tuple[str, str]] | None:
        """Key of the state dict and name in it, for each parameter; ``None`` where loading computes any of them.

        Raises
        ------
        ModelError
            If the weights do not fit.
        """
        outline = tuple(
            (key, repr(versions_in(state)), *((name, tuple(t.shape), t.dtype) for name, t in _tensors(state).items()))
            for key, state in found.items()
        )
        if outline not in self._known:
            self._known[outline] = self._find(found, origin)
        return self._known[outline]

    def loaded(self, found: StateDicts, origin: str) -> State:
        """The state dict of the network with these weights."""
        return load_weights(copied(self._network), found, origin).state_dict()

    def _find(self, found: StateDicts, origin: str) -> dict[str, tuple[str, str]] | None:
        network = copied(self._network)
        own = {name: parameter.is_complex() for name, parameter in network.named_parameters()}
        ties = _ties(network)
        before = {(key, name): times_written(t) for key, state in found.items() for name, t in _tensors(state).items()}
        # with assign the network takes the very tensors, unless its modules make others of them
        _fit(network, found, origin, assign=True)
        places = {
            _place(found[key][name]): (key, name)
            for (key, name), n_written in before.items()
            if times_written(found[key][name]) == n_written
        }
        now = _tensors(network.state_dict())
        where = {}
        for name, is_complex in own.items():
            same = [now[other] for other in ties.get(name, [name]) if _place(now[other]) in places]
            if (
                not same or same[-1].is_complex() != is_complex
            ):  # torch loads in order, so the last of tied names counts
                return None
            where[name] = places[_place(same[-1])]
        return where


class _Place(NamedTuple):
    """What two tensors have in common only if they are the same numbers in memory."""

    address: int
    dtype: object
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _place(tensor: Tensor) -> _Place:
    return _Place(tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _fit(model: nn.Module, found: StateDicts, origin: str, assign: bool = False) -> None:
    """Load the one of some state dicts that fits, in place.

    Raises
    ------
    ModelError
        If none fits, or several do.
    """
    _check_not_meta(model, origin)
    own, described = set(model.state_dict()), _described(model)
    misfits: list[tuple[int, str]] = []  # names in common, and what is wrong
    last: State = {}

    def fitting(states: StateDicts) -> dict[str, State]:
        nonlocal last
        views: dict[str, State] = {}
        for key, state in states.items():
            for view in _views(state, own):
                last, wrong = view, _misfit(model, view, assign)
                if not wrong:
                    views[key] = view
                    break
                misfits.append((len(own & view.keys()), f"under {key!r}, {wrong}" if key else wrong))
        return views

    # checkpoints may hold one state dict under two names
    fits = fitting({key: found[key] for key in {id(state): key for key, state in found.items()}.values()})
    if not fits:
        wrong = max(misfits, key=lambda misfit: misfit[0])[1] if misfits else f"holds no weights of {described}"
        fits = fitting({f"{key}.{part}".lstrip("."): s for key, state in found.items() for part, s in _parts(state)})
        if not fits or (len(fits) == 1 and next(iter(fits)).rpartition(".")[2] not in _NETWORKS):
            raise ModelError(f"{origin}: {wrong}")
    if len(fits) > 1:
        raise ModelError(
            f"{origin}: holds weights under {' and under '.join(map(repr, fits))} that all fit {described}; save "
            "the one that you mean alone (torch.save of its state dict), or give that state dict"
        )
    (fit,) = fits.values()
    if fit is not last:
        _misfit(model, fit, assign)


def _misfit(model: nn.Module, state: State, assign: bool) -> str:
    """Load a state dict and say what does not fit; an empty string if everything does."""
    own, ties, described = _tensors(model.state_dict()), _ties(model), _described(model)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in own.items():
        wrong = _other_kind(state[name], tensor, name in parameters) if name in state else ""
        if wrong:
            return f"{name!r} {wrong}"
    # extra state is copied, for modules may keep the very object
    given = _renamed(state, lambda name: name, {name: deepcopy(state[name]) for name in state if is_extra_state(name)})
    try:
        report: Any = model.load_state_dict(given, strict=False, **({"assign": True} if assign else {}))
        if report is None:  # of a method of the user's that passes nothing on: let it complain itself
            model.load_state_dict(given)
            return ""
    except Exception as error:  # modules may translate weights in code of their own
        for name, tensor in own.items():
            if name in state and not is_lazy(tensor) and state[name].shape != tensor.shape:
                return f"{name!r} has shape {tuple(state[name].shape)}, {described} has {tuple(tensor.shape)}"
        return f"does not fit {described} ({reason(error)})"
    absent = {name for name in report.missing_keys if not is_extra_state(name)}
    missing = [
        name
        for name in report.missing_keys
        if absent.issuperset(ties.get(name, [name])) and not name.endswith("num_batches_tracked")
    ]
    unexpected = [name for name in report.unexpected_keys if not is_extra_state(name)]
    if missing:
        return f"lacks {missing[0]!r}, so it belongs to another architecture than {described}"
    if unexpected:
        return f"holds {unexpected[0]!r}, which {described} does not have"
    for name, others in ties.items():
        held = [other for other in others if other in state]
        if held and name in state and not _same(state[held[0]], state[name]):
            return f"holds different values for {held[0]!r} and {name!r}, which are one tensor in {described}"
    return ""


def _other_kind(given: Tensor, own: Tensor, is_parameter: bool) -> str:
    """What casting would lose, in words: parts of numbers, or what they mean."""
    if given.is_quantized or (is_parameter and _rank(given) == 0 and _rank(own) > 0):
        name = str(given.dtype).removeprefix("torch.")
        return f"is {name}: quantised weights, which have no derivatives; give those of before quantisation"
    if given.is_complex() and not own.is_complex():
        return "is complex, where the network has real numbers: imaginary parts would be lost"
    if _rank(given) > 0 and _rank(own) == 0 and bool((given != given.round()).any()):
        return "holds fractions, where the network has integers"
    return ""


def _rank(tensor: Tensor) -> int:
    """Zero for integers, one for real and complex numbers."""
    return int(tensor.is_floating_point() or tensor.is_complex())


def _views(state: State, own: set[str]) -> Iterator[State]:
    """The state dict by the names it may have in a network: as they are, without wrappers, without or with a prefix."""
    yield state
    wrappers = _WRAPPERS - {part for name in own for part in name.split(".")}
    view = _renamed(state, lambda name: ".".join(part for part in name.split(".") if part not in wrappers))
    if len(view) == len(state) and view.keys() != state.keys():
        yield view
    else:
        view = state
    prefix, rest = "", own
    while _common_prefix(rest):
        prefix += f"{_common_prefix(rest)}."
        rest = {name.partition(".")[2] for name in rest}
        yield _renamed(view, prefix.__add__)
    while _common_prefix(view):
        view = _renamed(view, lambda name: name.partition(".")[2])
        yield view


def _parts(state: State) -> Iterator[tuple[str, State]]:
    """The state dicts of submodules within one of a larger module."""
    for part in dict.fromkeys(name.partition(".")[0] for name in state if "." in name):
        yield part, _renamed(state, partial(_name_within, part))


def _name_within(part: str, name: str) -> str | None:
    first, _, rest = name.partition(".")
    return rest if first == part else None


def _common_prefix(names: Any) -> str:
    """The first part of dotted names, where all have the same."""
    firsts = {name.partition(".")[0] if "." in name else "" for name in names}
    return firsts.pop() if len(firsts) == 1 else ""


def _renamed(state: State, rename: Callable[[str], str | None], replaced: Mapping[str, Any] | None = None) -> State:
    """A state dict by other names, without those that become ``None``, with the versions of modules that saved it."""
    renamed: State = OrderedDict()
    for name, value in state.items():
        new = rename(name)
        if new is not None:
            renamed[new] = value if replaced is None else replaced.get(name, value)
    versions = versions_in(state)
    if versions is not None:
        # modules are named as their tensors are, without the last part
        moved = ((rename(f"{module}.x" if module else "x"), version) for module, version in versions.items())
        record_versions(renamed, OrderedDict((new.rpartition(".")[0], version) for new, version in moved if new))
    return renamed


def _tensors(state: Mapping[str, Any]) -> State:
    """Without extra state."""
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _ties(model: nn.Module) -> dict[str, list[str]]:
    """For each name of a tensor that has several, all of them, in the order of the state dict."""
    names: dict[_Place, list[str]] = {}
    for name, tensor in _tensors(model.state_dict()).items():
        if not is_lazy(tensor) and tensor.numel():
            names.setdefault(_place(tensor), []).append(name)
    return {name: same for same in names.values() if len(same) > 1 for name in same}


def _same(a: Tensor, b: Tensor) -> bool:
    return _place(a) == _place(b) or (a.dtype == b.dtype and equal(a, b))


def _described(model: nn.Module) -> str:
    return f"this {type(model).__name__}"
