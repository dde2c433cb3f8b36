"""Likelihoods, diagnostics, ArviZ export, tables, pictures, the report."""

from mmzoo.evaluation.amortization import amortization_gap
from mmzoo.evaluation.annealed import annealed_log_likelihood, bidirectional
from mmzoo.evaluation.arviz_checks import compare_models, conditional_loo, elpd_data, pit
from mmzoo.evaluation.calibration import calibration_ecdf, coverage, simulation_based_calibration
from mmzoo.evaluation.checks import check_model, default_classifiers
from mmzoo.evaluation.classifiers import train_classifier
from mmzoo.evaluation.coherence import coherence, joint_coherence
from mmzoo.evaluation.datatree import load_datatree, save_datatree, to_datatree
from mmzoo.evaluation.figures_checks import (
    plot_calibration,
    plot_coherence,
    plot_coverage,
    plot_differences,
    plot_likelihood_curve,
    plot_pareto_k,
    plot_pit,
    plot_weights,
)
from mmzoo.evaluation.figures_latents import plot_contraction, plot_cross_generation, plot_traversal
from mmzoo.evaluation.figures_likelihood import plot_likelihood_table
from mmzoo.evaluation.figures_planes import plot_latent_plane
from mmzoo.evaluation.figures_samples import plot_reconstructions, plot_samples
from mmzoo.evaluation.figures_training import plot_history, training_figure
from mmzoo.evaluation.generation import frechet_distance, reconstruction, ssim, torchvision_features
from mmzoo.evaluation.information import information_table, synergy_table, two_proposal_table
from mmzoo.evaluation.likelihood import (
    all_quantities,
    likelihood_curve,
    likelihood_table,
    log_likelihood,
    quantity_name,
)
from mmzoo.evaluation.pair import Pair, PyroPair, draw_latents
from mmzoo.evaluation.pareto import WeightSummary, pareto_k
from mmzoo.evaluation.posterior import (
    active_units,
    contraction,
    kl_per_dimension,
    modality_shares,
    posterior_agreement,
)
from mmzoo.evaluation.probes import clustering, linear_probe
from mmzoo.evaluation.reference import compare_with_reference, nuts_posterior
from mmzoo.evaluation.report import write_report
from mmzoo.evaluation.retrieval import retrieval
from mmzoo.evaluation.sweeps import missingness_sweep
from mmzoo.evaluation.tables import (
    aggregate_seeds,
    paired_differences,
    to_csv,
    to_latex,
    to_markdown,
    to_pandas,
)

__all__ = [
    "Pair",
    "PyroPair",
    "WeightSummary",
    "active_units",
    "aggregate_seeds",
    "all_quantities",
    "amortization_gap",
    "annealed_log_likelihood",
    "bidirectional",
    "calibration_ecdf",
    "check_model",
    "clustering",
    "coherence",
    "compare_models",
    "compare_with_reference",
    "conditional_loo",
    "contraction",
    "coverage",
    "default_classifiers",
    "draw_latents",
    "elpd_data",
    "frechet_distance",
    "information_table",
    "joint_coherence",
    "kl_per_dimension",
    "likelihood_curve",
    "likelihood_table",
    "linear_probe",
    "load_datatree",
    "log_likelihood",
    "missingness_sweep",
    "modality_shares",
    "nuts_posterior",
    "paired_differences",
    "pareto_k",
    "pit",
    "plot_calibration",
    "plot_coherence",
    "plot_contraction",
    "plot_coverage",
    "plot_cross_generation",
    "plot_differences",
    "plot_history",
    "plot_latent_plane",
    "plot_likelihood_curve",
    "plot_likelihood_table",
    "plot_pareto_k",
    "plot_pit",
    "plot_reconstructions",
    "plot_samples",
    "plot_traversal",
    "plot_weights",
    "posterior_agreement",
    "quantity_name",
    "reconstruction",
    "retrieval",
    "save_datatree",
    "simulation_based_calibration",
    "ssim",
    "synergy_table",
    "to_csv",
    "to_datatree",
    "to_latex",
    "to_markdown",
    "to_pandas",
    "torchvision_features",
    "train_classifier",
    "training_figure",
    "two_proposal_table",
    "write_report",
]
