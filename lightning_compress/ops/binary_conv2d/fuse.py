"""A network with binary layers, rewritten so that everything behind a binary convolution is done while it writes."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F
from torch.nn.utils import fuse_conv_bn_eval

from lightning_compress.core.example_input import inputs_for
from lightning_compress.core.inference_copy import inference_copy
from lightning_compress.ops.binary_conv2d.layer import Activation, BinaryConv2d

IN_PLACE = (operator.iadd, "add_")
ADDITIONS = (operator.add, torch.add, "add", *IN_PLACE)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, BinaryConv2d) or super().is_leaf_module(m, module_qualified_name)


def fuse(network: nn.Module, example_input: Any) -> fx.GraphModule:
    """A copy of a network for inference that spends little time outside of its convolutions; the same function.

    * A batch norm, the addition of a shortcut, a Hardtanh or PReLU behind a `BinaryConv2d` become part of it, in this
      order, where nothing else reads what lies between.
    * A batch norm behind a real convolution becomes part of that; a Hardtanh or ReLU overwrites its output.
    * What comes before the first binary layer runs channels-last: on the CPU, torch's max-pooling of other images takes
      20 times as long.

    Args:
        network: with `BinaryConv2d` layers, traceable by `torch.fx`. It is not changed.
        example_input: a tensor, a shape, a tuple of arguments or a dict of keyword arguments.

    Raises:
        MisconfigurationException: the network cannot be traced.
    """
    small = inference_copy(network)
    try:
        traced = fx.GraphModule(small, _Tracer().trace(small))
    except Exception as error:  # whatever the network does with values that are not there
        raise MisconfigurationException(
            f"{type(network).__name__} cannot be traced by torch.fx, so its layers cannot be fused: {error}"
        ) from error
    args, kwargs = inputs_for(small, example_input)
    with torch.no_grad():
        ShapeProp(traced).propagate(*_in_order(traced, args, kwargs))
        for node in list(traced.graph.nodes):
            _drop_identity(traced, node)
        for node in list(traced.graph.nodes):
            _fold_into_real(traced, node)
            _fold_into_binary(traced, node)
        _channels_last(traced)
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()
    return traced.eval()


def _in_order(traced: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    names = [node.target for node in traced.graph.nodes if node.op == "placeholder"]
    return [*args, *(kwargs[str(name)] for name in names[len(args) :] if str(name) in kwargs)]


def _module(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _calls(traced: fx.GraphModule, node: fx.Node) -> int:
    """How often the node's module is called; one that is called twice must stay what it is."""
    return sum(other.op == "call_module" and other.target == node.target for other in traced.graph.nodes)


def _drop_identity(traced: fx.GraphModule, node: fx.Node) -> None:
    if isinstance(_module(traced, node), nn.Identity | nn.Dropout):
        node.replace_all_uses_with(cast(fx.Node, node.args[0]))
        traced.graph.erase_node(node)


def _norm_behind(traced: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, nn.BatchNorm2d] | None:
    user = _only_user(node)
    norm = None if user is None else _module(traced, user)
    return (user, norm) if user and isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None else None


def _fold_into_real(traced: fx.GraphModule, node: fx.Node) -> None:
    conv, found = _module(traced, node), _norm_behind(traced, node)
    if isinstance(conv, nn.Conv2d) and found and _calls(traced, node) == 1:
        traced.set_submodule(str(node.target), fuse_conv_bn_eval(conv, found[1]))
        found[0].replace_all_uses_with(node)
        traced.graph.erase_node(found[0])
    user = _only_user(node)
    if isinstance(conv, nn.Conv2d) and user is not None and _calls(traced, user) == 1:
        activation = _module(traced, user)
        if isinstance(activation, nn.Hardtanh | nn.ReLU):
            activation.inplace = True


def _fold_into_binary(traced: fx.GraphModule, node: fx.Node) -> None:
    conv = _module(traced, node)
    if not isinstance(conv, BinaryConv2d) or conv.activation != "none":
        return
    if _calls(traced, node) > 1 or len(node.args) != 1:
        return
    norm = _norm_behind(traced, node)
    chain = [node] if norm is None else [node, norm[0]]
    residual = _added(chain[-1])
    if residual is not None:
        chain += chain[-1].users
    activation = _activation(traced, _only_user(chain[-1]), conv.out_channels)
    if activation is not None:
        chain += chain[-1].users
    inputs = node.args if residual is None else (*node.args, residual)
    if _overwritten(traced, node, chain[-1]):
        return  # what the convolution reads is no longer there at the end of the chain
    if norm is not None:
        _fold_norm(conv, norm[1])
    if activation is not None:
        conv.activation, conv.slope = activation
    with traced.graph.inserting_before(chain[-1]):
        made = traced.graph.call_module(str(node.target), inputs)
    made.meta = dict(chain[-1].meta)
    chain[-1].replace_all_uses_with(made)
    for old in reversed(chain):
        traced.graph.erase_node(old)


def _fold_norm(conv: BinaryConv2d, norm: nn.BatchNorm2d) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = (norm.running_var + norm.eps).rsqrt()
    factor = factor if norm.weight is None else factor * norm.weight
    shift = -norm.running_mean if conv.shift is None else conv.shift - norm.running_mean
    conv.scale = conv.scale * factor
    conv.shift = shift * factor if norm.bias is None else shift * factor + norm.bias


def _added(node: fx.Node) -> fx.Node | None:
    """What is added to the node's value, if that is all that is done with it, and of the same shape."""
    user = _only_user(node)
    if user is None or user.target not in ADDITIONS or user.kwargs or len(user.args) != 2:
        return None
    other = user.args[1] if user.args[0] is node else user.args[0]
    if not isinstance(other, fx.Node) or other is node or "tensor_meta" not in other.meta:
        return None
    if user.target in IN_PLACE and user.args[0] is other:
        return None  # it is changed, and may be read again
    same = other.meta["tensor_meta"].shape == node.meta["tensor_meta"].shape
    return other if same else None


def _activation(traced: fx.GraphModule, node: fx.Node | None, channels: int) -> tuple[Activation, Tensor | None] | None:
    if node is None:
        return None
    module = _module(traced, node)
    if isinstance(module, nn.PReLU) and module.num_parameters in (1, channels):
        return "prelu", module.weight.detach().float().expand(channels).clone()
    plain = node.target is F.hardtanh and len(node.args) == 1 and not {"min_val", "max_val"} & node.kwargs.keys()
    if plain or (isinstance(module, nn.Hardtanh) and (module.min_val, module.max_val) == (-1, 1)):
        return "hardtanh", None
    return None


def _overwritten(traced: fx.GraphModule, node: fx.Node, last: fx.Node) -> bool:
    """Whether what `node` reads is changed in place before `last`."""
    between, value = node.next, node.args[0]
    while between is not last and node is not last:
        flags = getattr(_module(traced, between), "inplace", False) or between.kwargs.get("inplace", False)
        changes = flags or between.target in IN_PLACE or str(getattr(between.target, "__name__", "")).endswith("_")
        if changes and between.args and between.args[0] is value:
            return True
        between = between.next
    return False


def _channels_last(traced: fx.GraphModule) -> None:
    """All before the first binary layers, and one copy where they begin."""
    before: set[fx.Node] = set()
    for node in traced.graph.nodes:
        module = _module(traced, node)
        if isinstance(module, BinaryConv2d) or not before.issuperset(node.all_input_nodes):
            continue
        before.add(node)
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    for node in before:
        later = [user for user in node.users if user not in before]
        if node.op == "placeholder" or not later:
            continue
        with traced.graph.inserting_after(node):
            copied = traced.graph.call_method("contiguous", (node,))
        for user in later:
            user.replace_input_with(node, copied)
