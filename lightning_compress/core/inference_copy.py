"""A copy of a module that computes what the module computes in evaluation, and carries nothing else."""

from __future__ import annotations

from collections import OrderedDict
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_OTHER_HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def inference_copy(module: nn.Module) -> nn.Module:
    """Copy ``module`` for measuring or exporting it: eval mode, plain weights, no trainer, no hooks.

    * The trainer and its callbacks, which a LightningModule and its hooks refer to, are not copied.
    * Hooks are left behind, since they belong to callbacks that watch the training. Forward hooks stay where
      they are part of the function: torch's own (``weight_norm``, ``spectral_norm``, ``prune``), and those with
      an attribute ``part_of_function`` that is true, which are copied with the module.
    * Modules with an attribute ``training_only`` that is true are left out; None is in their place.
    * Modules with an attribute ``deployed`` are replaced by their child of that name, which speaks for them in eval.
    * Parametrised weights (masks, fake quantisers, low-rank products) are replaced by their value.
    * Compiled modules are replaced by what they were compiled from.

    Device, dtype and memory format stay; ``module`` itself is not touched.

    >>> conv = nn.Conv2d(3, 8, 3)
    >>> handle = conv.register_forward_hook(lambda *_: print("watched"))
    >>> out = inference_copy(conv)(torch.zeros(1, 3, 8, 8))  # prints nothing
    """
    clone = plain_copy(module).eval()
    for submodule in list(clone.modules()):
        for name, child in list(submodule.named_children()):
            if getattr(child, "training_only", False):
                setattr(submodule, name, None)
            elif hasattr(child, "deployed"):  # in a container, so that names stay
                speaker = str(child.deployed)
                setattr(submodule, name, nn.Sequential(OrderedDict([(speaker, child.get_submodule(speaker))])))
        if parametrize.is_parametrized(submodule):
            _bake(submodule)
    return clone


def plain_copy(module: nn.Module) -> nn.Module:
    """Copy ``module`` as :func:`inference_copy` does, but ready to be trained: modes and parametrisations stay."""
    memo = _not_copied(module)
    copied = deepcopy(module, memo)
    for original, other in zip(module.modules(), copied.modules(), strict=True):
        for name in _FORWARD_HOOKS:  # after all modules, which these hooks may refer to
            kept = {k: deepcopy(h, memo) for k, h in vars(original)[name].items() if _is_function(h)}
            vars(other)[name].update(kept)
    clone = _uncompiled(copied)
    for submodule in clone.modules():
        for name, child in submodule.named_children():
            if child is not _uncompiled(child):
                setattr(submodule, name, _uncompiled(child))
        submodule._compiled_call_impl = None  # set by module.compile()
        if vars(submodule).get("_compiler_ctx") is not None:  # set by torch.compile(lightning_module)
            vars(submodule).pop("forward", None)
        if "_trainer" in vars(submodule):
            vars(submodule)["_trainer"] = None
    return clone


def not_deployed(module: nn.Module) -> set[str]:
    """Names of the submodules that :func:`inference_copy` leaves out since they have an attribute ``deployed``.

    >>> network = nn.Sequential(nn.ModuleDict({"one": nn.Linear(2, 3), "other": nn.Linear(2, 3)}))
    >>> network[0].deployed = "other"
    >>> sorted(not_deployed(network))
    ['0', '0.one']
    """
    names = [name for name, _ in module.named_modules()]
    left_out: set[str] = set()
    for name, submodule in module.named_modules():
        if isinstance(getattr(submodule, "deployed", None), str):
            kept = f"{name}.{submodule.deployed}"
            inside = {n for n in names if n == name or n.startswith(f"{name}.")}
            left_out |= {n for n in inside if n != kept and not n.startswith(f"{kept}.")}
    return left_out


def _bake(module: nn.Module) -> None:
    """Replace parametrised tensors by their values.

    Not by torch's ``remove_parametrizations``, which takes them off the class, and a copy has its original's.
    """
    assert isinstance(module.parametrizations, nn.ModuleDict)
    with torch.no_grad():
        values = {name: getattr(module, name).clone() for name in module.parametrizations}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))


def has_watchers(module: nn.Module) -> bool:
    """Whether ``module`` has forward hooks that :func:`inference_copy` leaves behind."""
    return any(
        not (_is_torchs_own(hook) or _is_function(hook))
        for sub in module.modules()
        for name in _FORWARD_HOOKS
        for hook in vars(sub)[name].values()
    )


def _uncompiled(module: nn.Module) -> nn.Module:
    return getattr(module, "_orig_mod", module)


def _is_torchs_own(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.")


def _is_function(hook: Any) -> bool:
    return bool(getattr(hook, "part_of_function", False))


def _not_copied(module: nn.Module) -> dict[int, Any]:
    """A memo for ``deepcopy``: what to put in place of a copy, by ``id`` of the original."""
    memo: dict[int, Any] = {}
    for submodule in module.modules():
        state = vars(submodule)
        for name in _FORWARD_HOOKS:
            memo[id(state[name])] = OrderedDict((k, h) for k, h in state[name].items() if _is_torchs_own(h))
        for name in _OTHER_HOOKS:
            memo[id(state[name])] = OrderedDict()
        trainer = state.get("_trainer")
        for shared in (trainer, *getattr(trainer, "callbacks", ())):
            memo[id(shared)] = shared
        # torch copies no tensor that has a history, and `prune` leaves one as the attribute `weight`
        memo.update((id(v), v.detach().clone()) for v in state.values() if isinstance(v, Tensor) and not v.is_leaf)
    return memo
