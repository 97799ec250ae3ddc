"""Resolve models and losses by name or ``module:factory``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from pnanalysis.errors import USER_ERRORS, ModelError, PnError
from pnanalysis.inputs.copies import copied
from pnanalysis.inputs.hugging_face import folder_of, pretrained
from pnanalysis.inputs.registry import MODELS, describe_error, import_object, resolve

#: ``loss(outputs, targets)``, or ``loss(model, (inputs, targets))`` where the first parameter is named ``model``.
Loss = Callable[[Any, Any], torch.Tensor]
#: A registered name, ``module:factory`` or ``hf:DIR``, an instance, or a callable that returns one.
ModelLike = str | nn.Module | Callable[[], nn.Module]


def loss_of_outputs(outputs: Any, targets: Any) -> torch.Tensor:
    """The loss that the network itself returns, as Hugging Face's models do for batches with labels.

    Raises
    ------
    ModelError
        If it returns none.
    """
    found = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if not isinstance(found, torch.Tensor):
        raise ModelError(
            f'the network returns a {type(outputs).__name__} without a loss, which loss="model" takes; put labels into '
            "the inputs, or give another loss"
        )
    return found


LOSSES: dict[str, Loss] = {
    "cross_entropy": nn.functional.cross_entropy,
    "mse": nn.functional.mse_loss,
    "binary_cross_entropy": nn.functional.binary_cross_entropy_with_logits,
    "model": loss_of_outputs,
}


def build_model(spec: str, options: Mapping[str, Any] | None = None) -> nn.Module:
    """Build a model from its registered name or from ``module:factory``.

    Parameters
    ----------
    spec : str
        A name in the entry-point group ``pnanalysis.models``, ``module:factory`` (code that the caller trusts), or
        ``hf:DIR`` (see :func:`pnanalysis.inputs.hugging_face.pretrained`).
    options : mapping, optional
        Keyword arguments of the factory.

    Raises
    ------
    ModelError
        If the name is unknown, the factory cannot be imported, raises, or does not return a module.
    """
    folder = folder_of(spec)
    if folder is not None:
        return pretrained(folder)
    factory = import_object(spec, ModelError) if ":" in spec else resolve(MODELS, spec)
    if isinstance(factory, nn.Module):
        return factory
    return _called(factory, spec, options or {})


def _called(factory: Any, name: str, options: Mapping[str, Any]) -> nn.Module:
    """The network that a factory builds."""
    try:
        model = factory(**options)
    except PnError:
        raise
    except USER_ERRORS as error:  # user code may raise anything
        given = f" with {dict(options)}" if options else ""
        raise ModelError(f"model {name!r} cannot be built{given}: {describe_error(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"model {name!r} gave a {type(model).__name__}, not a torch.nn.Module")
    return model


def new_model(model: ModelLike, options: Mapping[str, Any] | None = None) -> nn.Module:
    """A new network from a name, a factory or an instance; an instance is copied and stays as it is.

    Raises
    ------
    ModelError
        If it cannot be built or copied.
    """
    if isinstance(model, nn.Module):
        return copied(model)
    if isinstance(model, str):
        return build_model(model, options)
    return _called(model, getattr(model, "__name__", type(model).__name__), options or {})


def device_of(network: nn.Module, label: str) -> torch.device:
    """The device of a network's trainable parameters.

    Raises
    ------
    ModelError
        If it has none.
    """
    for parameter in network.parameters():
        if parameter.requires_grad:
            return parameter.device
    raise ModelError(f"{label}: has no trainable parameters, so its loss does not depend on any")


def resolve_loss(loss: str | Loss) -> Loss:
    """A loss by name (a key of :data:`LOSSES`), by ``module:function``, or as it is."""
    if not isinstance(loss, str):
        return loss
    if loss in LOSSES:
        return LOSSES[loss]
    if ":" in loss:
        found: Loss = import_object(loss, ModelError)
        return found
    raise ModelError(f"unknown loss {loss!r}; there are {', '.join(LOSSES)}; give a custom loss as module:function")


def takes_model(loss: Loss) -> bool:
    """Whether a loss is called with the network and the batch, ``loss(model, (inputs, targets))``.

    It is where its first parameter is named ``model``: ``def residual(model, batch)``.
    """
    try:
        names = list(inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).parameters)
    except (TypeError, ValueError):  # builtins have no signature
        return False
    return names[:1] == ["model"]


def parameter_layers(model: nn.Module) -> Iterator[tuple[str, list[tuple[str, nn.Parameter]]]]:
    """Layers in the paper's sense: modules that own trainable parameters directly, in order.

    A parameter shared by several modules belongs to the first.

    Yields
    ------
    (str, list of (str, Parameter))
        The module's name, and its parameters by full name (weight and bias together form the layer's vector).
    """
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        own = [
            (f"{module_name}.{name}" if module_name else name, parameter)
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad and id(parameter) not in seen
        ]
        seen |= {id(parameter) for _, parameter in own}
        if own:
            yield module_name or type(module).__name__, own


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer to the first name of the same tensor."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    listings: list[Callable[..., Any]] = [model.named_parameters, model.named_buffers]
    for named_tensors in listings:
        for name, tensor in cast("list[tuple[str, Tensor]]", list(named_tensors(remove_duplicate=False))):
            names[name] = first.setdefault(id(tensor), name)
    return names
