"""The kinds of datasets: for each, its variables with dims, unit and label."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Variable:
    """One variable: its own dims (stacking dims may precede them), unit, label and whether it is required."""

    dims: tuple[str, ...]
    units: str
    long_name: str
    required: bool = True


def _var(dims: str, units: str, long_name: str, required: bool = True) -> Variable:
    return Variable(tuple(dims.split()), units, long_name, required)


_OPTIONAL = False


def _with_error(name: str, units: str, long_name: str) -> dict[str, Variable]:
    """A scalar with its standard error and the ends of its 95 % interval."""
    return {
        name: _var("", units, long_name),
        f"{name}_se": _var("", units, f"standard error of the {long_name}", _OPTIONAL),
        **_with_interval(name, units, long_name),
    }


def _with_interval(name: str, units: str, long_name: str) -> dict[str, Variable]:
    """A scalar with the ends of its 95 % interval."""
    return {
        name: _var("", units, long_name),
        **_with_ends(name, "", units, long_name),
    }


def _with_se(name: str, dims: str, units: str, long_name: str, required: bool = True) -> dict[str, Variable]:
    """A variable with its standard error."""
    return {
        name: _var(dims, units, long_name, required),
        f"{name}_se": _var(dims, units, f"standard error of the {long_name}", required),
    }


def _with_data_se(name: str, dims: str, units: str, long_name: str, required: bool = True) -> dict[str, Variable]:
    """A variable with its standard error for the choice of examples, where that is known."""
    return {
        name: _var(dims, units, long_name, required),
        f"{name}_data_se": _var(dims, units, f"standard error for the examples of the {long_name}", _OPTIONAL),
    }


def _with_ends(name: str, dims: str, units: str, long_name: str) -> dict[str, Variable]:
    """The ends of the 95 % interval of a variable, optional."""
    return {
        f"{name}_low": _var(dims, units, f"lower end of the 95 % interval of the {long_name}", _OPTIONAL),
        f"{name}_high": _var(dims, units, f"upper end of the 95 % interval of the {long_name}", _OPTIONAL),
    }


def _with_p(name: str, dims: str, long_name: str) -> dict[str, Variable]:
    """The p-value of a difference."""
    return {f"{name}_p": _var(dims, "1", f"p-value of the {long_name} (adjusted by Holm's step-down)", _OPTIONAL)}


_SPECTRUM_SCALARS = {
    **_with_error("trace", "loss", "trace"),
    **_with_error("frobenius_norm", "loss", "Frobenius norm"),
    **_with_error("negative_curvature", "1", "negative part of the sum of the eigenvalues' magnitudes"),
    **_with_error("negative_mass", "1", "fraction of eigenvalues below -1/1000 of the largest magnitude"),
    **_with_error("effective_rank", "1", "effective rank (participation ratio)"),
    **_with_error("effective_dimension", "1", "effective dimension"),
    **_with_interval("lambda_max", "loss", "largest eigenvalue"),
    **_with_interval("lambda_min", "loss", "smallest eigenvalue"),
    "n_outliers": _var("", "1", "number of eigenvalues above a gap"),
    "outlier_p": _var("", "1", "p-value of the gap below the outliers"),
    "n_outliers_negative": _var("", "1", "number of eigenvalues below a gap"),
    "outlier_negative_p": _var("", "1", "p-value of the gap above the negative outliers"),
    **_with_interval("bulk_edge_low", "loss", "lower edge of the bulk"),
    **_with_interval("bulk_edge_high", "loss", "upper edge of the bulk"),
    **_with_interval("gap_ratio", "1", "ratio of lambda_max to the upper edge of the bulk"),
    **_with_interval("class_ratio", "1", "ratio of the largest eigenvalue to that of rank C, the number of classes"),
    **_with_interval("class_gap", "1", "ratio of the largest eigenvalue to that of rank C + 1"),
    **_with_error("class_trace", "1", "part of the trace in the C largest eigenvalues"),
}

#: Numbers of a spectrum with an error.
INTERVALS = tuple(name for name in _SPECTRUM_SCALARS if {f"{name}_se", f"{name}_low"} & _SPECTRUM_SCALARS.keys())

_ERROR_PARTS = {
    "_se": "standard error, of probes and examples,",
    "_probe_se": "standard error for the choice of probes",
    "_data_se": "standard error for the choice of examples",
    "_bound_low": "lower end of the interval for these examples",
    "_bound_high": "upper end of the interval for these examples",
}
_SPECTRUM_SCALARS |= {
    f"{name}{end}": replace(
        _SPECTRUM_SCALARS[name], long_name=f"{label} of the {_SPECTRUM_SCALARS[name].long_name}", required=False
    )
    for name in INTERVALS
    for end, label in _ERROR_PARTS.items()
    if f"{name}{end}" not in _SPECTRUM_SCALARS
}

#: By kind, what is stored beside the dataset and read where it is used: see :mod:`pnanalysis.io.beside`.
LAZY = {"eigenpairs": "vector", "blocks": "diagonal"}

#: What may follow a name: the value itself, its errors, and its 95 % interval.
ERROR_ENDS = ("", "_se", "_probe_se", "_data_se", "_low", "_high")
#: Quantities of a spectrum that a comparison lists.
COMPARED_SPECTRUM = (
    "lambda_max", "lambda_min", "trace", "n_outliers", "outlier_p", "class_ratio", "class_trace", "effective_rank",
    "negative_curvature", "negative_mass",
)  # fmt: skip

#: Those of them whose differences are tested.
TESTED_SPECTRUM = tuple(name for name in COMPARED_SPECTRUM if name not in ("lambda_min", "n_outliers", "outlier_p"))

_SPECTRUM = {
    "node": _var("quadrature", "loss", "quadrature node (eigenvalue)"),
    "weight": _var("quadrature", "1", "quadrature weight (fraction of the spectrum)"),
    "sampled": _var("quadrature", "1", "whether the node comes from a random probe (1) or is a counted eigenvalue (0)"),
    "node_run": _var("quadrature", "1", "sampled node: its probe, from 1; counted node: minus its Lanczos run, from 0"),
    "node_n_before": _var("quadrature", "1", "number of directions deflated before the Lanczos run of the node"),
    "ritz_value": _var("probe lanczos", "loss", "Ritz value"),
    "ritz_weight": _var("probe lanczos", "1", "Ritz weight (squared first component)"),
    "ritz_residual": _var("probe lanczos", "loss", "residual bound of the Ritz value"),
    "ritz_coupling": _var("probe", "loss", "coupling of the probe's space to what was deflated before"),
    "density": _var("eigenvalue", "1 / loss", "spectral density"),
    "density_se": _var("eigenvalue", "1 / loss", "standard error of the spectral density"),
    "density_probe_se": _var("eigenvalue", "1 / loss", "standard error of the density for the probes", _OPTIONAL),
    "density_data_se": _var("eigenvalue", "1 / loss", "standard error of the density for the examples", _OPTIONAL),
    "ritz_merged": _var(
        "probe", "1", "1 for a probe whose space is part of those of the deflated eigenvalues", _OPTIONAL
    ),
    "deflated_value": _var("component", "loss", "deflated eigenvalue", _OPTIONAL),
    "deflated_residual": _var("component", "loss", "residual bound of the deflated eigenvalue", _OPTIONAL),
    "coupled_node": _var("coupled", "loss", "Ritz value of coupled or of single deflated spaces", _OPTIONAL),
    "coupled_weight": _var("coupled", "1", "eigenvalues that the coupling adds there", _OPTIONAL),
    "single_mean": _var("single", "loss", "mean eigenvalue of the complement, from one product", _OPTIONAL),
    "single_mean_square": _var("single", "loss^2", "mean square eigenvalue of it, from the same product", _OPTIONAL),
    "probe_trace": _var("", "loss", "trace by the probes of many steps alone", _OPTIONAL),
    "probe_square": _var("", "loss^2", "sum of squared eigenvalues by them alone", _OPTIONAL),
    "single_weight": _var("", "1", "weight of single products in the trace and the Frobenius norm", _OPTIONAL),
    "single_coupling": _var("", "loss", "coupling of all deflated spaces to that complement", _OPTIONAL),
    "top_value": _var("top", "loss", "one of the largest eigenvalues"),
    "top_residual": _var("top", "loss", "residual bound of that eigenvalue"),
    "coupling": _var("", "loss", "coupling between the deflated space and its complement"),
    "n_parameters": _var("", "1", "number of parameters"),
    "probe_weight": _var("probe", "1", "weight of the probe in the averaged estimate"),
    "kernel_width": _var("", "loss", "standard deviation of the Gaussian kernel"),
    **_SPECTRUM_SCALARS,
    "lambda_max_half": _var("", "loss", "mean largest eigenvalue over two halves of the examples", _OPTIONAL),
    "group_weight": _var("group", "1", "weight of a group of examples", _OPTIONAL),
    "trace_form": _var("group", "loss", "trace of the matrix of the group", _OPTIONAL),
    "trace_form_spread": _var("group", "loss", "half the difference of two estimates of that trace", _OPTIONAL),
    "square_form": _var("group", "loss^2", "trace of the matrix times that of the group", _OPTIONAL),
    "square_form_spread": _var("group", "loss^2", "half the difference of two estimates of it", _OPTIONAL),
    "top_form": _var("leading group", "loss", "curvature of the group along a leading eigenvector", _OPTIONAL),
    "lambda_min_form": _var("group", "loss", "curvature of the group along the last eigenvector", _OPTIONAL),
    "replicate_node": _var("replicate half replicate_quadrature", "loss", "quadrature node of a half", _OPTIONAL),
    "replicate_weight": _var("replicate half replicate_quadrature", "1", "quadrature weight of a half", _OPTIONAL),
    "replicate_value": _var("statistic replicate half", "1", "number of the spectrum of a half", _OPTIONAL),
}

_SPECTRUM_COMPARISON = {
    "wasserstein1": _var("", "loss", "Wasserstein-1 distance between the two spectra"),
    "wasserstein1_noise": _var("", "loss", "Wasserstein-1 distance expected from noise alone"),
    "wasserstein1_se": _var("", "loss", "bound on the standard error of the Wasserstein-1 distance"),
    **{
        name: Variable(scalar.dims, scalar.units, f"difference in {scalar.long_name}", _OPTIONAL)
        for name, scalar in _SPECTRUM_SCALARS.items()
    },
}

_FUNCTIONAL = {
    **_with_se("disagreement", "checkpoint other", "1", "fraction of examples classified differently", _OPTIONAL),
    **_with_ends("disagreement", "checkpoint other", "1", "fraction of examples classified differently"),
    "expected_disagreement": _var("checkpoint other", "1", "disagreement if mistakes were independent", _OPTIONAL),
    **_with_se("js_divergence", "checkpoint other", "nat", "mean Jensen-Shannon divergence of predictions", _OPTIONAL),
    **_with_se("rms_difference", "checkpoint other", "1", "root-mean-square difference of the outputs", _OPTIONAL),
    **_with_se("cka", "checkpoint other layer", "1", "linear centred kernel alignment (CKA)", _OPTIONAL),
}


def _with_parts(name: str, dims: str, units: str, long_name: str, required: bool = True) -> dict[str, Variable]:
    """A variable with its interval, and its standard error: for probes, for examples, and for both."""
    return {
        name: _var(dims, units, long_name, required),
        **{
            f"{name}{end}": _var(dims, units, f"{label} of the {long_name}", _OPTIONAL)
            for end, label in _ERROR_PARTS.items()
            if not end.startswith("_bound")
        },
        **_with_ends(name, dims, units, long_name),
    }


_OVERLAP = {
    **_with_data_se(
        "overlap", "checkpoint other", "1", "overlap of the spaces of eigenvectors (mean squared cosine)", _OPTIONAL
    ),
    "overlap_halves": _var("checkpoint other", "1", "overlap of spaces over different halves of examples", _OPTIONAL),
    "overlap_halves_spread": _var("checkpoint other", "1", "standard deviation over ways round", _OPTIONAL),
    "overlap_chance": _var("checkpoint other", "1", "overlap expected of random spaces", _OPTIONAL),
    "overlap_chance_sd": _var("checkpoint other", "1", "standard deviation of the overlap of random spaces", _OPTIONAL),
}

_COMPARISON = {
    **_OVERLAP,
    **_with_p("overlap", "checkpoint other", "overlap of random spaces being as far from its mean"),
    **{
        f"{name}{end}": variable
        for name, dims, text in (
            ("eigenvalue", "checkpoint pair", "eigenvalue"),
            ("eigenvalue_difference", "checkpoint other pair", "difference in eigenvalue"),
        )
        for end, variable in {
            "": _var(dims, "loss", text, _OPTIONAL),
            "_data_se": _var(dims, "loss", f"standard error for the choice of examples of the {text}", _OPTIONAL),
            **{key.removeprefix(name): one for key, one in _with_ends(name, dims, "loss", text).items()},
        }.items()
    },
    **_with_p("eigenvalue_difference", "checkpoint other pair", "difference in eigenvalue"),
    **_with_parts("block_norm", "checkpoint block", "loss", "Frobenius norm of the Hessian's block", _OPTIONAL),
    **_with_parts(
        "block_norm_difference", "checkpoint other block", "loss", "difference in Frobenius norm of a block", _OPTIONAL
    ),
    **_with_p("block_norm_difference", "checkpoint other block", "difference in Frobenius norm of the block"),
    **_with_parts("block_trace", "checkpoint block", "loss", "trace of the Hessian's block", _OPTIONAL),
    **_with_parts(
        "block_trace_difference", "checkpoint other block", "loss", "difference in trace of the block", _OPTIONAL
    ),
    **_with_p("block_trace_difference", "checkpoint other block", "difference in trace of the block"),
    **_with_se("loss", "checkpoint split", "nat", "loss"),
    **_with_se("loss_difference", "checkpoint other split", "nat", "difference in loss"),
    **_with_se("error", "checkpoint split", "1", "error"),
    **_with_se("error_difference", "checkpoint other split", "1", "difference in error"),
    **_with_ends("error", "checkpoint split", "1", "error"),
    **_with_p("loss_difference", "checkpoint other split", "difference in loss"),
    **_with_p("error_difference", "checkpoint other split", "difference in error"),
    "only_wrong": _var("checkpoint other split", "1", "number of examples that only this one misclassifies", _OPTIONAL),
    "rank": _var("checkpoint split", "1", "one plus the number of checkpoints with significantly lower error"),
    "n_examples": _var("split", "1", "number of examples that count in the error"),
    "n_loss_examples": _var("split", "1", "number of examples that count in the loss", _OPTIONAL),
    "norm": _var("checkpoint", "1", "norm of the parameters"),
    "distance": _var("checkpoint other", "1", "Euclidean distance between the parameters"),
    "relative_distance": _var("checkpoint other", "1", "distance relative to the norm of the other checkpoint"),
    "cosine": _var("checkpoint other", "1", "cosine similarity of the parameters"),
    "layer_distance": _var("checkpoint other layer", "1", "Euclidean distance between the parameters of the layer"),
    "layer_cosine": _var("checkpoint other layer", "1", "cosine similarity of the parameters of the layer"),
    "distance_from_start": _var("checkpoint", "1", "Euclidean distance from the starting point", _OPTIONAL),
    **_FUNCTIONAL,
    **{
        f"{name}{end}": replace(_SPECTRUM_SCALARS[f"{name}{end}"], dims=("checkpoint",), required=False)
        for name in COMPARED_SPECTRUM
        for end in ERROR_ENDS
        if f"{name}{end}" in _SPECTRUM_SCALARS
    },
    **{
        f"{name}_difference{end}": replace(
            _SPECTRUM_COMPARISON[f"{name}{end}"], dims=("checkpoint", "other"), required=False
        )
        for name in COMPARED_SPECTRUM
        for end in ERROR_ENDS
        if f"{name}{end}" in _SPECTRUM_COMPARISON
    },
    **{
        name: replace(_SPECTRUM_COMPARISON[name], dims=("checkpoint", "other"), required=False)
        for name in ("wasserstein1", "wasserstein1_noise", "wasserstein1_se")
    },
    **{
        name: variable
        for stem in TESTED_SPECTRUM
        for name, variable in _with_p(
            f"{stem}_difference", "checkpoint other", f"difference in {_SPECTRUM_SCALARS[stem].long_name}"
        ).items()
    },
    **_with_p("wasserstein1", "checkpoint other", "Wasserstein-1 distance between the two spectra"),
    "saturation": _var("checkpoint activation", "1", "98th percentile of the absolute activation", _OPTIONAL),
}

#: Numbers that a comparison lists, and whose differences are tested by their standard errors.
COMPARED_NUMBERS = {
    "worst_rise": ("nat", "largest rise of the loss found"),
    "mean_rise": ("nat", "mean rise of the loss"),
    "relative_flatness": ("nat", "relative flatness"),
    "learning_coefficient": ("1", "local learning coefficient"),
    "last_lambda_max": ("loss", "largest eigenvalue of the Hessian when the training was last measured"),
    "last_threshold_ratio": ("1", "largest eigenvalue of the preconditioned Hessian over its threshold then"),
    "gradient_top": ("1", "part of the gradient's squared length in the top space"),
    "network_off_diagonal_share": ("1", "part of the matrix's energy between different blocks"),
    "trace_concentration": ("1", "concentration of the trace in few blocks"),
}
for _name, (_units, _long_name) in COMPARED_NUMBERS.items():
    _difference = f"difference in {_long_name}"
    _COMPARISON |= {
        **_with_se(_name, "checkpoint", _units, _long_name, _OPTIONAL),
        **_with_se(f"{_name}_difference", "checkpoint other", _units, _difference, _OPTIONAL),
        **_with_p(f"{_name}_difference", "checkpoint other", _difference),
    }

_NUMBER = "diagnostic (units in diagnostic_units)"
_CHAMPION = {
    **{
        f"{name}{end}": _var(dims, "1", f"{label}{text}")
        for name, dims, text in (
            ("value", "diagnostic checkpoint", _NUMBER),
            ("difference", "diagnostic", f"champion minus plain model, {_NUMBER}"),
        )
        for end, label in {
            "": "",
            "_se": "standard error of the ",
            "_data_se": "standard error for the choice of examples of the ",
            "_low": "lower end of the 95 % interval of the ",
            "_high": "upper end of the 95 % interval of the ",
        }.items()
    },
    "difference_p": _var("diagnostic", "1", "p-value of the difference (adjusted by Holm's step-down)"),
    "null_n": _var("diagnostic", "1", "number of restarts"),
    "null_mean": _var("diagnostic", "1", f"mean of the restarts, {_NUMBER}"),
    "null_low": _var("diagnostic", "1", f"lower end of the 95 % interval of prediction, {_NUMBER}"),
    "null_high": _var("diagnostic", "1", f"upper end of the 95 % interval of prediction, {_NUMBER}"),
    "null_score": _var("diagnostic", "1", "champion minus mean, in standard deviations of a prediction"),
    "null_p_single": _var("diagnostic", "1", "p-value of the champion being drawn like the restarts, by itself"),
    "null_p": _var("diagnostic", "1", "p-value of being drawn like the restarts (adjusted by Holm's step-down)"),
    "null_rank": _var("diagnostic", "1", "rank of the champion among the restarts (1 is the lowest; ties count half)"),
    "null_rank_p": _var("diagnostic", "1", "two-sided p-value by this rank alone"),
    **_with_se("loss", "checkpoint path position", "nat", "training loss on the line from the plain model"),
    **_with_se("excess", "checkpoint path position", "nat", "loss above linear interpolation between the ends"),
    **_with_se("barrier", "checkpoint path", "nat", "barrier of the loss"),
    "distance": _var("checkpoint path", "1", "Euclidean distance from the plain model"),
    "js_divergence": _var("checkpoint", "nat", "mean Jensen-Shannon divergence from the plain model", _OPTIONAL),
    "gradient_noise": _var(
        "checkpoint", "loss", "norm that the choice of examples alone gives the gradient", _OPTIONAL
    ),
    **_with_se("error_difference", "reference", "1", "error of the champion minus that of the reference"),
    **_with_p("error_difference", "reference", "difference in error"),
    "only_wrong": _var("reference", "1", "number of examples that only the champion misclassifies", _OPTIONAL),
    "only_right": _var("reference", "1", "number of examples that only the reference misclassifies", _OPTIONAL),
    "criterion": _var("training", "1", "what the champion is picked by (the lowest)", _OPTIONAL),
    "training_test_error": _var("training", "1", "test error at the end of training", _OPTIONAL),
    "selection_p": _var("", "1", "chance of the best of as many trainings having a test error as low", _OPTIONAL),
    "selection_least_p": _var("", "1", "smallest value that this can have", _OPTIONAL),
    "best_of_restarts": _var("", "1", "mean test error of the best of as many restarts", _OPTIONAL),
}

_EIGENPAIRS = {
    "value": _var("pair", "loss", "eigenvalue"),
    "residual": _var("pair", "loss", "residual norm of the eigenpair"),
    "value_bound": _var("pair", "loss", "distance within which an eigenvalue lies"),
    "value_data_se": _var("pair", "loss", "standard error of the eigenvalue for the choice of examples", _OPTIONAL),
    **_with_ends("value", "pair", "loss", "eigenvalue"),
    "value_form": _var("pair group", "loss", "curvature of a group of examples along the eigenvector", _OPTIONAL),
    "group_weight": _var("group", "1", "weight of a group of examples", _OPTIONAL),
    "value_half": _var("half pair", "loss", "eigenvalue over half of the examples", _OPTIONAL),
    "converged": _var("pair", "1", "whether the residual is within the tolerance"),
    "sin_theta": _var("pair", "1", "bound of the sine of the angle to the eigenvector"),
    "cluster": _var("pair", "1", "number of the cluster of eigenvalues that the pair belongs to"),
    "space_sin_theta": _var("pair", "1", "bound of the sine of the largest angle to the space of the cluster"),
    **_with_data_se("participation", "pair", "1", "inverse participation ratio of the eigenvector"),
    **_with_data_se(
        "layer_part", "pair layer", "1", "part of the eigenvector's squared length in the layer", _OPTIONAL
    ),
    "layer_share": _var("layer", "1", "part of the parameters that are in the layer", _OPTIONAL),
    **_with_data_se(
        "gradient_part", "pair", "1", "part of the gradient's squared length along the eigenvector", _OPTIONAL
    ),
    **_with_se("gradient_top", "", "1", "part of the gradient's squared length in the top space", _OPTIONAL),
    "gradient_top_without": _var(
        "without_group", "1", "the same part without one of eight groups of the examples", _OPTIONAL
    ),
    "gradient_top_half": _var("half", "1", "part of half of the examples' gradient in their own top space", _OPTIONAL),
    "gradient_norm": _var("", "loss", "norm of the gradient", _OPTIONAL),
    "gradient_noise": _var("", "loss", "norm that the choice of examples alone gives the gradient", _OPTIONAL),
    **_with_data_se(
        "update_part", "pair", "1", "part of the last update's squared length along the eigenvector", _OPTIONAL
    ),
    **_with_data_se("update_top", "", "1", "part of the last update's squared length in the top space", _OPTIONAL),
    "update_norm": _var("", "1", "norm of the last update", _OPTIONAL),
    "top_chance": _var("", "1", "part of a random vector's squared length in the top space", _OPTIONAL),
    **_with_data_se(
        "level_part", "level pair", "1", "part of the Gauss-Newton curvature along the eigenvector", _OPTIONAL
    ),
    "ggn_value": _var("pair", "loss", "Gauss-Newton curvature along the eigenvector", _OPTIONAL),
    **_with_data_se("class_part", "pair", "1", "part of the eigenvector in the span of the class means", _OPTIONAL),
    **_with_data_se(
        "cross_part", "pair", "1", "part of the eigenvector in the span of the means of pairs of classes", _OPTIONAL
    ),
    "class_value": _var("class", "loss", "eigenvalue of the matrix of the class means", _OPTIONAL),
    "cross_value": _var("class_pair", "loss", "eigenvalue of the matrix of the means of pairs of classes", _OPTIONAL),
    "class_chance": _var("", "1", "part of a random vector in the span of the class means", _OPTIONAL),
    "cross_chance": _var("", "1", "part of a random vector in the span of the means of pairs", _OPTIONAL),
    "n_parameters": _var("", "1", "number of parameters"),
    "n_hvp": _var("", "1", "products with the matrix"),
    **_OVERLAP,
    "vector": _var("pair parameter", "1", "eigenvector of unit length", _OPTIONAL),
}


_BLOCKS = {
    "n_parameters": _var("block", "1", "number of parameters"),
    **_with_parts("trace", "block", "loss", "trace of the diagonal block"),
    "trace_form": _var("group block", "loss", "trace of the group's matrix in the block", _OPTIONAL),
    "group_share": _var("group", "1", "part of the examples that is in the group", _OPTIONAL),
    "trace_deviation": _var("probe block", "loss", "what a sign vector adds to the error of the trace", _OPTIONAL),
    **_with_parts("frobenius_norm", "block", "loss", "Frobenius norm of the diagonal block"),
    "frobenius_norm_form": _var("group block", "loss", "what the group adds to the norm of the block", _OPTIONAL),
    "frobenius_norm_deviation": _var(
        "probe block", "loss", "what a sign vector adds to the error of the norm", _OPTIONAL
    ),
    **_with_parts("off_diagonal_energy", "block", "loss^2", "sum of the block's energies with all others"),
    **_with_parts("off_diagonal_share", "block", "1", "part that other blocks have of the block's energies"),
    **_with_parts("energy", "block other", "loss^2", "energy (squared Frobenius norm) between blocks"),
    **_with_parts("network_trace", "", "loss", "trace of all blocks together"),
    **_with_parts(
        "network_off_diagonal_share", "", "1", "part of the matrix's energy between different blocks", _OPTIONAL
    ),
    **_with_parts("trace_concentration", "", "1", "concentration of the trace in few blocks", _OPTIONAL),
    "n_hvp": _var("", "1", "products with the matrix"),
    "diagonal": _var("statistic parameter", "loss", "diagonal of the matrix, with its standard errors", _OPTIONAL),
    **_with_se("js_divergence", "block other", "nat", "Jensen-Shannon divergence of the spectra of blocks", _OPTIONAL),
    **_with_ends("js_divergence", "block other", "nat", "Jensen-Shannon divergence of the spectra of blocks"),
    **_with_se("wasserstein1", "block other", "loss", "Wasserstein-1 distance of the spectra of blocks", _OPTIONAL),
    **_with_ends("wasserstein1", "block other", "loss", "Wasserstein-1 distance of the spectra of blocks"),
    "spectrum_node": _var("half block quadrature", "loss", "quadrature node of a block's spectrum", _OPTIONAL),
    "spectrum_weight": _var("half block quadrature", "1", "quadrature weight of a block's spectrum", _OPTIONAL),
    "squared_change": _var("bits block", "1", "squared change of the weights by rounding", _OPTIONAL),
    **_with_parts("sensitivity", "bits block", "loss", "mean eigenvalue times the squared change", _OPTIONAL),
    "rank": _var("bits block", "1", "place of the sensitivity, from the largest", _OPTIONAL),
    **_with_ends("rank", "bits block", "1", "place of the sensitivity"),
    "rank_probability": _var("bits block place", "1", "probability of the place, by all errors", _OPTIONAL),
    **{
        f"{name}{end}": _var(f"bits{dims}", "loss", f"{error}{label}{whole}", _OPTIONAL)
        for dims, all_, whole in ((" block", "", ""), ("", "_all", " of all blocks"))
        for name, label in (
            ("quadratic", "second-order term of the change of the loss by rounding"),
            ("linear", "first-order term of the change of the loss by rounding"),
            ("loss_increase", "measured change of the loss by rounding"),
        )
        for end, error in ((all_, ""), (f"{all_}_data_se", "standard error for the choice of examples of the "))
        if not (name == "linear" and error)
    },
}

SCHEMAS: dict[str, dict[str, Variable]] = {
    "history": {
        "train_loss": _var("iteration epoch", "nat", "training loss"),
        "penalty": _var("iteration epoch", "nat", "persistent penalty"),
        "train_error": _var("iteration epoch", "1", "training error", _OPTIONAL),
        "validation_error": _var("iteration epoch", "1", "validation error"),
        "test_error": _var("iteration epoch", "1", "test error"),
        "seconds": _var("iteration epoch", "s", "wall-clock time of the epoch", _OPTIONAL),
    },
    "spectral_density": _SPECTRUM,
    "hessian": _SPECTRUM,
    "spectrum_comparison": _SPECTRUM_COMPARISON,
    "eigenpairs": _EIGENPAIRS,
    "eigenvectors": {"vector": _var("pair parameter", "1", "eigenvector of unit length")},
    "block_forms": {
        "forms": _var("group block a b", "loss", "form of the group's part of a block with two sign vectors"),
        "rest": _var("block a b", "loss", "form of what no example has"),
        "total": _var("parameter", "loss", "sum of samples of the diagonal", _OPTIONAL),
        "square": _var("parameter", "loss^2", "sum of squared samples of the diagonal", _OPTIONAL),
        "halves": _var("group half parameter", "loss", "sum of the group's samples of the diagonal", _OPTIONAL),
    },
    "blocks": _BLOCKS,
    "diagonals": {"diagonal": _BLOCKS["diagonal"]},
    "functional": _FUNCTIONAL,
    "comparison": _COMPARISON,
    "champion": _CHAMPION,
    "saturation": {
        **_with_se("percentile", "layer quantile", "1", "activation percentile"),
        **_with_se("abs_percentile", "layer quantile", "1", "percentile of the absolute activation"),
        **_with_se("histogram", "layer bin", "1", "normalised histogram of activations (density)"),
        **_with_se("mean", "layer", "1", "mean activation"),
        **_with_se("std", "layer", "1", "standard deviation of activations"),
        **_with_se("saturated_share", "layer", "1", "fraction of activations within 0.05 of an asymptote"),
        **_with_se("saturation_measure", "layer", "1", "saturation measure (Rakitianskaia and Engelbrecht)"),
        "dead_units": _var("layer", "1", "number of units that are constant over the examples"),
        "n_units": _var("layer", "1", "number of units"),
        **_with_se(
            "unit_saturated_share",
            "layer unit",
            "1",
            "fraction of the unit's activations near an asymptote",
            _OPTIONAL,
        ),
        **_with_se("unit_saturation_measure", "layer unit", "1", "saturation measure of the unit", _OPTIONAL),
        "unit_dead": _var("layer unit", "1", "whether the unit is constant over the examples", _OPTIONAL),
    },
    "trajectory": {
        "plane": _var("checkpoint component", "1", "coordinate on the plane through the end points", _OPTIONAL),
        "pca": _var("checkpoint component", "1", "coordinate along the principal component", _OPTIONAL),
        "pca_end": _var("checkpoint component", "1", "coordinate along the component about the end point", _OPTIONAL),
        "random": _var("draw checkpoint component", "1", "coordinate on a random plane", _OPTIONAL),
        "explained_variance": _var("component", "1", "fraction of the variance explained", _OPTIONAL),
        "explained_variance_end": _var("component", "1", "fraction of squared distances from the end point", _OPTIONAL),
        "explained_variance_plane": _var("component", "1", "fraction of squared distances from the start", _OPTIONAL),
        "explained_variance_random": _var(
            "draw component", "1", "fraction of squared distances from the start", _OPTIONAL
        ),
        "plane_residual": _var("checkpoint", "1", "distance from the plane through the end points", _OPTIONAL),
        "distance_from_start": _var("checkpoint", "1", "Euclidean distance from the starting point"),
        "path_length": _var("checkpoint", "1", "length of the path through the saved checkpoints"),
        "distance_to_end": _var("checkpoint end", "1", "Euclidean distance from the end point"),
        "cosine": _var("checkpoint end", "1", "cosine similarity to the end point, from the origin"),
        "validation_error": _var("checkpoint", "1", "validation error", _OPTIONAL),
    },
    "barrier": {
        **_with_se("loss", "path split position", "nat", "loss"),
        **_with_se("error", "path split position", "1", "error", _OPTIONAL),
        **_with_se("excess", "path split position", "nat", "loss above linear interpolation between the ends"),
        **_with_se("barrier", "path split", "nat", "barrier of the loss"),
        "barrier_position": _var("path split", "1", "position of the barrier of the loss"),
        **_with_se("error_barrier", "path split", "1", "barrier of the error", _OPTIONAL),
        "distance": _var("path", "1", "Euclidean distance between the ends"),
        "length": _var("path", "1", "length of the path"),
    },
    "landscape": {
        **_with_se("loss", "split y x", "nat", "loss"),
        "error": _var("split y x", "1", "error", _OPTIONAL),
        "point_position": _var("point component", "1", "coordinates of the checkpoint"),
    },
    "learning_coefficient": {
        **_with_error("learning_coefficient", "1", "local learning coefficient"),
        "learning_coefficient_chain_se": _var("", "1", "standard error for the length of the chains"),
        "learning_coefficient_data_se": _var("", "1", "standard error for the choice of examples"),
        "learning_coefficient_batch_se": _var("", "1", "standard error for the noise of single batches", _OPTIONAL),
        **_with_interval("gaussian", "1", "coefficient of the second-order expansion of the loss"),
        "rhat": _var("", "1", "R-hat of the loss"),
        "distance_rhat": _var("", "1", "R-hat of the distance"),
        "effective_draws": _var("", "1", "effective number of draws of the loss"),
        "converged": _var("", "1", "whether the chains have converged (1) or not (0)"),
        **_with_se("stein_excess", "", "1", "relative excess of squared gradients over Stein's identity", _OPTIONAL),
        "excess": _var("chain draw", "loss", "loss above that of the checkpoint"),
        "distance": _var("chain draw", "1", "Euclidean distance from the checkpoint"),
        "influence": _var(
            "chain example", "1", "change of the coefficient with the weight of an example, by one chain", _OPTIONAL
        ),
        "second_influence": _var(
            "chain change example", "1", "change of the influence with a random change of all weights", _OPTIONAL
        ),
        "epsilon": _var("", "1", "step size"),
        "nbeta": _var("", "1 / loss", "number of examples times inverse temperature"),
        "burn_in": _var("", "1", "number of steps at the start that do not count"),
        "loss": _var("", "loss", "loss at the checkpoint"),
    },
    "curvature_monitor": {
        "lambda_max": _var("", "loss", "largest eigenvalue of the Hessian"),
        "lambda_max_se": _var("", "loss", "standard error of it for the choice of examples", _OPTIONAL),
        "eigenvalue": _var("pair", "loss", "eigenvalue of the Hessian"),
        "eigenvalue_se": _var("pair", "loss", "standard error of it for the choice of examples", _OPTIONAL),
        "residual": _var("pair", "loss", "residual norm of the eigenpair"),
        "preconditioned_lambda_max": _var("", "loss", "largest eigenvalue of the preconditioned Hessian", _OPTIONAL),
        "preconditioned_lambda_max_se": _var("", "loss", "standard error of it for the choice of examples", _OPTIONAL),
        "preconditioned_residual": _var("", "loss", "residual norm of its eigenpair", _OPTIONAL),
        "threshold": _var("", "loss", "largest eigenvalue at which steps are stable", _OPTIONAL),
        "learning_rate": _var("", "1", "learning rate", _OPTIONAL),
        **_with_se("trace", "", "loss", "trace of the Hessian", _OPTIONAL),
        "trace_probe_se": _var("", "loss", "standard error of the trace for the choice of probes", _OPTIONAL),
        "trace_data_se": _var("", "loss", "standard error of the trace for the choice of examples", _OPTIONAL),
        "batch_lambda_max": _var("batch", "loss", "largest eigenvalue of the Hessian of a single batch", _OPTIONAL),
        "critical_sharpness": _var("", "loss", "critical sharpness along the last step", _OPTIONAL),
        "critical_sharpness_low": _var("", "loss", "lower end of the interval that it is in", _OPTIONAL),
        "critical_sharpness_high": _var("", "loss", "upper end of the interval that it is in", _OPTIONAL),
        "critical_sharpness_se": _var("", "loss", "standard error of it for the choice of examples", _OPTIONAL),
        "loss": _var("", "loss", "loss"),
        "loss_se": _var("", "loss", "standard error of the loss for the choice of examples", _OPTIONAL),
        "gradient_norm": _var("", "loss", "norm of the gradient"),
        "gradient_norm_se": _var("", "loss", "standard error of it for the choice of examples", _OPTIONAL),
        **_with_se("gradient_noise_scale", "", "examples", "gradient noise scale", _OPTIONAL),
        "n_hvp": _var("", "1", "products of the measurement"),
        "n_parameters": _var("", "1", "parameters that are trained", _OPTIONAL),
        "seconds": _var("", "s", "time of the measurement"),
    },
    "sharpness": {
        **_with_se("loss", "", "nat", "loss"),
        **_with_se("rise", "neighbourhood", "nat", "largest rise of the loss found", _OPTIONAL),
        **_with_se("one_step", "neighbourhood", "nat", "rise of the loss after one step to the boundary", _OPTIONAL),
        "relative": _var("neighbourhood", "%", "largest rise of the loss found, relative to 1 + loss", _OPTIONAL),
        "rise_start": _var("neighbourhood start", "nat", "rise of the loss that each ascent found", _OPTIONAL),
        **_with_se(
            "rise_quadratic", "neighbourhood", "nat", "largest rise of its second-order expansion found", _OPTIONAL
        ),
        "radius": _var("neighbourhood", "1", "radius of the neighbourhood", _OPTIONAL),
        **_with_se("average", "neighbourhood", "nat", "mean rise of the loss", _OPTIONAL),
        "average_direction_se": _var(
            "neighbourhood", "nat", "standard error of the mean rise for the choice of directions", _OPTIONAL
        ),
        "average_data_se": _var(
            "neighbourhood", "nat", "standard error of the mean rise for the choice of examples", _OPTIONAL
        ),
        **_with_ends("average", "neighbourhood", "nat", "mean rise of the loss"),
        **_with_se("average_quadratic", "neighbourhood", "nat", "mean rise of its second-order expansion", _OPTIONAL),
        **{
            f"average_quadratic_{part}_se": _var(
                "neighbourhood",
                "nat",
                f"standard error of the mean rise of its second-order expansion for the choice of {what}",
                _OPTIONAL,
            )
            for part, what in (("direction", "directions"), ("data", "examples"))
        },
        "average_radius": _var("neighbourhood", "1", "radius of the average case", _OPTIONAL),
        **_with_se("relative_flatness", "", "nat", "relative flatness", _OPTIONAL),
        "relative_flatness_probe_se": _var(
            "", "nat", "standard error of the relative flatness for the choice of probes", _OPTIONAL
        ),
        "relative_flatness_data_se": _var(
            "", "nat", "standard error of the relative flatness for the choice of examples", _OPTIONAL
        ),
        **_with_ends("relative_flatness", "", "nat", "relative flatness"),
        "flatness_layer": _var("", "1", "layer of the relative flatness", _OPTIONAL),
    },
    "correlation": {
        **_with_se("tau", "", "1", "Kendall rank correlation (tau-b)"),
        **_with_ends("tau", "", "1", "Kendall rank correlation (tau-b)"),
        "tau_p": _var("", "1", "p-value of no correlation (adjusted by Holm's step-down)"),
        "tau_p_single": _var("", "1", "p-value of no correlation, by itself"),
        "tau_noise_se": _var("", "1", "part of the standard error from the errors of the numbers"),
        "tau_shift": _var("", "1", "change of the rank correlation if the numbers had their errors once more"),
        **_with_ends("psi", "", "1", "rank correlation among runs that differ in one setting"),
        "psi": _var("", "1", "rank correlation among runs that differ in one setting"),
        "psi_axis": _var("axis", "1", "rank correlation among runs that differ in this setting"),
        "information": _var("", "1", "conditional mutual information of signs, relative to the entropy"),
        "n_runs": _var("", "1", "number of runs"),
        "value": _var("run", "1", "diagnostic"),
        "value_se": _var("run", "1", "standard error of the diagnostic"),
        "target": _var("run", "1", "target"),
        "target_se": _var("run", "1", "standard error of the target"),
    },
    "gradients": {
        "inner_product": _var("layer epoch end", "1", "inner product with the end point over its squared norm"),
        "sign": _var("layer epoch end", "1", "sign of the inner product"),
        "last_flip": _var("layer end", "1", "epoch after which the sign no longer changes"),
        "constant_norm": _var("layer", "loss", "norm of the constant part of the gradient of the penalty"),
        "fluctuation_norm": _var("layer epoch", "loss", "norm of the fluctuating part of the gradient of the penalty"),
        "loss_gradient_norm": _var("layer epoch", "loss", "norm of the gradient of the loss"),
        "half_difference": _var("layer", "loss", "norm of the difference between the two halves of the window"),
        "half_difference_se": _var("layer", "loss", "size of that difference expected for independent fluctuations"),
    },
    "end_points": {
        "error": _var("iteration split", "1", "error"),
        "nll": _var("iteration split", "nat", "negative log likelihood"),
        "ensemble_error": _var("iteration split", "1", "error of the average of this and earlier iterations"),
        "ensemble_nll": _var("iteration split", "nat", "negative log likelihood of that average"),
        "disagreement": _var("iteration other", "1", "fraction of test examples classified differently"),
        "distance": _var("iteration other", "1", "Euclidean distance between parameters"),
        "relative_distance": _var("iteration other", "1", "distance relative to the norm of the other"),
        "cosine": _var("iteration other", "1", "cosine of the angle between parameters"),
        "distance_from_start": _var("iteration", "1", "Euclidean distance from the start"),
        "norm": _var("iteration", "1", "Euclidean norm of the parameters"),
    },
    "descent": {
        "path": _var("iteration step component", "1", "position"),
        "value": _var("iteration step", "1", "value of the unpenalised surface along the path"),
        "end": _var("iteration component", "1", "end point"),
        "end_value": _var("iteration", "1", "value of the unpenalised surface at the end point"),
        "champion": _var("", "1", "iteration with the lowest end value"),
    },
    "surface": {
        "value": _var("iteration y x", "1", "value of the (penalised) surface"),
    },
    "basin": {
        "basin": _var("y x", "1", "well in which the start ends (-1 for none)"),
        "minimum": _var("well component", "1", "position of the well"),
        "minimum_value": _var("well", "1", "value of the surface at the bottom of the well"),
        "share": _var("well", "1", "fraction of the starts that end in the well"),
    },
    "ensemble": {
        "loss": _var("member step", "1", "mean squared error", _OPTIONAL),
        "final_loss": _var("member", "1", "mean squared error at the end"),
        "parameters": _var("member parameter", "1", "parameters at the end", _OPTIONAL),
        "prediction": _var("member x", "1", "output of the trained network", _OPTIONAL),
        "champion": _var("member", "1", "iteration with the lowest final loss", _OPTIONAL),
        "champion_loss": _var("member", "1", "lowest final mean squared error of all iterations", _OPTIONAL),
        "data_x": _var("point", "1", "input", _OPTIONAL),
        "data_y": _var("point", "1", "target", _OPTIONAL),
    },
    "escape": {
        "probability": _var("strategy iteration", "1", "fraction of starts that have left the plateau"),
        "probability_low": _var("strategy iteration", "1", "lower end of the interval of the fraction"),
        "probability_high": _var("strategy iteration", "1", "upper end of the interval of the fraction"),
        "best_loss": _var("strategy iteration", "1", "median over starts of the lowest loss so far"),
        "n_starts": _var("strategy", "1", "number of starts"),
    },
}
