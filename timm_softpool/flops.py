"""What SoftPool and recurrent layers cost, told to fvcore and to ``torch.utils.flop_counter``.

For a window of K cells, a forward pass counts ``3 K + 1`` multiply-accumulates (MAC) for each output: K exponentials,
K additions to their sum, K multiply-adds of the weighted sum, one division. A backward pass counts ``5 K + 1``: the
same once more, then two multiply-adds for each cell. fvcore counts in MAC; ``torch.utils.flop_counter`` counts FLOP,
two for each MAC, as it does for convolutions.

LSTM, GRU and RNN count a MAC for each weight of their matrices and each step, as ``torch.utils.flop_counter`` has it
on other devices than the CPU; without this module, fvcore counts them as 0, and the latter an LSTM on the CPU.

Neither counter is imported here: each learns the formula when the program imports it.
"""
from __future__ import annotations

import importlib.abc
import importlib.util
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch


def forward_macs(output_numel: int, kernel_size: Sequence[int]) -> int:
    """MAC of a forward pass with ``output_numel`` outputs."""
    return output_numel * (3 * math.prod(kernel_size) + 1)


def backward_macs(output_numel: int, kernel_size: Sequence[int]) -> int:
    """MAC of a backward pass with ``output_numel`` outputs."""
    return output_numel * (5 * math.prod(kernel_size) + 1)


def recurrent_macs(steps: int, weight_shapes: Sequence[Sequence[int]]) -> int:
    """MAC of recurrent layers over ``steps`` frames of all sequences together; biases, of one axis, are free."""
    return steps * sum(math.prod(shape) for shape in weight_shapes if len(shape) == 2)


def count_macs(model: Any, input_size: tuple[int, ...]) -> int:
    """Multiply-accumulates of one image of ``input_size``, half of what `torch.utils.flop_counter` counts."""
    from torch.utils.flop_counter import FlopCounterMode

    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *input_size, device=device))
    return counter.get_total_flops() // 2


def _teach_fvcore(flop_count: ModuleType) -> None:
    def handle(inputs: list[Any], outputs: list[Any]) -> int:
        kernel_size = [size.toIValue() for size in inputs[1].node().inputs()]
        return forward_macs(math.prod(outputs[0].type().sizes()), kernel_size)

    def recurrent_handle(inputs: list[Any], outputs: list[Any]) -> int:
        steps = math.prod(inputs[0].type().sizes()[:-1])
        shapes = [weight.type().sizes() for weight in inputs[2].node().inputs()]
        return recurrent_macs(steps, shapes)

    # fvcore has no public way to register an operator for all its counters.
    try:
        handles = flop_count._DEFAULT_SUPPORTED_OPS
    except AttributeError as error:
        warnings.warn(f'timm-softpool does not know this fvcore, which will not count SoftPool: {error}', stacklevel=2)
        return
    handles.setdefault('timm_softpool::soft_pool', handle)
    for name in ('lstm', 'gru', 'rnn_tanh', 'rnn_relu'):
        handles.setdefault(f'aten::{name}', recurrent_handle)


def _teach_torch(flop_counter: ModuleType) -> None:
    ops, aten = torch.ops.timm_softpool, torch.ops.aten

    def forward(input_shape, kernel_size, *args, out_shape=None, **kwargs) -> int:
        return 2 * forward_macs(math.prod(out_shape), kernel_size)

    def backward(grad_shape, input_shape, kernel_size, *args, out_shape=None, **kwargs) -> int:
        return 2 * backward_macs(math.prod(grad_shape), kernel_size)

    # How PyTorch runs each layer of an LSTM on the CPU.
    def lstm(input_shape, input_weight, state_weight, *args, out_shape=None, **kwargs) -> int:
        return 2 * recurrent_macs(math.prod(input_shape[:-1]), (input_weight, state_weight))

    def lstm_backward(*args, **kwargs) -> int:
        return 2 * lstm(*args)  # the gradients of input and weights

    for op, formula in ((ops.soft_pool, forward), (ops.soft_pool_backward, backward), (aten.mkldnn_rnn_layer, lstm),
                        (aten.mkldnn_rnn_layer_backward, lstm_backward)):
        if op not in flop_counter.flop_registry:
            flop_counter.register_flop_formula(op)(formula)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls ``teach(module)`` once, right after the module ``name`` has been imported by whoever needs it."""

    def __init__(self, name: str, teach: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.teach = teach
        self.is_looking = False

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.name or self.is_looking:
            return None
        self.is_looking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.is_looking = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_teach(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.teach(module)

        spec.loader.exec_module = execute_and_teach  # type: ignore[method-assign]
        return spec


for _name, _teach in (('fvcore.nn.flop_count', _teach_fvcore), ('torch.utils.flop_counter', _teach_torch)):
    if _name in sys.modules:
        _teach(sys.modules[_name])
    else:
        sys.meta_path.insert(0, _AfterImport(_name, _teach))
