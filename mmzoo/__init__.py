"""A zoo of multimodal variational autoencoders as probabilistic programs in Pyro.

A model is built from modalities, takes any subset of them, and generates all of them:

>>> import torch
>>> from mmzoo import Modality
>>> from mmzoo.models import MVAE
>>> image = Modality("image", event_shape=(1, 28, 28), likelihood="bernoulli")
>>> label = Modality("label", event_shape=(10,), likelihood="one_hot_categorical")
>>> vae = MVAE([image, label], latent_dim=8)
>>> x = {"label": torch.eye(10)}
>>> vae.generate(x, num_samples=3)["image"].shape
torch.Size([3, 10, 1, 28, 28])

The models stand in `mmzoo.models`, training in `mmzoo.inference`, likelihoods, tables and pictures
in `mmzoo.evaluation`, data sets in `mmzoo.data`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmzoo.data import MultimodalDataset
    from mmzoo.modality import Modality
    from mmzoo.vae import MultimodalVAE

__all__ = ["Modality", "MultimodalDataset", "MultimodalVAE", "__version__"]

__version__ = "0.1.0"

# Resolved on first use: `mmzoo --help` need not wait for torch.
_PLACES = {
    "Modality": "mmzoo.modality",
    "MultimodalDataset": "mmzoo.data",
    "MultimodalVAE": "mmzoo.vae",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'mmzoo' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
