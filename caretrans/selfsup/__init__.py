"""Self-supervised pre-training: the CARE of NeurIPS 2021 (arXiv:2110.05340), for ResNets and any backbone here.

Called selfsup everywhere, because CARE is also the name of the networks of this package, of which it knows nothing.

    module = load_pretraining('care_r50_100e.pth.tar')    # published, or written here
    losses = module(view1, view2)                          # loss, c, t, attention
    module.update_teacher(step, total_steps)
"""
from .pretraining import Design, Pretraining
from .weights import convert_pretraining, is_pretraining, load_pretraining, save_pretraining

__all__ = ['Design', 'Pretraining', 'convert_pretraining', 'is_pretraining', 'load_pretraining', 'save_pretraining']
