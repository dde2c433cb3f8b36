"""Multimodal data sets: arrays with masks, readers and simulated missingness.

A `MultimodalDataset` holds one array per modality, a mask that says in which rows it was observed,
and labels that no model sees. Readers return a (train, test) pair of them.
"""

from mmzoo.data.dataset import MultimodalDataset
from mmzoo.data.missing import (
    label_dependent,
    missing_completely_at_random,
    paired_fraction,
)
from mmzoo.data.readers import (
    DATASETS,
    DatasetInfo,
    digits,
    fashion_mnist,
    from_numpy,
    from_pandas,
    from_xarray,
    load,
    mnist,
    nan_rows_to_masks,
)

__all__ = [
    "DATASETS",
    "DatasetInfo",
    "MultimodalDataset",
    "digits",
    "fashion_mnist",
    "from_numpy",
    "from_pandas",
    "from_xarray",
    "label_dependent",
    "load",
    "missing_completely_at_random",
    "mnist",
    "nan_rows_to_masks",
    "paired_fraction",
]
