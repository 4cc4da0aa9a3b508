"""The published table of the paper, as data: what its authors report, none of it measured here.

Source: the CARE Transformer paper (CVPR 2025, arXiv:2411.16170), ImageNet-1K. GMACs and parameters of
MobileOne and FastViT are those of the reparameterised networks, parameters of CARE those of both heads.
"""
from dataclasses import dataclass
from typing import Dict, List, Optional

__all__ = ['FOOTNOTES', 'PUBLISHED', 'PublishedRow', 'find_published', 'list_paper_models']

FOOTNOTES = (
    'Accuracies of CARE are with a teacher (hard distillation from RegNetY-16GF); those of the other rows as their '
    'authors report them.',
    'The published GMACs of FastViT are those of images of 256 x 256, as counting shows; other rows are at 224 x 224.',
    'RTX 4090: milliseconds for a batch of 64, PyTorch eager, float32 with TF32 matrix products, mean of 40 after 10.',
    'iPhone 13: Core ML, batch 1, compute units not stated. Intel i9: batch 1, runtime and threads not stated.',
)


@dataclass(frozen=True)
class PublishedRow:
    """One row: GMACs, millions of parameters, milliseconds on three devices, top-1 %; `timm_name` if timm has it."""
    name: str
    gmacs: float
    params_m: float
    iphone13_ms: float
    intel_i9_ms: float
    rtx4090_ms: float
    top1: float
    timm_name: Optional[str] = None


PUBLISHED = (
    PublishedRow('MobileNetV2-1.0', 0.3, 3.5, 1.0, 1.1, 9.3, 71.8, 'mobilenetv2_100'),
    PublishedRow('MobileOne-S0', 0.3, 2.1, 1.1, 0.7, 9.9, 71.4, 'mobileone_s0'),
    PublishedRow('MobileViGv2-T', 0.6, 5.6, 1.1, 3.8, 10.3, 77.7),
    PublishedRow('FastViT-T8', 0.7, 3.6, 1.3, 11.1, 17.2, 76.7, 'fastvit_t8'),
    PublishedRow('EMO-5M', 0.9, 5.1, 2.7, 17.6, 18.3, 78.4),
    PublishedRow('MobileViGv2-S', 0.9, 7.7, 1.3, 5.6, 15.1, 79.8),
    PublishedRow('MobileOne-S2', 1.3, 7.8, 1.4, 2.2, 26.6, 77.4, 'mobileone_s2'),
    PublishedRow('SLAB-DeiT-T', 1.3, 6.2, 1.6, 6.2, 10.4, 73.6),
    PublishedRow('FastViT-T12', 1.4, 6.8, 2.1, 16.1, 26.1, 80.3, 'fastvit_t12'),
    PublishedRow('MobileViG-M', 1.5, 14.0, 1.6, 6.7, 19.4, 80.6),
    PublishedRow('MobileOne-S4', 3.0, 14.8, 2.4, 7.2, 50.8, 79.4, 'mobileone_s4'),
    PublishedRow('MLLA-T', 4.2, 25.0, 5.1, 21.3, 51.5, 83.5),
    PublishedRow('CARE-S0', 0.7, 7.3, 1.1, 4.3, 9.8, 78.4, 'care_s0'),
    PublishedRow('CARE-S1', 1.0, 9.6, 1.4, 6.6, 14.2, 80.1, 'care_s1'),
    PublishedRow('CARE-S2', 1.9, 19.5, 2.0, 9.4, 20.4, 82.1, 'care_s2'),
)

_BY_NAME: Dict[str, PublishedRow] = {row.timm_name: row for row in PUBLISHED if row.timm_name}


def list_paper_models() -> List[str]:
    """The models of the table that timm or this package has, in its order."""
    return list(_BY_NAME)


def find_published(model: str) -> Optional[PublishedRow]:
    """The row of a model, by its name without a tag of weights; None if the table has none."""
    return _BY_NAME.get(model.split('.')[0])
