"""What each batch weighs in the loss over all data: known for torch's losses, measured for all others.

A loss of one's own may be a mean over examples, over the tokens or positions that a mask keeps, over graphs, or a sum.
The value of a batch is then compared with the values of its parts: a mean over things of which there are :math:`w_1`
in one part and :math:`w_2` in the other fulfils :math:`(w_1 + w_2) L = w_1 L_1 + w_2 L_2`, and a sum
:math:`L = L_1 + L_2`. Every batch is looked at, cut in two at several places, and its first examples put
together with the last ones of the batch before: examples may weigh alike within each batch and differ between batches,
as they do where a loss weighs classes and the data come class after class. Batches of even size are cut between pairs,
as examples that follow each other may be one comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pnanalysis.errors import CurvatureError
from pnanalysis.evaluation.losses import InspectedLoss, counts, example_weights, known
from pnanalysis.inputs.batches import IGNORED, batch_size, can_cut, cut, joined, map_tensors, rows, tensors

#: ``weight(inputs, targets)``, or what batches weigh by.
Weight = Callable[[Any, Any], Any] | str | None
#: Numbers of things that a loss may be a mean over, by what they are called in messages.
Counts = dict[str, float]
#: What there is to count in two parts, the losses of the whole and of each, and whether these took passes.
Comparison = tuple[Counts, Counts, list[float], bool]
RULES = ("examples", "batches")
#: What the two sides of the equation may differ by, relative to the values, by roundoff.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_OTHER_TOLERANCE = 2e-2
_SUM = "sum"
_WAY_OUT = (
    "say what a batch weighs with weight='examples', weight='batches', or a function weight(inputs, targets), as in "
    "weight=lambda inputs, targets: (targets != -100).sum(), or give torch's own loss, whose weights are known"
)


class BatchWeights:
    """Collects the weights of batches that are shown to it one after another.

    Parameters
    ----------
    loss : InspectedLoss
    weight : None, "examples", "batches" or callable
        ``None`` knows torch's own losses, and measures all others.
    dtype : torch.dtype
        Precision of the loss.
    low_precision : bool
        Whether passes are in less: a loss that fits nothing may then be off by so much.
    evaluate, outputs, of_outputs : callable
        ``evaluate(batch)`` is the loss of a batch; ``outputs(batch)`` what the network returns for it, and
        ``of_outputs(outputs, targets)`` the loss then.
    """

    def __init__(
        self,
        loss: InspectedLoss,
        weight: Weight,
        dtype: torch.dtype,
        evaluate: Callable[[Any], Tensor],
        outputs: Callable[[Any], Any],
        of_outputs: Callable[[Any, Any], Tensor],
        low_precision: bool = False,
    ) -> None:
        if isinstance(weight, str) and weight not in RULES:
            raise CurvatureError(f"weight is {weight!r}; it must be {', '.join(RULES)} or weight(inputs, targets)")
        self.loss, self.weight = loss, weight
        self.evaluate, self.outputs, self.of_outputs = evaluate, outputs, of_outputs
        self.tolerance = _TOLERANCE.get(dtype, _OTHER_TOLERANCE)
        self._low_precision = low_precision
        self.measures = weight is None and known(loss) is None
        self._measured = "examples"
        #: Set where it is known otherwise that the loss of each batch is the mean over its examples.
        self.prefers_examples = False
        self._given: list[float] = []
        self._counts: list[Counts] = []
        self._alive: set[str] | None = None
        self._n_measured = 0
        self._before: list[_Losses | None] = [None, None]

    def counts(self, batch: Any) -> bool:
        """Whether anything in a batch counts, as far as its targets say: where nothing does, its mean is 0 / 0.

        Raises
        ------
        CurvatureError
            If its given weight is not a number from 0 on.
        """
        if self.measures:
            return _may_count(batch[1])
        return counts(self.loss, batch[1]) if self.weight in RULES else self._weight_of(batch) > 0

    def add(self, batch: Any) -> None:
        """Note the weight of the next batch.

        Raises
        ------
        CurvatureError
            If its given weight is not a number from 0 on, or a batch in which nothing counts is to count.
        """
        if not self.measures:
            self._given.append(self._weight_of(batch))
            if self.weight in RULES and not counts(self.loss, batch[1]):
                raise CurvatureError(
                    f"batch {len(self._given) - 1} has no target that counts in the loss, which is not defined for it; "
                    f"leave it out, or leave out weight={self.weight!r}"
                )
            return
        self._counts.append(_counts(batch))
        if _may_count(batch[1]):
            self._measure(batch)

    def finish(self) -> tuple[list[float], str]:
        """The weights of all batches, and whether the loss is a ``"mean"`` or a ``"sum"`` over each.

        Raises
        ------
        CurvatureError
            If the weights could not be measured, or what was measured leaves a choice.
        """
        if not self.measures:
            return self._given, "mean"
        examples = [each["examples"] for each in self._counts]
        only_sum = self._alive == {_SUM}
        everywhere = set.intersection(*map(set, self._counts))
        alive = sorted((self._alive or set()) & everywhere)
        if "examples" in alive:  # then what there is to count in the inputs is no likely alternative
            alive = [name for name in alive if "inputs" not in name]
        elif alive:
            self._measured = alive[0]
        if len(examples) == 1 or only_sum or (not self._n_measured and max(examples) == 1):
            return examples, "sum" if only_sum else "mean"
        if not alive:
            raise CurvatureError(
                f"the loss of a batch is neither a mean nor a sum over its parts that this package knows; {_WAY_OUT}"
            )
        if self.prefers_examples and "examples" in alive:
            return examples, "mean"
        found = {name: [each[name] for each in self._counts] for name in alive}
        first = found.get("examples", found[alive[0]])
        for name, weights in found.items():
            if not _proportional(first, weights):
                one = "examples" if "examples" in found else alive[0]
                raise CurvatureError(
                    f"batches of unequal size may count by their {one} or by their {name}, which no part of one batch "
                    f"tells; {_WAY_OUT}"
                )
        return first, "mean"

    @property
    def counts_examples(self) -> bool:
        """Whether it is known what parts of batches weigh: told, of torch's own losses, or measured: their examples."""
        return not self.measures or (self._alive is not None and "examples" in self._alive)

    def of_examples(self, batch: Any) -> Tensor:
        """What each example of a batch weighs in the batch's mean, relative to the others, ``(n,)``.

        For a loss of one's own that is what the batches have been found to weigh by; all alike where that is not known.
        """
        n, targets = batch_size(batch), batch[1]
        if known(self.loss) is not None:
            return example_weights(self.loss, targets).double().cpu() if isinstance(targets, Tensor) else torch.ones(n)
        if can_cut(batch) and (callable(self.weight) or (self.measures and self._measured != "examples")):
            parts = [cut(batch, slice(i, i + 1)) for i in range(n)]
            if callable(self.weight):
                return torch.tensor([float(self.weight(*part)) for part in parts], dtype=torch.float64)
            return torch.tensor([_counts(part)[self._measured] for part in parts], dtype=torch.float64)
        return torch.ones(n, dtype=torch.float64)

    def separates(self, batch: Any, reduction: str) -> bool:
        """Whether the loss of a batch is that of its two halves put together; true where that cannot be found out."""
        n = batch_size(batch)
        pieces = slice(0, n // 2), slice(n // 2, n)
        losses = _Losses(batch, batch, self.evaluate).of_parts(pieces) if n > 1 and can_cut(batch) else None
        if losses is None:
            return True
        whole, *halves = losses
        shares = [1.0, 1.0]
        if reduction == "mean":
            weights = self.of_examples(batch)
            shares = [float(weights[piece].sum() / weights.sum()) for piece in pieces]
        counted = [(share, value) for share, value in zip(shares, halves, strict=True) if share]  # else 0 / 0
        together = sum(share * value for share, value in counted)
        slack = 10 * self.tolerance * (abs(whole) + sum(abs(value) for _, value in counted))
        return not abs(together) < float("inf") or abs(whole - together) <= slack

    def _weight_of(self, batch: Any) -> float:
        if self.weight == "batches":
            return 1.0
        if self.weight == "examples":
            return float(batch_size(batch))
        if callable(self.weight):
            weight = float(self.weight(*batch))
            if not 0 <= weight < float("inf"):
                raise CurvatureError(f"weight gave {weight:g} for a batch; it must give a number from 0 on")
            return weight
        return _known_weight(self.loss, batch)

    def _measure(self, batch: Any) -> None:
        """Compare the loss of a batch with those of its parts, and that of its first ones with those before it."""
        ways = self._ways(batch)
        for comparison in self._in_parts(batch, ways):
            self._compare(*comparison)
        first, last = _ends(batch)
        pairs = zip(ways, self._before, strict=True)
        found = (way.alone(first).joined_to(before) for way, before in pairs if way and before)
        between = next(filter(None, found), None)
        if between is not None:
            self._compare(*between)
        self._before = [way and way.alone(last) for way in ways]

    def _ways(self, batch: Any) -> list[_Losses | None]:
        """Losses from the network's outputs, which take no pass for each part, and by passes, for losses that need one.

        Either is missing where its tensors do not have a row for each example.
        """
        outputs = self._outputs_by_example(batch)
        of_outputs = None if outputs is None else _Losses((outputs, batch[1]), batch, lambda at: self.of_outputs(*at))
        return [of_outputs, _Losses(batch, batch, self.evaluate, by_passes=True) if can_cut(batch) else None]

    def _in_parts(self, batch: Any, ways: Sequence[_Losses | None]) -> Iterator[Comparison]:
        """A batch and two parts of it, for several ways of cutting it in two."""
        n = batch_size(batch)
        unit = _unit(batch)
        for at in sorted({unit, n // 3 // unit * unit, n // 2 // unit * unit} - {0, n}):
            pieces = slice(0, at), slice(at, n)
            found = ((way.of_parts(pieces), way.by_passes) for way in ways if way)
            # normalisation by batches takes no single example, for one
            losses, by_passes = next((each for each in found if each[0] is not None), (None, False))
            if losses is not None:
                one, other = (_counts(_part(batch, piece)) for piece in pieces)
                yield one, other, losses, by_passes

    def _outputs_by_example(self, batch: Any) -> Any:
        """What the network returns, if it has a row for each example; else ``None``."""
        try:
            outputs = self.outputs(batch)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a loss that takes the network may call it in its own way
            return None
        # the loss may be, or depend on, a number that belongs to the whole batch
        whole = any(tensor.ndim == 0 and tensor.is_floating_point() for tensor in tensors(outputs))
        return outputs if not whole and can_cut((outputs, batch[1])) else None

    def _compare(self, one: Counts, other: Counts, losses: Sequence[float], by_passes: bool) -> None:
        """Strike out what two parts of ``losses[0]``, which have ``losses[1:]``, do not weigh by."""
        whole, *parts = losses
        finite = [abs(value) < float("inf") for value in parts]
        if not abs(whole) < float("inf") or not any(finite):
            return
        self._n_measured += 1
        size = abs(whole) + sum(abs(value) for value in parts if abs(value) < float("inf"))
        # passes over few examples round off otherwise, which is much of a loss that is nearly zero
        is_rough = self._low_precision or (by_passes and self.tolerance > _TOLERANCE[torch.float64])
        tolerances = (self.tolerance, _OTHER_TOLERANCE) if is_rough else (self.tolerance,)
        found = (self._fitting(one, other, losses, tolerance * size) for tolerance in tolerances)
        fitting = next(filter(None, found), set())
        self._alive = fitting if self._alive is None else self._alive & fitting

    def _fitting(self, one: Counts, other: Counts, losses: Sequence[float], slack: float) -> set[str]:
        """What two parts weigh by, as far as the losses of the whole and of the parts tell, up to some slack."""
        whole, *parts = losses
        finite = [abs(value) < float("inf") for value in parts]
        fitting = {_SUM} if all(finite) and abs(whole - sum(parts)) <= slack else set()
        for name in one.keys() & other.keys():
            shares = [one[name], other[name]]
            if any(share and not is_finite for share, is_finite in zip(shares, finite, strict=True)):
                continue  # a part is 0 / 0 where nothing in it counts
            mean = sum(share * value for share, value in zip(shares, parts, strict=True) if share)
            expected = mean / sum(shares) if sum(shares) else 0.0  # of nothing: sums that are divided by at least one
            if abs(expected - whole) <= slack:
                fitting.add(name)
        return fitting


class _Losses:
    """Losses of a batch, of parts of it, and of it and another one.

    Parameters
    ----------
    nest : pair
        What the loss is computed from: the batch, or the network's outputs for it and its targets.
    batch : pair
        The batch itself.
    loss : callable
        ``loss(nest)``.
    by_passes : bool
        Whether it takes a pass over the network.
    """

    def __init__(self, nest: Any, batch: Any, loss: Callable[[Any], Tensor], by_passes: bool = False) -> None:
        self.nest, self.batch, self.loss, self.by_passes = nest, batch, loss, by_passes

    @cached_property
    def whole(self) -> float:
        """The loss of the batch."""
        return float(self.loss(self.nest).detach())

    def of_parts(self, pieces: Sequence[slice]) -> list[float] | None:
        """The losses of the batch and of some parts; ``None`` where they cannot be had."""
        return _unless_it_fails(
            lambda: [self.whole, *(float(self.loss(rows(self.nest, piece)).detach()) for piece in pieces)]
        )

    def joined_to(self, other: _Losses) -> Comparison | None:
        """Another batch and this, as two parts of both together."""

        def losses() -> list[float]:
            together = float(self.loss(joined(other.nest, self.nest)).detach())
            return [together, other.whole, self.whole]

        found = _unless_it_fails(losses)
        return None if found is None else (_counts(other.batch), _counts(self.batch), found, self.by_passes)

    def alone(self, piece: slice) -> _Losses:
        """The same of some of the examples."""
        nest, batch = (map_tensors(each, torch.clone) for each in (rows(self.nest, piece), _part(self.batch, piece)))
        return _Losses(nest, batch, self.loss, self.by_passes)


def _unless_it_fails(losses: Callable[[], list[float]]) -> list[float] | None:
    try:
        return losses()
    except torch.OutOfMemoryError:
        raise
    except Exception:  # network or loss need batches of one size, or outputs of the network's own class
        return None


def _unit(batch: Any) -> int:
    """Examples that stay together: pairs, if all may be in one."""
    return 2 - batch_size(batch) % 2


def _ends(batch: Any) -> tuple[slice, slice]:
    """The first and the last examples of a batch of which some count, as far as their targets say."""
    unit = _unit(batch)
    pieces = [slice(i, i + unit) for i in range(0, batch_size(batch), unit)]
    first, last = (
        next((piece for piece in order if _may_count(rows(batch[1], piece))), order[0])
        for order in (pieces, pieces[::-1])
    )
    return first, last


def _part(batch: Any, piece: slice) -> Any:
    """Some of the examples of a batch; those of their targets alone where its inputs cannot be cut."""
    return cut(batch, piece) if can_cut(batch) else ((), rows(batch[1], piece))


def _may_count(targets: Any) -> bool:
    """Whether any target counts in a loss that leaves out :data:`pnanalysis.inputs.batches.IGNORED`."""
    whole = [tensor for tensor in tensors(targets) if not (tensor.is_floating_point() or tensor.is_complex())]
    return not whole or any(bool((tensor != IGNORED).any()) for tensor in whole)


def _known_weight(loss: InspectedLoss, batch: Any) -> float:
    """What the mean of one of torch's losses divides by: elements of the targets, or the sum of their weights."""
    targets = batch[1]
    if not isinstance(targets, Tensor) or not len(targets):
        return float(batch_size(batch))
    return float(example_weights(loss, targets).double().sum()) * targets.numel() / len(targets)


def _counts(batch: Any) -> Counts:
    """Numbers of things in a batch that a loss may be a mean over, by what they are called in messages."""
    inputs, targets = batch
    found: Counts = {"examples": float(batch_size((inputs, targets)))}
    places = [("targets", tensor) for tensor in tensors(targets)] + [("inputs", tensor) for tensor in tensors(inputs)]
    for i, (place, tensor) in enumerate(places):
        if tensor.ndim == 0 or tensor.is_complex() or (place == "inputs" and tensor.is_floating_point()):
            continue
        label = place if len(places) == 1 else f"{place} ({i + 1})"
        if place == "targets":
            found[f"elements of the {label}"] = float(tensor.numel())
        for shifted, part in (("", tensor), ("shifted ", tensor[:, 1:] if tensor.ndim > 1 else tensor[:0])):
            if tensor.is_floating_point():
                found[f"sum of the {shifted}{label}"] = float(part.double().sum())
            else:
                found[f"{shifted}{label} that are not {IGNORED}"] = float((part != IGNORED).sum())
                found[f"{shifted}{label} that are not 0"] = float((part != 0).sum())
    return found


def _proportional(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(abs(x * sum(b) - y * sum(a)) <= 1e-9 * sum(a) * sum(b) for x, y in zip(a, b, strict=True))


__all__ = ["RULES", "BatchWeights", "Weight"]
