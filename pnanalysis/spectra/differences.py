"""How two spectra differ, with the errors of the probes and of the choice of examples."""

from __future__ import annotations

from itertools import zip_longest

import numpy as np
import xarray as xr
from scipy.special import gammaln
from scipy.stats import t as student_t
from scipy.stats import wasserstein_distance

from pnanalysis import schema
from pnanalysis.arrays import Array
from pnanalysis.errors import CurvatureError
from pnanalysis.kinds import INTERVALS
from pnanalysis.spectra.data_error import moving_pieces
from pnanalysis.spectra.half_samples import distance_between_halves, has_half_samples
from pnanalysis.spectra.quadrature import SpectralMeasure
from pnanalysis.spectra.total_error import DataError, data_errors, own_ends, own_se

#: Numbers that are compared although they have no error.
_WITHOUT_ERROR = ("n_outliers", "class_ratio", "class_gap", "class_trace")
#: Standard errors that a normal number is within in 95 % of cases.
NORMAL_95 = 1.96


def compare_spectra(ds_a: xr.Dataset, ds_b: xr.Dataset) -> xr.Dataset:
    r"""How two spectra differ: B minus A, each difference with its error.

    Parameters
    ----------
    ds_a, ds_b : xarray.Dataset
        ``"spectral_density"`` datasets of one checkpoint each.

    Returns
    -------
    xarray.Dataset
        Of kind ``"spectrum_comparison"``: for each number of :func:`pnanalysis.spectra.summary.summarise` its
        difference as ``NAME``, with ``NAME_low`` and ``NAME_high`` and, for sampled quantities, ``NAME_se``. Where both
        spectra have an error for the choice of examples, that is included; ``NAME_probe_se`` and ``NAME_data_se`` are
        its parts. ``wasserstein1`` is the distance of the two spectra and ``wasserstein1_noise`` its expected value for
        two estimates of one spectrum; :func:`beyond_noise` says whether it is real. ``wasserstein1_se`` is an upper
        bound on its standard error, wide enough for 1.96 of them to hold with the few replicates of half samples. The
        attribute ``wasserstein1_covers`` says what the noise is made of (``"probes"`` or ``"probes and examples"``),
        and ``examples`` is ``"same"`` for spectra of the same ones.

    Raises
    ------
    CurvatureError
        If a dataset holds more than one checkpoint.

    Notes
    -----
    *Probes.* The errors of the two spectra are taken as independent, as they are with different seeds. With the same
    probes they are not, and the errors given here are too large.

    *Examples.* For spectra of the same examples (``group_digest``) the difference is taken example by example, or half
    sample by half sample, so that what examples do to both networks cancels. Else the errors are independent.

    *Distance.* It is the integral of the absolute difference of two cumulative distributions. For equal spectra that
    difference is noise of mean zero. Its variance at each point is estimated from the scatter of the probes
    (:meth:`pnanalysis.spectra.quadrature.SpectralMeasure.cumulative_variance`), and for a normal distribution its
    mean absolute value is :math:`\sqrt{2/\pi}` standard deviations. Where both spectra have half samples, these tell
    what the choice of examples adds (:func:`pnanalysis.spectra.half_samples.distance_between_halves`). Where they only
    have forms of single examples, that is the sum of what the leading eigenvalues move, one by one, and the rest of the
    spectrum as a whole (:func:`pnanalysis.spectra.data_error.moving_pieces`).
    The scatter of the probes includes the randomness of the nodes' masses and places, but not what all probes have in
    common, the space that was deflated first: with very many probes of a large matrix, two estimates differ by up to
    1.5 times the noise given here. With a single sampled probe (besides one that was deflated) there is no scatter, and
    only the randomness of the masses is included.
    """
    for ds in (ds_a, ds_b):
        if ds["node"].ndim != 1:
            raise CurvatureError(
                f"a comparison takes one checkpoint on each side, but a dataset has the dims {ds['node'].dims[:-1]}; "
                "select one first"
            )
    same = same_examples(ds_a, ds_b)
    errors_a, errors_b = data_errors(ds_a), data_errors(ds_b)
    data: dict[str, float] = {}
    for name in dict.fromkeys([*INTERVALS, *_WITHOUT_ERROR]):
        if name in ds_a and name in ds_b:
            data[name] = float(ds_b[name] - ds_a[name])
            error = _data_error(errors_a.get(name), errors_b.get(name), same)
            data |= _errors(ds_a, ds_b, name, *error)
    distance, covers = _distance(ds_a, ds_b, same)
    return schema.finish(
        xr.Dataset({name: ((), value) for name, value in (data | distance).items()}),
        "spectrum_comparison",
        method_a=ds_a.attrs.get("method"),
        method_b=ds_b.attrs.get("method"),
        wasserstein1_covers=covers,
        examples="same" if same else None,
    )


def same_examples(ds_a: xr.Dataset, ds_b: xr.Dataset) -> bool:
    """Whether two spectra are of the same groups of examples, as far as that is known."""
    digests = [str(ds["group_digest"].item()) if "group_digest" in ds.coords else "" for ds in (ds_a, ds_b)]
    return digests[0] == digests[1] not in ("", "nan")


def beyond_noise(distance: float, noise: float, se: float) -> bool:
    """Whether a Wasserstein-1 distance is larger than two estimates of one spectrum are apart in 95 % of cases.

    Parameters
    ----------
    distance, noise, se : float
        ``wasserstein1``, ``wasserstein1_noise`` and ``wasserstein1_se`` of :func:`compare_spectra`.

    Notes
    -----
    Noise that shifts all eigenvalues alike exceeds 1.96 standard errors, 2.46 times its mean magnitude, in 5 % of
    cases; noise of any other shape scatters less about its mean and exceeds it less often.
    """
    return distance > max(NORMAL_95 * se, noise)


def _data_error(a: DataError | None, b: DataError | None, same: bool) -> tuple[float, float]:
    """Standard error and half-width of the 95 % interval of B minus A for the choice of examples; NaN if unknown."""
    if a is None or b is None:
        return np.nan, np.nan
    if same and type(a) is type(b):
        paired = b.minus(a)  # type: ignore[arg-type]
        return paired.se, paired.half_width()
    return float(np.hypot(a.se, b.se)), float(np.hypot(a.half_width(), b.half_width()))


def _errors(ds_a: xr.Dataset, ds_b: xr.Dataset, name: str, data_se: float, half_width: float) -> dict[str, float]:
    """Standard errors and interval of a difference, as far as they are known."""
    found: dict[str, float] = {}
    known = np.isfinite(data_se)
    probe_se = float(np.hypot(own_se(ds_a, name), own_se(ds_b, name)))
    if np.isfinite(probe_se):
        found[f"{name}_probe_se"] = probe_se
    if known:
        found[f"{name}_data_se"] = data_se
    if np.isfinite(probe_se) or known:
        found[f"{name}_se"] = float(np.hypot(np.nan_to_num(probe_se), data_se if known else 0.0))
    if f"{name}_low" in ds_a and f"{name}_low" in ds_b:
        width = half_width if known else 0.0
        found |= dict(zip((f"{name}_low", f"{name}_high"), _interval(ds_a, ds_b, name, width), strict=True))
    return found


def _interval(ds_a: xr.Dataset, ds_b: xr.Dataset, name: str, half_width: float) -> tuple[float, float]:
    """Of B minus A; ``half_width`` is that of the interval for the choice of examples alone."""
    a, b = float(ds_a[name]), float(ds_b[name])
    (a_low, a_high), (b_low, b_high) = own_ends(ds_a, name), own_ends(ds_b, name)
    below, above = (b - b_low, a_high - a), (b_high - b, a - a_low)
    if np.isfinite(own_se(ds_a, name)):
        # Independent errors add in squares (the intervals need not be symmetric)...
        return b - a - float(np.hypot(np.hypot(*below), half_width)), b - a + float(
            np.hypot(np.hypot(*above), half_width)
        )
    # ... while bounds that are not statistical add up.
    return b - a - sum(below) - half_width, b - a + sum(above) + half_width


def _distance(ds_a: xr.Dataset, ds_b: xr.Dataset, same: bool) -> tuple[dict[str, float], str]:
    """The Wasserstein-1 distance of two spectra and its noise, and what the noise includes."""
    a, b = SpectralMeasure.from_dataset(ds_a), SpectralMeasure.from_dataset(ds_b)
    noise, covers = _probe_noise(a, b), "probes"
    # a noise that shifts all eigenvalues alike is a normal number, which scatters most about its mean magnitude
    se = float(np.sqrt(np.pi / 2)) * noise
    if has_half_samples(ds_a) and has_half_samples(ds_b):
        data_noise, dof = distance_between_halves(ds_a, ds_b, same)
        # a sum, as if both changed the same part of the spectrum: it is at most 1.4 times too large
        noise, covers = noise + data_noise, "probes and examples"
        se += float(np.sqrt(np.pi / 2)) * data_noise * float(student_t.ppf(0.975, dof)) / NORMAL_95
    elif (data_se := _distance_by_forms(ds_a, ds_b, same)) is not None:
        noise, covers, se = noise + data_se / float(np.sqrt(np.pi / 2)), "probes and examples", se + data_se
    # finite differences move eigenvalues of both by up to their errors
    off = sum(
        float(ds.attrs["round_off"]) * float(np.abs(measure.node).max())
        for ds, measure in ((ds_a, a), (ds_b, b))
        if ds.attrs.get("finite_differences")
    )
    noise, se = noise + off, se + off
    return {
        "wasserstein1": float(wasserstein_distance(a.node, b.node, a.weight, b.weight)),
        "wasserstein1_noise": noise,
        "wasserstein1_se": se,
    }, covers


def _distance_by_forms(ds_a: xr.Dataset, ds_b: xr.Dataset, same: bool) -> float | None:
    """Standard error of the distance for the choice of examples, without half samples; ``None`` without forms."""
    pieces = [moving_pieces(ds) for ds in (ds_a, ds_b)]
    if not all(pieces):
        return None
    errors = [_data_error(a, b, same)[0] for a, b in zip_longest(*pieces)]
    return float(np.nansum(errors)) / int(ds_a["n_parameters"])


def _probe_noise(a: SpectralMeasure, b: SpectralMeasure) -> float:
    """The distance expected between two estimates of one spectrum by different probes."""
    points = np.unique(np.concatenate([a.node, b.node]))
    (var_a, dof_a), (var_b, dof_b) = (measure.cumulative_variance(points[:-1]) for measure in (a, b))
    variance = var_a + var_b
    # Satterthwaite's degrees of freedom of the sum of two variances; infinite where neither has any
    weighted = sum(np.square(part) / dof for part, dof in ((var_a, dof_a), (var_b, dof_b)) if dof)
    dof = np.divide(variance**2, weighted, out=np.full(variance.shape, np.inf), where=weighted > 0)
    # the mean of an integral of absolute values is the sum of theirs, whatever their correlation
    return float(np.sqrt(2 / np.pi) * (np.sqrt(variance) / _mean_root_factor(dof)) @ np.diff(points))


def _mean_root_factor(dof: Array) -> Array:
    """Mean of a normal sample's standard deviation over the true one (the factor c4), by degrees of freedom."""
    # gammaln of larger numbers differ by less than their round-off, and the factor is 1 to six digits
    finite = np.minimum(dof, 1e6)
    return np.asarray(np.sqrt(2 / finite) * np.exp(gammaln((finite + 1) / 2) - gammaln(finite / 2)))
