"""A zoo of multimodal variational autoencoders as probabilistic programs in Pyro."""

__version__ = "0.1.0"
