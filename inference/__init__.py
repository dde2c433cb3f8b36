"""Objectives, alignment terms, gradient estimators and the training loop."""
