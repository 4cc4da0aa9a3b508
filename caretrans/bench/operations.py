"""Kinds of operations, by the names under which PyTorch's profiler and dispatcher report them."""
import re
from collections.abc import Iterator, Sequence

import torch.nn as nn

__all__ = ['CONVOLUTIONS', 'KINDS', 'classify_operation', 'find_attention']

POINTWISE, DEPTHWISE, OTHER_CONV = CONVOLUTIONS = ('conv 1x1', 'conv depth-wise', 'conv other')
ATTENTION, LINEAR, COPIES, GENERATED, REST = 'attention', 'linear', 'copies', 'generated', 'rest'
KINDS = (
    *CONVOLUTIONS, ATTENTION, LINEAR, 'conv or product',  # the last: kernels whose names do not tell them apart
    'activation', 'normalisation', 'element-wise', COPIES, 'optimizer', GENERATED, REST)

OURS = 'caretrans::'  # the operations of `caretrans.kernels`; one may launch kernels of several kinds
OUR_KERNELS = {  # our operations and the kernels they launch, by name: kind
    **dict.fromkeys((f'{OURS}mix_with_strips', f'{OURS}mix_with_strips_backward'), DEPTHWISE),
    **dict.fromkeys(('_convolve', '_weight_gradients'), DEPTHWISE),
    **dict.fromkeys((f'{OURS}attend', f'{OURS}attend_backward', '_forward', '_backward'), ATTENTION),
    **dict.fromkeys((f'{OURS}mix_with_attention', f'{OURS}mix_with_attention_backward'), ATTENTION),
    **dict.fromkeys((f'{OURS}expand', '_expand'), POINTWISE),  # with GELU and depth-wise convolution
}
OPERATIONS = (  # kind, names of operations (aten's, oneDNN's, of compiled programs, of kernels); the first that matches
    (GENERATED, r'^(triton_|graph_\d+_cpp_|cpp_fused_|graph_\d+_kernel)'),
    ('optimizer', r'^Optimizer\.(step|zero_grad)#|_fused_adam|vector_norm|^_foreach_'),
    ('conv or product', r'gemm|nvjet|cutlass'),
    (ATTENTION, r'attention|attn|^(matmul|bmm|baddbmm|einsum)$|^Bmm'),  # products of two maps
    ('convolution', r'conv(?!olutionbackward)'),  # autograd's own entry does not show the weights, those in it do
    (LINEAR, r'^(linear|addmm|mm|_linear_pointwise|_mkl_linear)$|^(Addmm|Mm)Backward'),
    ('activation', r'gelu|relu|silu|sigmoid|tanh|hardswish|elu|softmax|leaky'),
    ('normalisation', r'norm(?!al)|instance_norm'),
    (COPIES, r'^(copy_|clone|contiguous|cat|stack|to|_to_copy|reshape|flatten|roll|pad|constant_pad_nd|permute_copy|'
             r'_reshape_copy|to_dense|to_mkldnn|fill_|zero_|zeros|zeros_like)$|reorder|^(Cat|Copy)Backward|CopyBackwards'),
    ('element-wise', r'^(add|sub|mul|div|neg|where|exp|log|clamp|lt|gt|pow|sqrt|rsub|reciprocal|abs|bernoulli)_?$|'
                     r'^(Add|Sub|Mul|Div|Where|Exp|Clamp)Backward|accumulategrad'),
)


def classify_operation(name: str, shapes: Sequence[Sequence[int]] = ()) -> str | None:
    """The kind, one of `KINDS`, of an operation called as in the profiler; None if the name says nothing.

    Args:
        name: E.g. 'aten::conv2d', 'mkldnn::_convolution_pointwise', 'autograd::engine::evaluate_function: MmBackward0'.
        shapes: Of its arguments, () for those that are no tensors; they tell the convolutions apart.
    """
    if name in OUR_KERNELS:
        return OUR_KERNELS[name]
    name = re.sub(r'^(\w+::)?(engine::evaluate_function: )?', '', name)
    for kind, pattern in OPERATIONS:
        if re.search(pattern, name, re.IGNORECASE):
            return _classify_convolution(name, shapes) if kind == 'convolution' else kind
    return None


def _classify_convolution(name: str, shapes: Sequence[Sequence[int]]) -> str:
    """By the weights, (out, in / groups, height, width), which come last of the maps, and the map before them."""
    maps = [shape for shape in shapes if len(shape) == 4]
    if len(maps) < 2:
        return DEPTHWISE if re.search('depthwise|dwconv', name) else OTHER_CONV
    chs, weight = maps[-2][1], maps[-1]
    if weight[1] == 1 and chs > 1:
        return DEPTHWISE
    return POINTWISE if tuple(weight[2:]) == (1, 1) and weight[1] == chs else OTHER_CONV


def find_attention(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that are attention by their class, ours and timm's: LinearAttention, Attention2d, LiteMLA ..."""
    for module in model.modules():
        if re.search(r'(Attention|Attn|MLA)(\dd)?$', type(module).__name__):
            yield module
