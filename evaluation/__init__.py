"""Likelihoods, diagnostics, ArviZ export, tables, pictures and the report."""
