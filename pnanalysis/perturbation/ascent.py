r"""The largest rise of a loss within neighbourhoods, by ascents that share their passes over the network.

All ascents work on :math:`u` in a unit ball, where the slope is that of the loss times the scale: see
:mod:`pnanalysis.perturbation.neighbourhoods`. What they find is a lower bound on the largest rise there is.

``frank-wolfe`` moves towards the point where the linearised loss is largest, all the way if that raises the loss, else
half as far, and so on. On a quadratic in a ball this is power iteration on the Hessian. ``gradient`` takes steps of one
length along the normalised slope and projects. ``apgd`` does so with momentum, and halves its steps, starting again
from the best point, at check points where the loss has risen too seldom or the best has not improved.

References
----------
M. Frank and P. Wolfe, "An algorithm for quadratic programming", Naval Research Logistics Quarterly 3 (1956).
A. Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018, arXiv:1706.06083: steps of
2.5 radii over their number. F. Croce and M. Hein, "Reliable evaluation of adversarial robustness with an ensemble of
diverse parameter-free attacks", ICML 2020, arXiv:2003.01690: APGD.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pnanalysis.perturbation.neighbourhoods import Neighbourhoods
from pnanalysis.terminal.progress import Advance

_SMALLEST_STEP = 2.0**-8  # fraction of the way to the border; shorter steps change the loss by round-off only
_TOTAL_LENGTH = 2.5  # of the steps of gradient ascent, in radii
_FIRST_STEP, _MOMENTUM, _RISES = 2.0, 0.75, 0.75  # of APGD

#: Losses ``(k,)`` and gradients ``(k, P)`` at points ``(k, P)``.
Objective = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass
class Ascents:
    """What ascents have found, a row each.

    Attributes
    ----------
    value : Tensor, shape (k,)
        Highest loss.
    u : Tensor, shape (k, P)
        Where.
    first : Tensor, shape (k, P)
        Where the loss linearised at the start is largest.
    """

    value: Tensor
    u: Tensor
    first: Tensor


def ascend(
    objective: Objective, within: Neighbourhoods, start: Tensor, n_steps: int, method: str = "frank-wolfe",
    advance: Advance | None = None,
) -> Ascents:  # fmt: skip
    """Climb from some starts, each in a neighbourhood of its own.

    Parameters
    ----------
    objective : callable
    within : Neighbourhoods
    start : Tensor, shape (k, P)
        In the unit balls.
    n_steps : int
        Gradients of each ascent.
    method : {"frank-wolfe", "gradient", "apgd"}
    advance : callable, optional
        Called for every gradient.

    Returns
    -------
    Ascents
        Points where the loss is not finite count as highest.
    """
    steps = METHODS[method](within, start, n_steps)
    u, found, done = next(steps), None, 0
    for done in range(1, n_steps + 1):
        value, gradient = objective(within.points(u))
        slope = gradient * within.scale
        if found is None:
            found = Ascents(value, u.clone(), within.farthest(slope))
        better = (value > found.value) | ~value.isfinite()
        found.value = torch.where(better, value, found.value)
        found.u[better] = u[better]
        if advance is not None:
            advance(len(u))
        if done == n_steps:
            break
        try:
            u = steps.send((value, slope))
        except StopIteration:
            break
    if advance is not None and done < n_steps:
        advance(len(start) * (n_steps - done))
    assert found is not None
    return found


#: Yields points ``(k, P)`` in the unit balls, and is sent the losses and slopes there.
_Steps = Iterator[Tensor]


def _frank_wolfe(within: Neighbourhoods, start: Tensor, n_steps: int):  # type: ignore[no-untyped-def]
    u = start
    value, slope = yield u
    fraction = torch.ones_like(value)
    while bool((fraction > _SMALLEST_STEP).any()):
        candidate = torch.lerp(u, within.farthest(slope), fraction[:, None].to(u.dtype))
        there, their_slope = yield candidate
        risen = there > value
        u, slope = (torch.where(risen[:, None], new, old) for new, old in ((candidate, u), (their_slope, slope)))
        value = torch.where(risen, there, value)
        fraction = torch.where(risen, (2 * fraction).clamp_max(1.0), fraction / 2)


def _gradient(within: Neighbourhoods, start: Tensor, n_steps: int):  # type: ignore[no-untyped-def]
    u, length = start, _TOTAL_LENGTH / n_steps
    while True:
        _, slope = yield u
        u = within.projected(u + length * within.farthest(slope))


def _apgd(within: Neighbourhoods, start: Tensor, n_steps: int):  # type: ignore[no-untyped-def]
    u = before = start
    value, slope = yield u
    best = _Best(value, u, slope)
    step = torch.full_like(value, _FIRST_STEP)
    rises, last_step, last_best = torch.zeros_like(value), step.clone(), value.clone()
    checks, last_check = _check_points(n_steps), 0
    for k in range(n_steps):
        ahead = within.projected(u + step[:, None].to(u.dtype) * within.farthest(slope))
        if k:  # the first step has no momentum
            ahead = within.projected(u + _MOMENTUM * (ahead - u) + (1 - _MOMENTUM) * (u - before))
        before, u = u, ahead
        there, slope = yield u
        rises, value = rises + (there > value), there
        best.take(there, u, slope)
        if k + 1 in checks:
            slow = rises < _RISES * (k + 1 - last_check)
            stuck = (step == last_step) & (best.value == last_best)
            halved = slow | stuck
            last_step, last_best = step.clone(), best.value.clone()
            step = torch.where(halved, step / 2, step)
            u, slope = (torch.where(halved[:, None], b, own) for b, own in ((best.u, u), (best.slope, slope)))
            before = torch.where(halved[:, None], u, before)
            value = torch.where(halved, best.value, value)
            rises, last_check = torch.zeros_like(rises), k + 1


@dataclass
class _Best:
    """The best points so far, and the slopes there."""

    value: Tensor
    u: Tensor
    slope: Tensor

    def take(self, value: Tensor, u: Tensor, slope: Tensor) -> None:
        better = value > self.value
        self.value = torch.where(better, value, self.value)
        self.u, self.slope = (torch.where(better[:, None], a, b) for a, b in ((u, self.u), (slope, self.slope)))


def _check_points(n_steps: int) -> set[int]:
    """Numbers of steps after which APGD looks at its progress: ever closer together."""
    at, before = 0.22, 0.0
    found = set()
    while at <= 1:
        found.add(math.ceil(round(at * n_steps, 6)))
        at, before = at + max(at - before - 0.03, 0.06), at
    return found


METHODS = {"frank-wolfe": _frank_wolfe, "gradient": _gradient, "apgd": _apgd}
