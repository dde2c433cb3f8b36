"""Likelihoods, diagnostics, ArviZ export, tables, pictures, the report."""

from mmzoo.evaluation.datatree import load_datatree, save_datatree, to_datatree
from mmzoo.evaluation.likelihood import likelihood_table, log_likelihood, quantity_name
from mmzoo.evaluation.pareto import WeightSummary, pareto_k

__all__ = [
    "WeightSummary",
    "likelihood_table",
    "load_datatree",
    "log_likelihood",
    "pareto_k",
    "quantity_name",
    "save_datatree",
    "to_datatree",
]
