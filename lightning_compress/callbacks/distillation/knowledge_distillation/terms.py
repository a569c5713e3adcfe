"""Which losses there are, and what each of them compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_compress.core.distill import losses
from lightning_compress.core.distill.connectors import width
from lightning_compress.core.distill.taps import Point
from lightning_compress.core.select import match
from lightning_compress.core.sparse.layers import weight_layers

OF_LOGITS = ("logits", "target", "non_target")
OF_LABELS = ("target", "non_target", "contrast")
OF_FEATURES: dict[str, Callable[..., Tensor]] = {
    "hints": losses.hints,
    "attention": losses.attention,
    "similarity": losses.similarity,
    "distance": losses.distance,
    "angle": losses.angle,
    "contrast": losses.contrast,
}
TERMS = (*OF_LOGITS, *OF_FEATURES)
OF_MAPS = ("hints", "attention")  # which have no natural place: their modules must be named
LEARNT = ("hints", "contrast")  # which bring connectors

Pair = tuple[Point, Point]
Features = Mapping[str, str | Mapping[str, str]]


def pairs_of(term: str, features: Features | None, student: nn.Module, teacher: nn.Module) -> list[Pair]:
    """The places that a term compares: named ones, or what the last linear layers get.

    Raises:
        ValueError: a glob that matches nothing, or not as many modules as its counterpart; names `features`.
    """
    named = _named(term, features)
    if named is None:
        if term in OF_MAPS:
            raise ValueError(
                f"losses, features={features!r}: {term!r} compares what modules return; name them as "
                f"{{glob of the student's modules: glob of the teacher's}}."
            )
        return [(_penultimate(student, "student"), _penultimate(teacher, "teacher"))]
    pairs: list[Pair] = []
    for own, theirs in named.items():
        left, right = match(_modules(student), [own], "features"), match(_modules(teacher), [theirs], "features")
        if len(left) != len(right):
            raise ValueError(
                f"features: {own!r} matches {len(left)} modules of the student ({', '.join(left[:4])}), and "
                f"{theirs!r} {len(right)} of the teacher ({', '.join(right[:4])}); they are compared one by one."
            )
        pairs += zip(map(Point, left), map(Point, right), strict=True)
    return pairs


def check_pair(term: str, pair: Pair, student: Any, teacher: Any) -> None:
    """Whether a term can compare these two.

    Raises:
        MisconfigurationException: it cannot.
    """
    where = f"KnowledgeDistillation: {term!r} compares {pair[0]} of the student with {pair[1]} of the teacher, which "
    if not (isinstance(student, Tensor) and isinstance(teacher, Tensor)):
        raise MisconfigurationException(f"{where}are a {type(student).__name__} and a {type(teacher).__name__}.")
    shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
    if term == "attention" and not student.ndim == teacher.ndim == 4:
        raise MisconfigurationException(f"{where}are of shape {shapes}; both must be (B, C, H, W).")
    if term == "hints" and (
        student.ndim != teacher.ndim or (student.ndim == 3 and student.shape[1] != teacher.shape[1])
    ):
        raise MisconfigurationException(f"{where}are of shape {shapes}; only channels and image sizes may differ.")
    if student.ndim < 2 or teacher.ndim < 2:
        raise MisconfigurationException(f"{where}are of shape {shapes}; they must be (B, C, ...).")


def connector(term: str, student: Tensor, teacher: Tensor, dim: int) -> tuple[Any, ...]:
    """The kind and the arguments of what a term learns; see `core.distill.connectors.connect`."""
    if term == "hints":
        return "regressor", width(student), width(teacher), student.ndim == 4
    return "embeddings", width(student), width(teacher), dim


def check_features(features: Features | None, terms: Sequence[str]) -> None:
    """Raises ValueError for features that no loss looks at."""
    if features is None:
        return
    looking = [term for term in terms if term in OF_FEATURES]
    if not looking:
        raise ValueError(
            f"features={dict(features)!r}: none of the losses {list(terms)} looks at features. Those that do are "
            f"{', '.join(OF_FEATURES)}."
        )
    for term in (key for key, value in features.items() if isinstance(value, Mapping)):
        if term not in looking:
            raise ValueError(f"features: {term!r} is none of the losses that look at features: {', '.join(looking)}.")
    if len({isinstance(value, Mapping) for value in features.values()}) != 1:
        raise ValueError(
            f"features={dict(features)!r}: give {{student's modules: teacher's}}, or such a mapping for each loss."
        )


def _named(term: str, features: Features | None) -> Mapping[str, str] | None:
    if features and isinstance(next(iter(features.values())), Mapping):
        return features.get(term)  # type: ignore[return-value]
    return features  # type: ignore[return-value]


def _modules(network: nn.Module) -> list[str]:
    return [name for name, _ in network.named_modules() if name]


def _penultimate(network: nn.Module, who: str) -> Point:
    linear = [name for name, layer in weight_layers(network).items() if isinstance(layer, nn.Linear)]
    if not linear:
        raise ValueError(f"features=None: the {who} has no linear layer whose input could be compared. Name modules.")
    return Point(linear[-1], input=True)
