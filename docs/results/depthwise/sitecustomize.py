"""Faster training of timm's EfficientNets on a CPU with `--amp_dtype bf16`.

PYTHONPATH=docs/results/depthwise python scripts/run_experiments.py ...

Python imports a file of this name by itself when it starts. This one gives depthwise convolutions,
under bfloat16 autocast on the CPU, another backward pass: the gradient of the input as a convolution
with the flipped kernel, that of the kernel in float32 and then rounded. The library's own takes most of
an iteration there.
"""

import importlib.abc
import importlib.util
import sys


class AfterTimm(importlib.abc.MetaPathFinder):
    """Replaces torch's convolution once timm is imported: processes without it lose no time."""

    def find_spec(self, name, path, target=None):
        if name != "timm":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (execute(module), replace_convolution())
        return spec


def replace_convolution():
    import torch
    import torch.nn.functional as F

    plain = F.conv2d

    class Depthwise(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w, stride, padding, dilation):
            ctx.save_for_backward(x, w)
            ctx.how = stride, padding, dilation
            return plain(x, w, None, stride, padding, dilation, len(w))

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            stride, padding, dilation = ctx.how
            sides = zip(stride, padding, dilation, w.shape[2:], strict=True)
            same_size = all(s == 1 and 2 * p == d * (k - 1) for s, p, d, k in sides)
            g = g.contiguous(memory_format=torch.channels_last)
            of_x, of_w, _ = torch.ops.aten.convolution_backward(
                *(t.float() for t in (g, x, w)),
                None, stride, padding, dilation, False, [0, 0], len(w), [not same_size, True, False],
            )  # fmt: skip
            if same_size:
                of_x = plain(g, w.flip(2, 3), None, stride, padding, dilation, len(w))
            return of_x.to(x.dtype), of_w.to(w.dtype), None, None, None

    def conv2d(x, w, bias=None, stride=1, padding=0, dilation=1, groups=1):
        bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        depthwise = groups == len(w) == x.shape[1] > 1 and bias is None and not isinstance(padding, str)
        if not (bf16 and depthwise and x.device.type == "cpu" and torch.is_grad_enabled()):
            return plain(x, w, bias, stride, padding, dilation, groups)
        pairs = ([v, v] if isinstance(v, int) else list(v) for v in (stride, padding, dilation))
        return Depthwise.apply(x.bfloat16(), w.bfloat16(), *pairs)

    F.conv2d = conv2d


sys.meta_path.insert(0, AfterTimm())
