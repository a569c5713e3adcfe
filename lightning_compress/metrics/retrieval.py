"""Finding a person again in another camera: CMC (rank-k), mAP and mINP, with the protocols of SYSU-MM01 and RegDB.

A probe ranks the gallery by the cosine of their features. Of its matches, the k-th at rank r_k, there are n:

    CMC(k)  share of probes with a match among the first k
    AP      1/n sum_k k / r_k                                 mAP: its mean over probes
    INP     n / r_n                                           mINP: how soon the last match is found

The inverse negative penalty is that of Ye et al., "Deep Learning for Person Re-identification: A Survey and Outlook",
IEEE TPAMI 2021, arXiv:2001.04193. Probes without any match in their gallery do not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

# Camera -> where it hangs, as the folders cam1 ... cam6 of SYSU-MM01 are counted: 2 and 3 see the same room.
SYSU_PLACES = {1: 1, 2: 2, 3: 2, 4: 4, 5: 5, 6: 6}
SYSU_GALLERY = {"all": (1, 2, 4, 5), "indoor": (1, 2)}  # its visible cameras
SYSU_PROBES = (3, 6)  # its infrared ones

_CHUNK = 1024  # probes that are ranked at once
_FIELDS = ("features", "identities", "cameras", "query", "index")  # what is kept of an image


class Ranking(NamedTuple):
    """What each probe that has a match makes of its gallery: (Q',) each.

    Attributes:
        first: rank of the first match, from 1.
        average_precision: see above.
        inverse_negative_penalty: see above.
    """

    first: Tensor
    average_precision: Tensor
    inverse_negative_penalty: Tensor


def rank_gallery(
    similarity: Tensor,
    matches: Tensor,
    identities: Tensor,
    allowed: Tensor | None = None,
    *,
    unique_identities: bool = False,
) -> Ranking:
    """Rank the gallery for each probe; of equally similar images the one that comes first.

    Args:
        similarity: (Q, G).
        matches: (Q, G), bool, whether they show the same.
        identities: (G,), of the gallery.
        allowed: (Q, G), bool; a probe's gallery is what is allowed. None: all.
        unique_identities: count in `first` each identity once, where it comes first, as SYSU-MM01 does. Precisions
            count all images either way.

    >>> images = torch.tensor([[0.9, 0.8, 0.7, 0.1]])  # of identities 5, 5, 3 and 3, for a probe of identity 3
    >>> identities = torch.tensor([5, 5, 3, 3])
    >>> ranking = rank_gallery(images, identities[None] == 3, identities)
    >>> ranking.first, ranking.average_precision, ranking.inverse_negative_penalty
    (tensor([3]), tensor([0.4167]), tensor([0.5000]))
    >>> rank_gallery(images, identities[None] == 3, identities, unique_identities=True).first
    tensor([2])
    """
    if allowed is not None:
        matches = matches & allowed
        similarity = similarity.masked_fill(~allowed, -torch.inf)  # behind all others, where they change no rank
    some = matches.any(1)
    similarity, matches = similarity[some], matches[some]
    order = similarity.argsort(dim=1, descending=True, stable=True)
    hits = matches.gather(1, order)
    rank = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    count = hits.sum(1)
    precision = hits.cumsum(1) / rank
    average = torch.where(hits, precision, 0.0).sum(1) / count
    last = torch.where(hits, rank, 0).amax(1)
    if unique_identities:
        group = identities.unique(return_inverse=True)[1]
        place = torch.empty_like(order).scatter_(1, order, rank.expand_as(order))
        nearest = place.new_full((len(place), int(group.max()) + 1), hits.shape[1] + 1)
        nearest.scatter_reduce_(1, group.expand_as(place), place, "amin")
        own = torch.where(matches, place, hits.shape[1] + 1).amin(1, keepdim=True)
        first = 1 + (nearest < own).sum(1)
    else:
        first = 1 + hits.int().argmax(1)
    return Ranking(first, average, count / last)


class CrossCameraRetrieval(Metric):
    """Rank-k, mAP and mINP of features that shall find an identity again in other cameras.

    Give every batch of probes and of the gallery to `update`; `compute` returns ``{"rank1": ..., "mAP": ...,
    "mINP": ...}``, shares in [0, 1], NaN while there is no probe with a match. :meth:`sysu_mm01` and :meth:`regdb` are
    the protocols of these data sets.

    Args:
        ranks: the k of CMC.
        gallery_cameras: images of other cameras are left out of the gallery; None keeps all.
        places: camera -> where it hangs; a probe's gallery has no image from its own place. Cameras that are not named
            hang apart. None keeps all.
        unique_identities: see `rank_gallery`.
        shots: how many images of each identity and camera are drawn for the gallery; None takes all.
        trials: how many galleries are drawn and averaged over.
        seed: of the draws.
        galleries: indices of the images in the gallery of each trial, instead of drawing.
        kwargs: see `torchmetrics.Metric`.

    With several processes images are put together. Where a sampler repeats some to make shares equal, give `index`: an
    image counts once, and draws do not depend on which process had seen it.

    Raises:
        ValueError: an argument out of range.

    >>> metric = CrossCameraRetrieval(ranks=(1, 2))
    >>> metric.update(torch.eye(2), torch.tensor([7, 8]), torch.tensor([1, 1]), query=False)
    >>> metric.update(torch.tensor([[0.0, 1.0], [0.2, 0.1]]), torch.tensor([7, 7]), torch.tensor([2, 2]), query=True)
    >>> {name: value.item() for name, value in metric.compute().items()}
    {'rank1': 0.5, 'rank2': 1.0, 'mAP': 0.75, 'mINP': 0.75}
    """

    higher_is_better = True
    full_state_update = False
    features: list[Tensor]
    identities: list[Tensor]
    cameras: list[Tensor]
    query: list[Tensor]
    index: list[Tensor]

    def __init__(
        self,
        ranks: Sequence[int] = (1, 10, 20),
        *,
        gallery_cameras: Sequence[int] | None = None,
        places: Mapping[int, int] | None = None,
        unique_identities: bool = False,
        shots: int | None = None,
        trials: int = 1,
        seed: int = 0,
        galleries: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for argument, values in (("ranks", ranks), ("shots", [shots or 1]), ("trials", [trials])):
            if not values or min(values) < 1:
                raise ValueError(f"{argument}: expected numbers from 1, got {values}.")
        if galleries is not None and (shots is not None or not galleries):
            raise ValueError(f"galleries: expected one list of indices for each trial, and no shots={shots}.")
        self.ranks = tuple(ranks)
        self.gallery_cameras = None if gallery_cameras is None else tuple(gallery_cameras)
        self.places = None if places is None else dict(places)
        self.unique_identities = unique_identities
        self.shots, self.trials, self.seed = shots, trials, seed
        self.galleries = galleries
        for name in _FIELDS:
            self.add_state(name, [], dist_reduce_fx="cat")

    @classmethod
    def sysu_mm01(
        cls, mode: Literal["all", "indoor"] = "all", shots: int = 1, trials: int = 10, **kwargs: Any
    ) -> CrossCameraRetrieval:
        """Wu et al., "RGB-Infrared Cross-Modality Person Re-Identification", ICCV 2017, 4.3.

        Infrared images of cameras 3 and 6 look for persons in visible ones of 1, 2, 4, 5 (indoor: 1, 2), from which
        one image (or ten, the multi-shot protocol) of each person and camera is drawn, ten times. Cameras are counted
        from 1, as the folders are.

        Args:
            mode: the search.
            shots: images of each person and camera in the gallery.
            trials: draws.
            kwargs: see the class. The published draws can be given as `galleries`, with `shots` None.
        """
        if mode not in SYSU_GALLERY:
            raise ValueError(f"mode: expected {' or '.join(map(repr, SYSU_GALLERY))}, got {mode!r}.")
        given: dict[str, Any] = {"shots": shots, "trials": trials}
        if "galleries" in kwargs:
            given = {}
        return cls(gallery_cameras=SYSU_GALLERY[mode], places=SYSU_PLACES, unique_identities=True, **given, **kwargs)

    @classmethod
    def regdb(cls, **kwargs: Any) -> CrossCameraRetrieval:
        """Images of one camera look for persons in all images of the other; every image has a rank of its own.

        Nguyen et al., "Person Recognition System Based on a Combination of Body Images from Visible Light and Thermal
        Cameras", Sensors 17(3), 2017. Published figures are means over ten splits, each with a model of its own.
        """
        return cls(**kwargs)

    def update(
        self,
        features: Tensor,
        identities: Tensor,
        cameras: Tensor,
        query: Tensor | bool,
        index: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            features: (N, D); only their direction counts.
            identities: (N,), integers.
            cameras: (N,), integers.
            query: whether these are probes: (N,), or one for all.
            index: (N,), which image of the data set each is. Probes and gallery are counted apart. None: as they come.
        """
        self.features.append(F.normalize(features.detach().float(), dim=1))
        self.identities.append(identities)
        self.cameras.append(cameras)
        self.query.append(torch.as_tensor(query, device=features.device).expand(len(features)).clone())
        self.index.append(torch.full_like(identities, -1) if index is None else index)

    def compute(self) -> dict[str, Tensor]:
        names = [*(f"rank{k}" for k in self.ranks), "mAP", "mINP"]
        nothing = dict.fromkeys(names, torch.tensor(torch.nan, device=self.device))
        if not len(self.features):  # a list, or a tensor once processes have put theirs together
            return nothing
        images = _Images(*(dim_zero_cat(getattr(self, name)) for name in _FIELDS)).once_each()
        probes, gallery = images.where(images.query), images.where(~images.query)
        if self.gallery_cameras is not None:
            wanted = torch.tensor(self.gallery_cameras, device=gallery.cameras.device)
            gallery = gallery.where(torch.isin(gallery.cameras, wanted))
        if not (len(probes.query) and len(gallery.query)):
            return nothing
        trials = [self._scores(probes, gallery.where(chosen)) for chosen in self._trials(gallery)]
        return dict(zip(names, torch.stack(trials).mean(0), strict=True))

    def _scores(self, probes: _Images, gallery: _Images) -> Tensor:
        """Every score for one gallery."""
        parts = [
            self._rank(probes.where(chunk), gallery)
            for chunk in torch.arange(len(probes.query), device=probes.query.device).split(_CHUNK)
        ]
        first, average, penalty = (torch.cat(part) for part in zip(*parts, strict=True))
        return torch.stack([*((first <= k).float().mean() for k in self.ranks), average.mean(), penalty.mean()])

    def _rank(self, probes: _Images, gallery: _Images) -> Ranking:
        with torch.autocast(probes.features.device.type, enabled=False):
            similarity = probes.features @ gallery.features.T
        allowed = None
        if self.places is not None:
            here, there = (_places(images.cameras, self.places) for images in (probes, gallery))
            allowed = here[:, None] != there[None]
        matches = probes.identities[:, None] == gallery.identities[None]
        return rank_gallery(similarity, matches, gallery.identities, allowed, unique_identities=self.unique_identities)

    def _trials(self, gallery: _Images) -> list[Tensor]:
        """Which images of the gallery each trial takes: masks (G,)."""
        device = gallery.query.device
        if self.galleries is not None:
            return [torch.isin(gallery.index, torch.as_tensor(g, device=device)) for g in self.galleries]
        if self.shots is None:
            return [torch.ones_like(gallery.query)]
        generator = torch.Generator().manual_seed(self.seed)
        group = torch.stack([gallery.identities, gallery.cameras], 1).unique(dim=0, return_inverse=True)[1]
        return [draw(group.cpu(), self.shots, generator).to(device) for _ in range(self.trials)]


@dataclass(frozen=True)
class _Images:
    """Some images, in one order: (N, ...) each."""

    features: Tensor
    identities: Tensor
    cameras: Tensor
    query: Tensor
    index: Tensor

    def where(self, chosen: Tensor) -> _Images:
        return _Images(*(getattr(self, name)[chosen] for name in _FIELDS))

    def once_each(self) -> _Images:
        """In the order of their indices, repeated ones once; as they came if they have none."""
        known = self.index >= 0
        if not known.all():
            return self
        key = 2 * self.index + self.query
        order = key.argsort(stable=True)
        sorted_key = key[order]
        new = torch.ones_like(known)
        new[1:] = sorted_key[1:] != sorted_key[:-1]
        return self.where(order[new])


def draw(group: Tensor, shots: int, generator: torch.Generator) -> Tensor:
    """Choose up to `shots` members of each group at random: group of each (G,) -> bool (G,).

    >>> draw(torch.tensor([0, 1, 0, 0]), 1, torch.Generator().manual_seed(0)).sum().item()
    2
    """
    shuffled = torch.randperm(len(group), generator=generator)
    order = shuffled[group[shuffled].argsort(stable=True)]  # groups one after another, each in random order
    counts = group.bincount()
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    chosen = torch.zeros(len(group), dtype=torch.bool)
    chosen[order[torch.arange(len(group)) - starts < shots]] = True
    return chosen


def _places(cameras: Tensor, places: Mapping[int, int]) -> Tensor:
    """Where each camera hangs; those that are not named at a place of their own."""
    result = cameras + max([0, *places.values()]) + 1
    for camera, place in places.items():
        result = torch.where(cameras == camera, place, result)
    return result
