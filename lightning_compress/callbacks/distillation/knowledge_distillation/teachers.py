"""Where teachers come from, and how they are asked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_compress.callbacks.distillation.knowledge_distillation.student import feature, shapes
from lightning_compress.core.distill.cache import TeacherCache, fingerprints
from lightning_compress.core.distill.taps import Point, logits_of
from lightning_compress.core.distill.teacher import Teacher
from lightning_compress.core.example_input import first_loader, training_loaders
from lightning_compress.core.inference_copy import plain_copy
from lightning_compress.core.measurement import count
from lightning_compress.core.surgery import attach_record
from lightning_compress.core.surgery.record import KEY
from lightning_compress.core.units import human
from lightning_compress.core.weights import put_weights

FILES = (".ckpt", ".pt", ".pth", ".th", ".bin")


class Teachers:
    """One or several teachers, who answer together: the mean of their logits, and the features of a single one.

    Args:
        teachers: them.
        need_logits: whether it is an error if one returns none.

    Attributes:
        points: where features are read.
    """

    def __init__(self, teachers: Sequence[Teacher], need_logits: bool) -> None:
        self.all = list(teachers)
        self.need_logits = need_logits
        self.points: list[Point] = []

    def ask(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Their logits (if needed), then the features, for the arguments of a call."""
        seen = [teacher.observe(self.points, *args, **kwargs) for teacher in self.all]
        features = [feature(f) for f in seen[0][1]]
        if not self.need_logits:
            return features
        logits = [self._logits(teacher, output) for teacher, (output, _) in zip(self.all, seen, strict=True)]
        return [logits[0] if len(logits) == 1 else torch.stack(logits).mean(0), *features]

    def identity(self, *more: Any) -> str:
        """What answers depend on, besides what is asked."""
        teachers = [(t.sha256, repr(t.network), t.channels_last) for t in self.all]
        parts = (teachers, self.points, self.need_logits, *more)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def costs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """What they compute, for the account of the student."""
        lines = []
        for teacher in self.all:
            source = f" ({teacher.source})" if teacher.source else ""
            size = f"{human(sum(p.numel() for p in teacher.network.parameters()))} parameters"
            if not (args and kwargs):  # the count takes either
                size = f"{human(count(teacher.network, kwargs or args).macs)} MACs and {size}"
            lines.append(f"{type(teacher.network).__name__}{source}, {size}")
        return f"Teacher: {'; '.join(lines)}."

    @staticmethod
    def _logits(teacher: Teacher, output: Any) -> Tensor:
        logits = logits_of(output)
        if logits is None:
            raise MisconfigurationException(
                f"teacher: {type(teacher.network).__name__} returns no logits (B, K), but {shapes(output)}."
            )
        return logits.clone() if logits.is_inference() else logits  # in a container that nobody looks into


class CachedTeachers:
    """Teachers who are asked about an image only once.

    Args:
        teachers: them.
        cache: their answers.
    """

    def __init__(self, teachers: Teachers, cache: TeacherCache) -> None:
        self.teachers, self.cache = teachers, cache
        self._before = 0  # images, when the epoch began

    def begin_epoch(self) -> None:
        """Take in what other processes have written."""
        self.cache.read()
        self._before = len(self.cache)
        self.cache.asked = self.cache.known = 0

    def ask(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """As :meth:`Teachers.ask`. One new image in a batch has the whole batch computed, as without a cache.

        Raises:
            MisconfigurationException: no image comes twice.
        """
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        keys = torch.stack([fingerprints(tensor) * (2 * i + 1) for i, tensor in enumerate(tensors)]).sum(0)
        held = self.cache.get(keys)
        if held is None:
            held = self.teachers.ask(args, kwargs)
            self.cache.put(keys, held)
            if not self.cache.known and self.cache.asked >= min(1000, self._before) > 0:
                raise MisconfigurationException(
                    f"cache: none of {self.cache.asked} images of this epoch was among the {self._before} of earlier "
                    f"ones. Random augmentation makes other images every time: switch it off (augment=False), or "
                    f"distil without a cache."
                )
        return held


def check_images(trainer: Trainer, pl_module: LightningModule) -> None:
    """A cache is of no use where the data set gives another image at every access.

    Raises:
        MisconfigurationException: it does.
    """
    dataset: Any = getattr(first_loader(training_loaders(trainer, pl_module)), "dataset", None)
    differ = getattr(dataset, "augmentation", None) is not None
    if not differ and hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        with isolate_rng(include_cuda=False):
            for index in range(min(8, len(dataset))):
                one, two = ([x for x in tree_leaves(dataset[index]) if isinstance(x, Tensor)] for _ in range(2))
                differ |= not all(map(torch.equal, one, two))
    if differ:
        raise MisconfigurationException(
            f"cache: {type(dataset).__name__} gives another image each time, by random augmentation, so that none is "
            f"ever found again. Switch it off (augment=False), or distil without a cache."
        )


def make_teacher(
    teacher: nn.Module | str,
    weights: str | None,
    *,
    like: nn.Module,
    num_classes: int | None,
    channels: int,
    channels_last: bool = False,
) -> Teacher:
    """A frozen teacher.

    Args:
        teacher: a network or LightningModule; a file (a Lightning checkpoint whose hyper-parameters name the network,
            as those of `ImageClassifier` do, or weights of a network like the student); or the name of a network.
        weights: a file for a teacher that is a module or a name. A torchvision or timm name without one comes with the
            library's weights, which are downloaded.
        like: the student's network.
        num_classes: of the student, for a network built by name; None takes the builder's.
        channels: of its images.
        channels_last: see `Teacher`.

    Raises:
        ValueError: no such file or network, or weights that do not fit; names `teacher` or `teacher_weights`.
    """
    if isinstance(teacher, nn.Module):
        network = plain_copy(teacher) if weights else teacher
    elif Path(teacher).suffix in FILES or Path(teacher).is_file():
        if weights:
            raise ValueError(f"teacher_weights={weights!r}: teacher={teacher!r} is itself a file. Give one of the two.")
        return Teacher(_from_file(teacher, like), teacher, channels_last=channels_last)
    else:
        network = _from_name(teacher, weights, num_classes, channels)
    if weights:
        network = _filled(network, _read(weights, "teacher_weights"), f"teacher_weights {weights!r}")
    return Teacher(network, weights or "", channels_last=channels_last)


def _from_name(name: str, weights: str | None, num_classes: int | None, channels: int) -> nn.Module:
    from lightning_compress.networks.find import OWN, build, build_classifier

    try:
        if weights:
            return build_classifier(name, num_classes, channels) if num_classes else build(name)
        if name in OWN:
            raise ValueError(f"{name!r} comes without weights. Give a file of them as teacher_weights.")
        # with the library's own head: another number of classes would be a fresh one, which knows nothing
        return build(name, **({"pretrained": True} if name.startswith("timm/") else {"weights": "DEFAULT"}))
    except ValueError as error:
        raise ValueError(f"teacher={name!r}: {error}") from error


def _from_file(path: str, like: nn.Module) -> nn.Module:
    content = _read(path, "teacher")
    given = content.get("hyper_parameters", {})
    if isinstance(given.get("network"), str) and "num_classes" in given:
        from lightning_compress.networks.find import build_classifier

        channels = given.get("input_shape", (3,))[0]
        return _filled(build_classifier(given["network"], given["num_classes"], channels), content, f"teacher {path!r}")
    try:
        return _filled(plain_copy(like), content, f"teacher {path!r}")
    except ValueError as error:
        raise ValueError(
            f"{error} The file does not say which network it is of, so the student's was tried. Give the network as "
            f"teacher (a name or a module), and the file as teacher_weights."
        ) from error


def _read(path: str, argument: str) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{argument}: there is no file {path!r}.") from None
    except Exception as error:  # the unpickler raises whatever a damaged file leads it to
        raise ValueError(
            f"{argument}: {path!r} is truncated or holds more than plain weights ({type(error).__name__})."
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{argument}: {path!r} holds no state dict, but a {type(content).__name__}.")
    return dict(content)


def _filled(network: nn.Module, content: Mapping[str, Any], source: str) -> nn.Module:
    """The network with the weights of a file; where that records surgery, the network it was made into."""
    state = dict(content.get("state_dict", content))
    if KEY not in state:
        put_weights(network, {key: value for key, value in state.items() if isinstance(value, Tensor)}, source)
        return network
    # Names in the record begin with the attribute that held the network.
    names = {name for name, _ in network.named_children()}
    roots = {key.partition(".")[0] for key in state if key != KEY}
    root = None if roots & names else next((r for r in roots if any(k.startswith(f"{r}.") for k in state)), None)
    whole = network if root is None else nn.ModuleDict({root: network})
    attach_record(whole)
    try:
        missing, _ = whole.load_state_dict(state, strict=False)
        if missing:
            raise ValueError(f"it lacks {', '.join(missing[:3])}{' ...' if missing[3:] else ''}")
    except (RuntimeError, ValueError, AttributeError) as error:
        raise ValueError(f"{source} does not fit {type(network).__name__}: {error}") from error
    return network
