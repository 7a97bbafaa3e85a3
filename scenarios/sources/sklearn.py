"""scikit-learn's other built-in classification sets: `sklearn:iris`, `sklearn:wine`, `sklearn:breast_cancer`.

They ship inside scikit-learn and come from the UCI repository (Iris: R. A. Fisher, 1936; Wine: M. Forina et al., 1991; Breast Cancer
Wisconsin, Diagnostic: W. Wolberg et al., 1995). Licence: CC BY 4.0. A stratified part is the test set; the features are standardised
with the means and deviations of the training part.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from streamcl.options import Fraction, NonNegativeInt
from streamcl.stream import Modality, Source, SourceData

from ._splits import split_columns


class Sklearn(Source):
    """`test_fraction` of every class is the test set, drawn with `split_seed`."""

    licence = "CC BY 4.0"
    class_count: ClassVar = {"iris": 3, "wine": 3, "breast_cancer": 2}

    def __init__(
        self, *, set: Literal["iris", "wine", "breast_cancer"], test_fraction: Fraction = 0.3, split_seed: NonNegativeInt = 0
    ) -> None:
        self.set, self.test_fraction, self.split_seed = set, test_fraction, split_seed

    def load(self) -> SourceData:
        from sklearn import datasets

        bunch = getattr(datasets, f"load_{self.set}")()
        features = torch.from_numpy(bunch.data)  # float64 (samples, features)
        train, test = split_columns({"vector": features}, torch.from_numpy(bunch.target).long(), self.test_fraction, self.split_seed)
        kept = train.inputs["vector"]
        assert isinstance(kept, Tensor)
        deviation, mean = torch.std_mean(kept, dim=0, correction=0)
        for part in (train, test):
            if part is not None:
                part.inputs["vector"] = ((part.inputs["vector"] - mean) / deviation).float()  # type: ignore[operator]
        names = [str(name) for name in bunch.target_names]
        return SourceData(train, test, names, {"vector": Modality("vector", (features.shape[1],))}, licence=self.licence)
