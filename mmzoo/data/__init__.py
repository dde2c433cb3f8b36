"""Multimodal data sets: arrays with masks, readers and missingness."""
