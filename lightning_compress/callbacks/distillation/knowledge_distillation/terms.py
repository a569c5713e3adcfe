"""Which losses there are, and what each of them compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from itertools import pairwise
from operator import add
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_compress.core.distill import losses
from lightning_compress.core.distill.connectors import width
from lightning_compress.core.distill.taps import Point
from lightning_compress.core.select import match
from lightning_compress.core.sparse.layers import weight_layers

Seen = Sequence[tuple[Tensor, ...]]  # of each pair of places: student, teacher, and what a connector adds


def of_each(loss: Callable[..., Tensor], seen: Seen, **options: Any) -> Tensor:
    """A loss on pairs of features, summed over them."""
    return reduce(add, (loss(*pair, **options) for pair in seen))


def of_neighbours(seen: Seen) -> Tensor:
    """`flow` between each place and the next."""
    matrices = ([losses.flow_matrix(a, b) for a, b in pairwise(one)] for one in zip(*seen, strict=True))
    return reduce(add, map(losses.flow, *matrices))


def of_boundaries(seen: Seen) -> Tensor:
    """`boundary` of each pair, the earlier half as much as the later."""
    return reduce(add, (losses.boundary(*pair) * 2.0 ** (i + 1 - len(seen)) for i, pair in enumerate(seen)))


def of_factors(seen: Seen) -> Tensor:
    """`factors`, without what the paraphrasers make wrong; that is a term of its own."""
    return of_each(losses.factors, [pair[:2] for pair in seen])


OF_LOGITS = ("logits", "target", "non_target")
OF_LABELS = ("target", "non_target", "contrast", "noise_contrast")
COMPARISONS: dict[str, Callable[..., Tensor]] = {
    "hints": partial(of_each, losses.hints),
    "attention": partial(of_each, losses.attention),
    "selectivity": partial(of_each, losses.selectivity),
    "flow": of_neighbours,
    "factors": of_factors,
    "boundary": of_boundaries,
    "information": partial(of_each, losses.information),
    "similarity": partial(of_each, losses.similarity),
    "distance": partial(of_each, losses.distance),
    "angle": partial(of_each, losses.angle),
    "correlation": partial(of_each, losses.correlation),
    "probability": partial(of_each, losses.probability),
    "contrast": partial(of_each, losses.contrast),
}
OF_FEATURES = (*COMPARISONS, "noise_contrast")  # which also compares with images of other batches, from a memory
TERMS = (*OF_LOGITS, *OF_FEATURES)
# These have no natural place: their modules must be named. All but hints compare maps (B, C, H, W) alone.
OF_MAPS = ("hints", "attention", "selectivity", "flow", "factors", "boundary", "information")
OF_INPUTS = ("boundary",)  # which compares what activations get
INITIAL = ("flow", "boundary")  # after whose stage the student goes on without them; factors are then learnt, too
# These bring connectors.
LEARNT = ("hints", "factors", "boundary", "information", "correlation", "contrast", "noise_contrast")

Pair = tuple[Point, Point]
Features = Mapping[str, str | Mapping[str, str]]


def pairs_of(term: str, features: Features | None, student: nn.Module, teacher: nn.Module) -> list[Pair]:
    """The places that a term compares: named ones, or what the last linear layers get.

    Raises:
        ValueError: a glob that matches nothing, or not as many modules as its counterpart, or modules that this term
            cannot look at; names `features`.
    """
    named = _named(term, features)
    if named is None:
        if term in OF_MAPS:
            what = "get" if term in OF_INPUTS else "return"
            raise ValueError(
                f"losses, features={features!r}: {term!r} compares what modules {what}; name them as "
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
        point = partial(Point, input=term in OF_INPUTS)
        pairs += zip(map(point, left), map(point, right), strict=True)
    if term == "flow" and len(pairs) < 2:
        raise ValueError(f"features: 'flow' goes from one place to the next, and {dict(named)} is a single one.")
    for side, network in enumerate((student, teacher)):
        for place in (pair[side] for pair in pairs if pair[side].input):
            if getattr(network.get_submodule(place.module), "inplace", False):
                raise ValueError(
                    f"features: {term!r} compares {place} before it acts, but that module overwrites it "
                    f"(inplace=True). Build the network with inplace=False."
                )
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
    if term in OF_MAPS and term != "hints" and not student.ndim == teacher.ndim == 4:
        raise MisconfigurationException(f"{where}are of shape {shapes}; both must be (B, C, H, W).")
    if term == "hints" and (
        student.ndim != teacher.ndim or (student.ndim == 3 and student.shape[1] != teacher.shape[1])
    ):
        raise MisconfigurationException(f"{where}are of shape {shapes}; only channels and image sizes may differ.")
    if term == "flow" and student.shape[1] != teacher.shape[1]:
        raise MisconfigurationException(f"{where}are of shape {shapes}; both must have as many channels.")
    if student.ndim < 2 or teacher.ndim < 2:
        raise MisconfigurationException(f"{where}are of shape {shapes}; they must be (B, C, ...).")


def connector(term: str, student: Tensor, teacher: Tensor, dim: int) -> tuple[Any, ...] | None:
    """The kind and the arguments of what a term learns, see `core.distill.connectors.connect`; None for nothing."""
    if term not in LEARNT or (term == "boundary" and student.shape == teacher.shape):
        return None
    widths = width(student), width(teacher)
    if term in ("correlation", "contrast", "noise_contrast"):
        return "embeddings", *widths, dim
    if term == "hints" and student.ndim != 4:
        return "regressor", *widths
    if term in ("hints", "boundary"):
        return "conv_regressor", *widths, tuple(student.shape[2:]), tuple(teacher.shape[2:]), term == "hints"
    return "expectation" if term == "information" else "factors", *widths


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
