"""RegDB: persons before a visible and a thermal camera side by side, in the layout in which it is handed out."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_compress.datamodules._identities import ReIDFolder, Shots
from lightning_compress.datamodules._images import absent
from lightning_compress.metrics import CrossCameraRetrieval

LAYOUT = "Visible/ and Thermal/ with idx/{train,test}_{visible,thermal}_<trial>.txt, lines of '<path> <identity>'"
CAMERAS = {"visible": 1, "thermal": 2}


class RegDB(ReIDFolder):
    """Nguyen, Hong, Kim, Park, "Person Recognition System Based on a Combination of Body Images from Visible Light and
    Thermal Cameras", Sensors 17(3), 2017.

    412 persons with ten visible and ten thermal images each; half of them to train on, half to test on, in ten ways to
    halve them, the trials. ``root`` is laid out as usual::

        Visible/1/male_back_v_00001_1.bmp, ..., Thermal/1/male_back_t_00001_1.bmp, ...
        idx/train_visible_1.txt, ...        lines such as "Visible/1/male_back_v_00001_1.bmp 0"

    Papers train a network for each trial and report the mean. Validation is on the images to test on: choose nothing
    by its score.

    Args:
        root: folder that holds the data.
        trial: 1 to 10.
        query: whose images are looked for among the others: ``"visible"`` or ``"thermal"``.
        size: height and width of the images that the network sees.
        kwargs: see `TwoViewDigits`.
    """

    def __init__(
        self,
        root: str = "data/RegDB",
        *,
        trial: int = 1,
        query: Literal["visible", "thermal"] = "visible",
        size: tuple[int, int] = (256, 128),
        **kwargs: Any,
    ) -> None:
        if not 1 <= trial <= 10:
            raise ValueError(f"trial: expected 1 to 10, got {trial}.")
        if query not in CAMERAS:
            raise ValueError(f"query: expected 'visible' or 'thermal', got {query!r}.")
        super().__init__(root, size=size, **kwargs)
        self.trial = trial
        self.query = query

    def training_shots(self) -> Shots:
        return self._shots("train", *CAMERAS)

    def matching_shots(self, split: Literal["val", "test"]) -> tuple[Shots, Shots]:
        other = next(kind for kind in CAMERAS if kind != self.query)
        return self._shots("test", self.query), self._shots("test", other)

    def retrieval(self) -> CrossCameraRetrieval:
        return CrossCameraRetrieval.regdb()

    def _shots(self, split: str, *kinds: str) -> Shots:
        rows = []
        for kind in kinds:
            file = self.root / "idx" / f"{split}_{kind}_{self.trial}.txt"
            if not file.is_file():
                raise absent(type(self).__name__, self.root, [LAYOUT])
            for line in filter(str.strip, file.read_text().splitlines()):
                path, _, identity = line.strip().rpartition(" ")
                if not (path and identity.isdigit()):
                    raise MisconfigurationException(f"{file}: expected lines of '<path> <identity>', got {line!r}.")
                rows.append((str(self.root / path), int(identity), CAMERAS[kind], kind == "thermal"))
        return Shots.of(rows)
