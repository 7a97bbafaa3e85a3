"""Omniglot: handwritten characters of many alphabets, each drawn once by 20 people.

Origin: B. Lake, R. Salakhutdinov, J. Tenenbaum, "Human-level concept learning through probabilistic program induction" (Science, 2015),
the image archives of github.com/brendenlake/omniglot (images_background.zip, images_evaluation.zip, images_background_small1.zip, ...).
Licence: MIT.

A class is a character of an alphabet, and `path` may name several archives. The drawings of the last `test_drawers` of the 20 people
are the test set. The groupings `alphabet` and `drawer` say whose a drawing is. Drawings are 105 x 105 pixels, scaled to `size`, one
channel, ink black (0) on white (255) as in the files. Some archives share alphabets: what lies in two of them counts once.
"""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from streamcl.data_files import locate
from streamcl.errors import ConfigError, DataError
from streamcl.options import NonNegativeInt, PositiveInt
from streamcl.stream import SourceData

from ._listed import Listed, ListedSource, Refused, numbered

DRAWERS = 20
_DRAWING = re.compile(r"(?:.*/)?([^/]+)/(character\d+)/(\d+)_(\d+)\.png")


class Omniglot(ListedSource):
    """`path` is an official archive, a folder that holds what one unpacks to, or a list of these.

    A drawing that does not decode is an error, or left out and counted (`on_error: skip`).
    """

    licence = "MIT"

    def __init__(
        self,
        *,
        path: Path | list[Path],
        size: PositiveInt = 28,
        test_drawers: NonNegativeInt = 5,
        on_error: Literal["fail", "skip"] = "fail",
    ) -> None:
        super().__init__(on_error=on_error)
        if test_drawers >= DRAWERS:
            raise ConfigError(
                f"omniglot: test_drawers is {test_drawers}, and there are {DRAWERS} drawers: at least one is needed for training"
            )
        self.paths = path if isinstance(path, list) else [path]
        self.side, self.test_drawers = size, test_drawers

    def files(self) -> list[str]:
        return [str(locate(path)) for path in self.paths]

    def load(self) -> SourceData:
        refused = Refused(self.on_error)
        drawings: dict[tuple[str, str, int], np.ndarray] = {}
        for path in self.paths:
            place = locate(path)
            found = False
            for name, data in _members(place):
                match = _DRAWING.fullmatch(name)
                if match is None:
                    refused.add("file of another kind", f"{place}: {name} is no ALPHABET/characterNN/NNNN_NN.png")
                    continue
                alphabet, character, _, drawer = match.groups()
                if not 1 <= int(drawer) <= DRAWERS:
                    refused.add("file of another kind", f"{place}: {name} is by drawer {drawer}, and there are {DRAWERS}")
                    continue
                found, key = True, (alphabet, character, int(drawer))
                if key in drawings:
                    continue
                try:
                    drawings[key] = self._pixels(data)
                except Exception as error:  # broken bytes make Pillow raise nearly anything
                    refused.add("image that does not decode", f"{place}: {name} is no image that can be read: {error}")
            if not found:
                raise DataError(f"{place}: there is no drawing (ALPHABET/characterNN/NNNN_NN.png) in it")
        keys = sorted(drawings)
        alphabets = sorted({alphabet for alphabet, _, _ in keys})
        names = sorted({(alphabet, character) for alphabet, character, _ in keys})
        number = {name: position for position, name in enumerate(names)}
        images = torch.from_numpy(np.stack([drawings[key] for key in keys]) if keys else np.zeros((0, 1, self.side, self.side), np.uint8))
        drawer = numbered([d for _, _, d in keys]) - 1
        everything = Listed(
            {"image": images},
            numbered([number[alphabet, character] for alphabet, character, _ in keys]),
            {"alphabet": numbered([alphabets.index(alphabet) for alphabet, _, _ in keys]), "drawer": drawer},
        )
        held = drawer >= DRAWERS - self.test_drawers
        return self.assemble(
            everything.take((~held).nonzero().squeeze(1)),
            everything.take(held.nonzero().squeeze(1)) if self.test_drawers else None,
            [f"{alphabet}/{character}" for alphabet, character in names],
            refused,
            group_names={"alphabet": alphabets, "drawer": [str(d) for d in range(1, DRAWERS + 1)]},
        )

    def _pixels(self, data: bytes) -> np.ndarray:
        from PIL import Image

        image = Image.open(io.BytesIO(data)).convert("L")
        if image.size != (self.side, self.side):
            image = image.resize((self.side, self.side), Image.Resampling.BICUBIC)
        return np.asarray(image)[None]


def _members(place: Path) -> list[tuple[str, bytes]]:
    """The files of an archive or folder by name; hidden ones are left out."""
    if place.is_dir():
        files = sorted(file for file in place.rglob("*") if file.is_file())
        return [(file.relative_to(place).as_posix(), file.read_bytes()) for file in files if not file.name.startswith(".")]
    try:
        with zipfile.ZipFile(place) as archive:
            names = sorted(name for name in archive.namelist() if not name.endswith("/") and "__MACOSX" not in name)
            return [(name, archive.read(name)) for name in names if not name.rpartition("/")[2].startswith(".")]
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise DataError(f"{place}: this is no zip archive that can be read: {error}") from None
