"""Handwritten digits: 1,797 grey images of 8 x 8 pixels in 10 classes, shipped inside scikit-learn.

Origin: the test part of the "Optical Recognition of Handwritten Digits" set of the UCI repository (E. Alpaydin, C. Kaynak, 1998).
Licence: CC BY 4.0. Pixels are whole numbers from 0 to 16. A stratified part is the test set.
"""

from __future__ import annotations

import torch

from streamcl.options import Fraction, NonNegativeInt
from streamcl.stream import Modality, Source, SourceData

from ._splits import split_columns


class Digits(Source):
    """`test_fraction` of every class is the test set, drawn with `split_seed`."""

    licence = "CC BY 4.0"
    class_count = 10

    def __init__(self, *, test_fraction: Fraction = 0.3, split_seed: NonNegativeInt = 0) -> None:
        self.test_fraction, self.split_seed = test_fraction, split_seed

    def load(self) -> SourceData:
        from sklearn.datasets import load_digits

        pixels, targets = load_digits(return_X_y=True)
        images = torch.from_numpy(pixels).to(torch.uint8).reshape(-1, 1, 8, 8)
        train, test = split_columns({"image": images}, torch.from_numpy(targets).long(), self.test_fraction, self.split_seed)
        modality = Modality(kind="image", shape=(1, 8, 8), high=16)
        return SourceData(train, test, [str(digit) for digit in range(10)], {"image": modality}, licence=self.licence)
