"""The graph of a quantised network, written with QuantizeLinear and DequantizeLinear for 8-bit inference.

Inference engines make one integer convolution of  DequantizeLinear -> Conv -> QuantizeLinear. For that, and for their
fast kernels, the graph must look as they expect:

* activations are uint8, weights int8 with a scale for each output channel. (ONNX Runtime has slower kernels for int8
  activations, and converts where the two meet.) Codes below zero are stored with a zero point.
* Nothing stands between a convolution and the quantiser behind it. Batch norms and constant factors go into the scales
  of the weight and the bias; a quantiser's offset into the bias; ReLU and other clamps into the range of codes; pooling
  and reshaping behind the quantiser, where they work on codes. What ends below 8 bits is cut by a Clip of codes.
* The bias is int32, in units of the sums.

All of that is exact but for the rounding of these biases, which now and then turns a code into its neighbour.

A convolution whose output nothing quantises, such as one that is added to a shortcut, is computed in floating point.
Calibration gives these outputs 8 bits, and inputs of integer layers too where the network has no quantiser.

Imports `onnx_ir`, which comes with the extra ``export``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

from lightning_compress.core.quant.integer import IntegerInput
from lightning_compress.export.integer_trace import DOMAIN, INPUT, WEIGHT
from lightning_compress.export.onnx import session_of

_CLAMPS = ("Relu", "Clip")
_MOVES = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")  # each output is one of the inputs
_OUTPUTS = {"Conv": 0, "Gemm": 0, "MatMul": 1}  # the axis of the weight that counts them
_UINT8 = ir.DataType.UINT8
Array = np.ndarray[Any, Any]


def write_integers(model: ir.Model, calibration: Iterable[Mapping[str, Tensor]] | None = None) -> None:
    """Write the quantisers of a traced network with the operators of the ONNX standard, in place.

    Args:
        model: traced from what `integer_trace` made.
        calibration: batches of inputs, by name. The ranges seen on them give 8 bits to what integer layers read and
            convolutions write, where the network leaves it in floating point.
    """
    graph = model.graph
    for weight in _nodes(graph, WEIGHT):
        _give_each_layer_its_own(graph, weight)
    for layer in _layers(graph):
        _fold_what_follows(graph, layer)
    for quantizer in _nodes(graph, INPUT):
        _drop_if_repeated(graph, quantizer)
    if calibration is not None:
        values = _in_floating_point(graph)
        for value, spec in zip(values, _calibrate(model, values, calibration), strict=True):
            _insert_quantizer(graph, value, spec)
    for quantizer in _nodes(graph, INPUT):
        _absorb_what_precedes(graph, quantizer)
    _lower(graph)
    model.opset_imports.pop(DOMAIN, None)


# ------------------------------------------------------------------------------------------------------------- weights


def _give_each_layer_its_own(graph: ir.Graph, weight: ir.Node) -> None:
    """One node of codes and scales for each layer that reads them, in the layout in which it does."""
    codes, scale = _array(weight.inputs[0]), _array(weight.inputs[1])
    for use in _uses(weight.outputs[0]):
        layer, transposed = use.node, use.node.op_type == "Transpose"
        if transposed:  # of a linear layer with more than two dimensions, before a MatMul
            (inner,) = _uses(use.node.outputs[0])
            use, layer = inner, inner.node
        operands = [_constant(graph, codes.T if transposed else codes), _constant(graph, scale)]
        layer.replace_input_with(use.idx, _insert(graph, layer, WEIGHT, operands, domain=DOMAIN))
    for use in _uses(weight.outputs[0]):
        graph.remove(use.node, safe=True)
    graph.remove(weight, safe=True)


def _layers(graph: ir.Graph) -> list[ir.Node]:
    """The nodes that multiply with a quantised weight."""
    return [_uses(weight.outputs[0])[0].node for weight in _nodes(graph, WEIGHT)]


def _fold_what_follows(graph: ir.Graph, layer: ir.Node) -> None:
    """Batch norms, factors and summands of each channel, as long as nothing else reads between."""
    if layer.op_type == "MatMul":
        return
    weight = _producer(layer.inputs[1])
    codes, scale = _array(weight.inputs[0]), _array(weight.inputs[1]).astype(np.float64)
    bias = _array(layer.inputs[2]).astype(np.float64) if len(layer.inputs) > 2 else np.zeros_like(scale)
    folded = False
    while (after := _only_reader(layer.outputs[0])) and (affine := _affine(after, layer)):
        scale, bias = scale * affine[0], bias * affine[0] + affine[1]
        _bypass(graph, after)
        folded = True
    if not folded:
        return
    # Engines expect positive scales. A code of -128 has no opposite among 8 bits: 127 is its nearest.
    sign = np.where(scale < 0, -1, 1).reshape(-1, *[1] * (codes.ndim - 1))
    codes = np.minimum(codes.astype(np.int16) * sign, 127).astype(np.int8)
    weight.replace_input_with(0, _constant(graph, codes))
    weight.replace_input_with(1, _constant(graph, np.abs(scale)))
    layer.resize_inputs(3)
    layer.replace_input_with(2, _constant(graph, bias))


def _affine(node: ir.Node, layer: ir.Node) -> tuple[Array, Array] | None:
    """The factor and the summand, (C,) or (1,), of a node behind a layer; None if it does something else."""
    if node.op_type == "BatchNormalization":
        gamma, beta, mean, variance = (_array(value).astype(np.float64) for value in node.inputs[1:])
        factor = gamma / np.sqrt(variance + _attribute(node, "epsilon", 1e-5))
        return factor, beta - mean * factor
    if node.op_type not in ("Mul", "Add"):
        return None
    other = node.inputs[1 - node.inputs.index(layer.outputs[0])]
    constant = None if other is None or other.const_value is None else other.const_value.numpy()
    if constant is None:
        return None
    spatial = _array(_producer(layer.inputs[1]).inputs[0]).ndim - 2
    axis = constant.ndim - 1 - spatial
    if constant.size > 1 and (axis < 0 or constant.shape[axis] != constant.size):
        return None
    values = constant.reshape(-1).astype(np.float64)
    return (values, np.zeros(1)) if node.op_type == "Mul" else (np.ones(1), values)


# --------------------------------------------------------------------------------------------------------- activations


def _drop_if_repeated(graph: ir.Graph, node: ir.Node) -> None:
    """Remove a quantiser of what the same quantiser has put out already, for several readers."""
    before = _input(node).producer()
    if before is not None and before.op_type == INPUT and _spec(before) == _spec(node) and not _spec(node).offset:
        _bypass(graph, node)


def _in_floating_point(graph: ir.Graph) -> list[ir.Value]:
    """What integer layers read, and convolutions write, without a quantiser."""
    values: dict[ir.Value, None] = {}
    for layer in _layers(graph):
        read = _input(layer)
        producer = read.producer()
        if producer is None or producer.op_type != INPUT:
            values[read] = None
        if layer.op_type != "Conv":  # engines have matrix products of integers that write floating point
            continue
        written = layer.outputs[0]
        while (reader := _only_reader(written)) and reader.op_type in (*_CLAMPS, *_MOVES):
            written = reader.outputs[0]
        reader = _only_reader(written)
        if not written.is_graph_output() and not (reader and reader.op_type == INPUT):
            values[written] = None
    return list(values)


def _calibrate(
    model: ir.Model, values: Sequence[ir.Value], batches: Iterable[Mapping[str, Tensor]]
) -> list[IntegerInput]:
    """8 bits for each value, from the smallest to the largest number seen, and zero."""
    names = [str(value.name) for value in values]
    low, high = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "watched.onnx"
        inner = _save_watched(model, names, path)
        session = session_of(path)
        for batch in batches:
            seen = {name: tensor.numpy() for name, tensor in batch.items()}
            if inner:
                seen |= zip(inner, session.run(inner, seen), strict=True)
            for name in names:
                low[name] = min(low[name], float(seen[name].min()))
                high[name] = max(high[name], float(seen[name].max()))
    return [_eight_bits(low[name], high[name]) for name in names]


def _save_watched(model: ir.Model, names: Sequence[str], path: Path) -> list[str]:
    """Save a copy of a model that puts out values inside of it; returns those of them that are not its inputs."""
    watched = ir.from_proto(ir.to_proto(model))
    _lower(watched.graph)
    watched.opset_imports.pop(DOMAIN, None)
    inner = {value.name: value for node in watched.graph for value in node.outputs if value.name in names}
    watched.graph.outputs.extend(value for value in inner.values() if not value.is_graph_output())
    ir.save(watched, path)
    return [name for name in names if name in inner]


def _eight_bits(low: float, high: float) -> IntegerInput:
    """256 codes from ``low`` <= 0 to ``high`` >= 0, one of which is 0.

    >>> spec = _eight_bits(-1.0, 1.55)
    >>> round(spec.step, 6), spec.lowest, spec.highest
    (0.01, -100, 155)
    """
    step = max((high - low) / 255, 1e-12)
    lowest = round(low / step)
    return IntegerInput(0.0, step, step, lowest, lowest + 255, 8)


def _insert_quantizer(graph: ir.Graph, value: ir.Value, spec: IntegerInput) -> None:
    """Let all that read a value read it quantised."""
    _insert_behind(graph, value, INPUT, [], asdict(spec), domain=DOMAIN)


def _absorb_what_precedes(graph: ir.Graph, node: ir.Node) -> None:
    """Bring a quantiser to the output of a layer, past whatever commutes with it and is read by nothing else.

    Rounding and clamping do not change order, so that they commute with all that picks elements, and with clamps.
    """
    spec, moves = _spec(node), 0
    while (before := _input(node).producer()) and _only_reader(_input(node)) is node:
        if before.op_type in _CLAMPS:
            spec = _clamped(spec, *_bounds(before))
            _bypass(graph, before)
        elif before.op_type in _MOVES and "moved" not in before.meta:
            _swap(graph, before, node)
            before.meta["moved"] = True
            moves += 1
        else:
            if spec.offset and before in _layers(graph) and before.op_type != "MatMul":
                outputs = _array(_producer(before.inputs[1]).inputs[1]).shape
                bias = _array(before.inputs[2]) if len(before.inputs) > 2 else np.zeros(outputs)
                before.resize_inputs(3)
                before.replace_input_with(2, _constant(graph, bias - spec.offset))
                spec = replace(spec, offset=0.0)
            break
    node.attributes.update({attribute.name: attribute for attribute in ir.convenience.convert_attributes(asdict(spec))})
    node.meta["moves"] = moves


def _clamped(spec: IntegerInput, low: float, high: float) -> IntegerInput:
    """The codes of an input that was clamped before."""

    def code(x: float) -> int:
        return int(np.clip(np.rint((x - spec.offset) / spec.step), spec.lowest, spec.highest))

    return replace(spec, lowest=code(low), highest=code(high))


def _bounds(clamp: ir.Node) -> tuple[float, float]:
    if clamp.op_type == "Relu":
        return 0.0, float("inf")
    low, high = ([*clamp.inputs[1:], None, None])[:2]
    return (
        -float("inf") if low is None else float(_array(low)),
        float("inf") if high is None else float(_array(high)),
    )


def _swap(graph: ir.Graph, before: ir.Node, node: ir.Node) -> None:
    """before -> node becomes node -> before."""
    _redirect(graph, node.outputs[0], before.outputs[0])
    node.replace_input_with(0, before.inputs[0])
    before.replace_input_with(0, node.outputs[0])
    graph.remove(node)
    graph.insert_before(before, node)


# ----------------------------------------------------------------------------------------- operators of the standard


def _lower(graph: ir.Graph) -> None:
    for layer in _layers(graph):
        _lower_weight(graph, layer)
    for node in _nodes(graph, INPUT):
        _lower_input(graph, node)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def _lower_weight(graph: ir.Graph, layer: ir.Node) -> None:
    """Codes and scales; and the bias in units of the sums, where sums become codes without being numbers between."""
    weight = _producer(layer.inputs[1])
    codes, scale = _array(weight.inputs[0]), _array(weight.inputs[1]).astype(np.float64)
    if len(layer.inputs) > 2:
        bias = _array(layer.inputs[2]).astype(np.float64)
        spec, reader = _spec_read(layer), _only_reader(layer.outputs[0])
        if spec is not None and reader is not None and reader.op_type == INPUT:
            # Without VNNI instructions ONNX Runtime adds pairs of products in 16 bits, which saturate.
            room = min(127, 2**15 // (2 * (spec.highest - min(0, spec.lowest))))
            codes, scale = _refined(codes, scale, room, np.abs(bias) / spec.value / 2**30)
            unit = scale.astype(np.float32) * np.float32(spec.value)
            operands = [_constant(graph, np.rint(bias / unit).astype(np.int32)), _constant(graph, unit)]
            layer.replace_input_with(2, _insert(graph, layer, "DequantizeLinear", operands, {"axis": 0}))
        elif layer.op_type == "Gemm":  # of integers, with sums that are written in floating point
            layer.resize_inputs(2)
            _insert_behind(graph, layer.outputs[0], "Add", [_constant(graph, bias.astype(np.float32))])
        else:
            layer.replace_input_with(2, _constant(graph, bias.astype(np.float32)))
    operands = [_constant(graph, array) for array in (codes, scale.astype(np.float32), np.zeros(len(scale), np.int8))]
    axis = _OUTPUTS[layer.op_type]
    layer.replace_input_with(1, _insert(graph, layer, "DequantizeLinear", operands, {"axis": axis}))
    graph.remove(weight, safe=True)


def _refined(codes: Array, scale: Array, room: int, least: Array) -> tuple[Array, Array]:
    """The same weight with scales as small as possible, since a bias is rounded to a unit of the sums.

    Few bits make that unit coarse: 4 bits have codes up to 7, of which ``room`` may hold 18-fold ones. A scale stays
    above ``least``, at which the bias would be beyond int32: a batch norm may have all but switched off a channel, and
    then its codes hardly count.
    """
    largest = np.abs(codes.astype(np.int16)).reshape(len(codes), -1).max(1)
    finer = np.maximum(scale / np.maximum(room // np.maximum(largest, 1), 1), np.maximum(least, 1e-20))
    ratio = (scale / finer).reshape(-1, *[1] * (codes.ndim - 1))
    return np.rint(codes * ratio).astype(np.int8), finer


def _lower_input(graph: ir.Graph, node: ir.Node) -> None:
    """Sub, QuantizeLinear, Clip of codes, what was moved behind the quantiser, DequantizeLinear."""
    spec = _spec(node)
    x: Any = node.inputs[0]
    if spec.offset:
        x = _insert(graph, node, "Sub", [x, _constant(graph, np.float32(spec.offset))])
    shift = max(0, -spec.lowest)
    lowest, highest, zero = (np.uint8(code) for code in (spec.lowest + shift, spec.highest + shift, shift))
    point = _constant(graph, zero)
    codes = _insert(graph, node, "QuantizeLinear", [x, _constant(graph, np.float32(spec.step)), point], dtype=_UINT8)
    if (lowest, highest) != (0, 255):
        codes = _insert(graph, node, "Clip", [codes, _constant(graph, lowest), _constant(graph, highest)], dtype=_UINT8)
    _redirect(graph, node.outputs[0], codes)
    for _ in range(node.meta.get("moves", 0)):
        (use,) = _uses(codes)
        codes = use.node.outputs[0]
        codes.dtype = _UINT8
    value = _constant(graph, np.float32(spec.value))
    if any(_multiplies_floats(use.node) for use in _uses(codes)):
        # ONNX Runtime would round these weights to 8 bits, too, if it saw codes being multiplied with them.
        one = _constant(graph, np.float32(1))
        numbers = _insert_behind(graph, codes, "DequantizeLinear", [one, point])
        _insert_behind(graph, numbers, "Mul", [value])
    else:
        _insert_behind(graph, codes, "DequantizeLinear", [value, point])
    graph.remove(node, safe=True)


def _multiplies_floats(node: ir.Node) -> bool:
    """Whether a node multiplies with a weight of real numbers. Quantised ones are dequantised already."""
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return False
    weight = node.inputs[1]
    producer = None if weight is None else weight.producer()
    return producer is None or producer.op_type != "DequantizeLinear"


def _spec_read(layer: ir.Node) -> IntegerInput | None:
    """The codes of a layer's input; None if it does not read codes."""
    producer = _input(layer).producer()
    while producer is not None and producer.op_type in _MOVES:
        producer = _input(producer).producer()
    return _spec(producer) if producer is not None and producer.op_type == INPUT else None


# ------------------------------------------------------------------------------------------------------- small helpers


def _nodes(graph: ir.Graph, op_type: str) -> list[ir.Node]:
    return [node for node in graph if node.op_type == op_type and node.domain == DOMAIN]


def _spec(node: ir.Node) -> IntegerInput:
    return IntegerInput(**{field.name: node.attributes[field.name].value for field in fields(IntegerInput)})


def _attribute(node: ir.Node, name: str, default: Any) -> Any:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.value


def _input(node: ir.Node) -> ir.Value:
    """What a node works on."""
    value = node.inputs[0]
    assert value is not None
    return value


def _uses(value: ir.Value) -> list[Any]:
    return list(value.uses())


def _only_reader(value: ir.Value) -> ir.Node | None:
    """The node that reads a value, if it is the only one and the value is no output."""
    uses = _uses(value)
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _producer(value: Any) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def _array(value: Any) -> Array:
    """The numbers of a constant."""
    assert value.const_value is not None
    return value.const_value.numpy()


def _constant(graph: ir.Graph, array: Any) -> ir.Value:
    index = len(graph.initializers)
    while (name := f"constant_{index}") in graph.initializers:
        index += 1
    tensor = ir.tensor(np.array(array, order="C"), name=name)
    shape = ir.Shape(np.shape(array))
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _insert(
    graph: ir.Graph,
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value],
    attributes: Mapping[str, Any] | None = None,
    *,
    domain: str = "",
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> ir.Value:
    """The output of a new node, which stands before another one."""
    node = ir.node(op_type, inputs, attributes, domain=domain)
    node.outputs[0].dtype = dtype
    graph.insert_before(before, node)
    return node.outputs[0]


def _insert_behind(
    graph: ir.Graph,
    value: ir.Value,
    op_type: str,
    others: Sequence[ir.Value],
    attributes: Mapping[str, Any] | None = None,
    *,
    domain: str = "",
) -> ir.Value:
    """Let all that read a value read what a new node makes of it and of ``others``."""
    node = ir.node(op_type, [value, *others], attributes, domain=domain)
    output, producer = node.outputs[0], value.producer()
    output.dtype, output.shape = ir.DataType.FLOAT, value.shape
    _redirect(graph, value, output, but=node)
    if producer is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(producer, node)
    return output


def _redirect(graph: ir.Graph, old: ir.Value, new: ir.Value, but: ir.Node | None = None) -> None:
    """Let all that read a value, except one node, read another; it becomes the graph's output too, with that name."""
    for use in _uses(old):
        if use.node is not but:
            use.node.replace_input_with(use.idx, new)
    for index, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[index] = new
            old.name, new.name = f"{old.name}_before", old.name


def _bypass(graph: ir.Graph, node: ir.Node) -> None:
    """Remove a node; what read its output reads its input."""
    _redirect(graph, node.outputs[0], _input(node))
    graph.remove(node, safe=True)
