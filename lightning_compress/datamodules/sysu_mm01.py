"""SYSU-MM01: persons before four visible and two infrared cameras, in the layout in which it is handed out."""

from __future__ import annotations

import re
from typing import Any, Literal

from lightning_compress.datamodules._identities import ReIDFolder, Shots
from lightning_compress.datamodules._images import absent
from lightning_compress.metrics import CrossCameraRetrieval

LAYOUT = "cam1 ... cam6/<identity, four digits>/*.jpg with exp/{train_id,val_id,test_id}.txt"
INFRARED = (3, 6)
GALLERY = {"all": (1, 2, 4, 5), "indoor": (1, 2)}


class SYSUMM01(ReIDFolder):
    """Wu, Zheng, Yu, Gong, Lai, "RGB-Infrared Cross-Modality Person Re-Identification", ICCV 2017.

    Persons seen by the infrared cameras 3 and 6 are looked for among images of the visible ones. ``root`` is laid out
    as the authors hand it out::

        cam1/0001/0001.jpg, ..., cam6/0533/0020.jpg
        exp/train_id.txt, exp/val_id.txt, exp/test_id.txt       numbers, separated by commas

    395 identities to train on (296 without those of ``val_id.txt``), 96 to test on. The data are given to researchers
    on request.

    Args:
        root: folder that holds the data.
        mode: ``"all"`` searches cameras 1, 2, 4 and 5, ``"indoor"`` 1 and 2.
        train_on_val: whether to train on the identities of ``val_id.txt`` too, as papers do. Then those to test on are
            also validated on: choose nothing by the validation score.
        size: height and width of the images that the network sees.
        batch_size: training images per step and process; the default is the paper's (arXiv:2104.02862).
        kwargs: see `TwoViewDigits`.
    """

    def __init__(
        self,
        root: str = "data/SYSU-MM01",
        *,
        mode: Literal["all", "indoor"] = "all",
        train_on_val: bool = True,
        size: tuple[int, int] = (256, 128),
        batch_size: int = 128,
        **kwargs: Any,
    ) -> None:
        if mode not in GALLERY:
            raise ValueError(f"mode: expected 'all' or 'indoor', got {mode!r}.")
        super().__init__(root, size=size, batch_size=batch_size, **kwargs)
        self.mode = mode
        self.train_on_val = train_on_val

    def training_shots(self) -> Shots:
        names = ("train", "val") if self.train_on_val else ("train",)
        return self._shots([identity for name in names for identity in self._identities(name)], range(1, 7))

    def matching_shots(self, split: Literal["val", "test"]) -> tuple[Shots, Shots]:
        identities = self._identities("val" if split == "val" and not self.train_on_val else "test")
        return self._shots(identities, INFRARED), self._shots(identities, GALLERY[self.mode])

    def retrieval(self) -> CrossCameraRetrieval:
        return CrossCameraRetrieval.sysu_mm01(self.mode)

    def _identities(self, name: str) -> list[int]:
        file = self.root / "exp" / f"{name}_id.txt"
        if not file.is_file():
            raise absent(type(self).__name__, self.root, [LAYOUT])
        return sorted(map(int, re.findall(r"\d+", file.read_text())))

    def _shots(self, identities: list[int], cameras: Any) -> Shots:
        found = [
            (str(path), identity, camera, camera in INFRARED)
            for identity in identities
            for camera in cameras
            for path in sorted((self.root / f"cam{camera}" / f"{identity:04d}").glob("*.jpg"))
        ]
        if not found:
            raise absent(type(self).__name__, self.root, [LAYOUT])
        return Shots.of(found)
