"""Likelihoods, diagnostics, ArviZ export, tables, pictures, the report."""

from mmzoo.evaluation.datatree import load_datatree, save_datatree, to_datatree
from mmzoo.evaluation.figures import (
    plot_history,
    plot_latent_plane,
    plot_likelihood_table,
    plot_reconstructions,
    plot_samples,
    training_figure,
)
from mmzoo.evaluation.likelihood import likelihood_table, log_likelihood, quantity_name
from mmzoo.evaluation.pair import PyroPair, draw_latents
from mmzoo.evaluation.pareto import WeightSummary, pareto_k
from mmzoo.evaluation.report import write_report

__all__ = [
    "PyroPair",
    "WeightSummary",
    "draw_latents",
    "likelihood_table",
    "load_datatree",
    "log_likelihood",
    "pareto_k",
    "plot_history",
    "plot_latent_plane",
    "plot_likelihood_table",
    "plot_reconstructions",
    "plot_samples",
    "quantity_name",
    "save_datatree",
    "to_datatree",
    "training_figure",
    "write_report",
]
