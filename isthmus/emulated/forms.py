"""Lossy forms of a linear module: two thin factors, few bits a weight, or both.

Knows one module's arithmetic; knows no blocks, no data and no files. To `peft` each is a linear module, so that
adapters may stand around it; weights are [outputs, inputs] whatever the model's own module had.
"""

from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.nn.functional import linear, pad
from transformers.pytorch_utils import Conv1D

Bits: TypeAlias = Literal[4, 8]

GROUP = 64
"""Weights along the inputs that share one scale."""


class _Form(nn.Linear):
    """A linear module without a matrix of its own."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        nn.Module.__init__(self)  # no weight is made
        self.in_features, self.out_features = inputs, outputs
        self.register_parameter("bias", nn.Parameter(torch.zeros(outputs)) if bias else None)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The matrix that it stands for, [outputs, inputs], made anew at each reading."""
        return self.dense()

    def dense(self) -> torch.Tensor:
        """The matrix that it stands for, [outputs, inputs]."""
        raise NotImplementedError


class Quantised(_Form):
    """Weights of 4 or 8 bits: whole numbers around 0 in groups of `GROUP` along the inputs, each with its scale.

    Whole numbers are stored unsigned, shifted by half their range; those of 4 bits two in a byte, the lower half first.
    What a backward needs is made anew from them, so that no dense matrix is kept.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool, bits: Bits) -> None:
        super().__init__(inputs, outputs, bias)
        self.bits = bits
        groups = -(-inputs // GROUP)
        self.codes: torch.Tensor
        self.register_buffer("codes", torch.zeros(outputs, groups * GROUP * bits // 8, dtype=torch.uint8))
        self.scale = nn.Parameter(torch.zeros(outputs, groups))

    @torch.no_grad()
    def fill(self, weight_OI: torch.Tensor) -> None:
        """Round a matrix to this form: to nearest, the greatest weight of a group being its scale's greatest number."""
        groups_OGW = _in_groups(weight_OI)
        half = 1 << (self.bits - 1)
        self.scale.copy_(groups_OGW.abs().amax(-1) / (half - 1))
        scale = self.scale.float().clamp_min(torch.finfo(torch.float32).tiny)[..., None]
        whole = (groups_OGW / scale).round().clamp(-half, half - 1).add(half).to(torch.uint8).flatten(1)
        self.codes.copy_(whole if self.bits == 8 else whole[:, ::2] | whole[:, 1::2] << 4)

    def dense(self) -> torch.Tensor:
        """The matrix that it stands for, [outputs, inputs], in the scales' dtype."""
        return _dense(self.codes, self.scale, self.bits, self.in_features)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (torch's name)
        """From [..., inputs] to [..., outputs], as any linear module."""
        output: torch.Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            input, self.codes, self.scale, self.bits, self.in_features
        )
        return output if self.bias is None else output + self.bias


class Factored(_Form):
    """Two thin matrices in a row: `down` [rank, inputs], then `up` [outputs, rank]."""

    def __init__(self, inputs: int, outputs: int, bias: bool, rank: int, bits: Bits | None = None) -> None:
        super().__init__(inputs, outputs, bias)
        self.down = _dense_or_quantised(inputs, rank, bits)
        self.up = _dense_or_quantised(rank, outputs, bits)

    def dense(self) -> torch.Tensor:
        """The matrix that it stands for, [outputs, inputs]: up times down."""
        return self.up.weight @ self.down.weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (torch's name)
        """From [..., inputs] over [..., rank] to [..., outputs], as any linear module."""
        output: torch.Tensor = self.up(self.down(input))
        return output if self.bias is None else output + self.bias


def shape_of(module: nn.Module) -> tuple[int, int, bool]:
    """Inputs, outputs and whether there is a bias, of a linear module in either of Hugging Face's two forms."""
    outputs, inputs = module.weight.shape  # type: ignore[misc]
    if isinstance(module, Conv1D):
        outputs, inputs = inputs, outputs
    return int(inputs), int(outputs), module.bias is not None


def matrix_of(module: nn.Module) -> torch.Tensor:
    """A linear module's matrix as [outputs, inputs]."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight


def form_of(module: nn.Module, rank: int | None, bits: Bits | None) -> nn.Module:
    """An empty stand-in of a linear module, on its device and in its dtype; the module itself if it stays as it is."""
    if rank is None and bits is None:
        return module
    inputs, outputs, bias = shape_of(module)
    with torch.device(module.weight.device):  # type: ignore[arg-type]
        form: nn.Module
        if rank is not None:
            form = Factored(inputs, outputs, bias, rank, bits)
        else:
            form = Quantised(inputs, outputs, bias, bits or 8)
    return form.to(module.weight.dtype).requires_grad_(False)  # type: ignore[arg-type]


def _dense_or_quantised(inputs: int, outputs: int, bits: Bits | None) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False) if bits is None else Quantised(inputs, outputs, False, bits)


def _in_groups(matrix_OI: torch.Tensor) -> torch.Tensor:
    """As float32, the inputs in groups, the last filled up with zeros: [outputs, groups, GROUP]."""
    outputs, inputs = matrix_OI.shape
    return pad(matrix_OI.float(), (0, -inputs % GROUP)).reshape(outputs, -1, GROUP)


def _whole(codes: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The whole numbers around 0, in groups: [outputs, groups, GROUP]; every floating type holds them exactly."""
    outputs, width = codes.shape
    if bits == 4:
        whole = codes.new_empty(outputs, width, 2, dtype=dtype)
        whole[..., 0], whole[..., 1] = codes & 15, codes >> 4
    else:
        whole = codes.to(dtype)
    return whole.view(outputs, -1, GROUP).sub_(1 << (bits - 1))


def _dense(codes: torch.Tensor, scale: torch.Tensor, bits: int, inputs: int) -> torch.Tensor:
    """In the scales' own type throughout: a pass over the matrix costs as much as a small batch's product."""
    return _whole(codes, bits, scale.dtype).mul_(scale[..., None]).flatten(1)[:, :inputs]


class _Product(torch.autograd.Function):
    """A product with a matrix that exists only while it is multiplied; differentiable in input and scales."""

    @staticmethod
    def forward(
        context: Any,
        input: torch.Tensor,  # noqa: A002
        codes: torch.Tensor,
        scale: torch.Tensor,
        bits: int,
        inputs: int,
    ) -> torch.Tensor:
        context.bits, context.inputs = bits, inputs
        context.save_for_backward(codes, scale, *([input] if context.needs_input_grad[2] else []))
        return linear(input, _dense(codes, scale, bits, inputs))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        codes, scale, *kept = context.saved_tensors
        grad_input = grad @ _dense(codes, scale, context.bits, context.inputs) if context.needs_input_grad[0] else None
        grad_scale = None
        if kept:
            grad_OI = grad.flatten(0, -2).T @ kept[0].flatten(0, -2)
            groups_OGW = _in_groups(grad_OI)
            grad_scale = (groups_OGW * _whole(codes, context.bits, torch.float32)).sum(-1).to(scale.dtype)
        return grad_input, None, grad_scale, None, None
