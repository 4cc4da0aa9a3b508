"""Figures that the authors of the models report, as data: none of it is measured here.

All figures are of ImageNet-1K. A figure that is not published is None. GMACs and parameters of MobileOne and FastViT
are those of the reparameterized networks, parameters of CARE those of both heads.
"""
from collections.abc import Sequence
from dataclasses import dataclass

from ..models.backbone import resolve_alias

__all__ = ['PUBLISHED', 'PublishedRow', 'find_published', 'list_footnotes', 'list_paper_models', 'mark_accuracy']

CARE = 'the table of the CARE Transformer paper (CVPR 2025, arXiv:2411.16170)'
CAS_VIT = 'the CAS-ViT repository (Tianfang-Zhang/CAS-ViT), for arXiv:2408.03703v2'
MOBILENET_V4 = 'the MobileNetV4 paper (ECCV 2024, arXiv:2404.10518)'
MLLA = 'the MLLA paper (NeurIPS 2024, arXiv:2405.16605)'

WITH_TEACHER = 'with a teacher: hard distillation from RegNetY-16GF.'
WITH_MESA = (
    'with self-distillation: MESA, a loss towards the average of the weights; a user of the published code measured '
    'mlla_t about 0.4 lower without it.')
SECOND_GENERATION = (
    'second generation, without a teacher: weights of December 2024 at 224 x 224. XS, S, M and T fine-tuned at '
    '384 x 384 have 78.7, 81.1, 83.0 and 84.1; the first generation (August 2024) of the same networks has 77.5, 80.2, '
    '81.4 and 82.3, and what changed in training is not published.')
CAS_VIT_COUNTS = (
    'The published parameters of CAS-ViT include a second head that is not used; its published GMACs come from another '
    'counter, and are not known for S and M.')
FASTVIT_COUNTS = (
    'The published GMACs of FastViT are for images of 256 x 256, as counting shows; other rows are at 224 x 224.')
DEVICES = (
    'RTX 4090: milliseconds for a batch of 64, PyTorch eager, float32 with TF32 matmuls, mean of 40 after 10.',
    'iPhone 13: Core ML, batch 1, compute units not stated. Intel i9: batch 1, runtime and threads not stated.')


@dataclass(frozen=True)
class PublishedRow:
    """Published figures of a model: GMACs, millions of parameters, milliseconds on three devices, top-1 %.

    Attributes:
        timm_name: Its name in timm or here, None if it is in neither.
        source: Publication of its figures.
        accuracy_note: Difference from plain training, or which of several results it is; 'short: long'.
        note: Another remark on its figures.
    """
    name: str
    gmacs: float | None
    params_m: float | None
    iphone13_ms: float | None
    intel_i9_ms: float | None
    rtx4090_ms: float | None
    top1: float
    timm_name: str | None = None
    source: str = CARE
    accuracy_note: str = ''
    note: str = ''

    @property
    def size(self) -> int:
        """Side of the images of the GMACs, pixels."""
        return 256 if self.note == FASTVIT_COUNTS else 224


def _cas_vit(name: str, gmacs: float | None, params_m: float, top1: float, timm_name: str) -> PublishedRow:
    return PublishedRow(
        name, gmacs, params_m, None, None, None, top1, timm_name, CAS_VIT, SECOND_GENERATION, CAS_VIT_COUNTS)


PUBLISHED = (
    PublishedRow('MobileNetV2-1.0', 0.3, 3.5, 1.0, 1.1, 9.3, 71.8, 'mobilenetv2_100'),
    PublishedRow('MobileOne-S0', 0.3, 2.1, 1.1, 0.7, 9.9, 71.4, 'mobileone_s0'),
    PublishedRow('MobileViGv2-T', 0.6, 5.6, 1.1, 3.8, 10.3, 77.7),
    PublishedRow('FastViT-T8', 0.7, 3.6, 1.3, 11.1, 17.2, 76.7, 'fastvit_t8', note=FASTVIT_COUNTS),
    PublishedRow('EMO-5M', 0.9, 5.1, 2.7, 17.6, 18.3, 78.4),
    PublishedRow('MobileViGv2-S', 0.9, 7.7, 1.3, 5.6, 15.1, 79.8),
    PublishedRow('MobileOne-S2', 1.3, 7.8, 1.4, 2.2, 26.6, 77.4, 'mobileone_s2'),
    PublishedRow('SLAB-DeiT-T', 1.3, 6.2, 1.6, 6.2, 10.4, 73.6),
    PublishedRow('FastViT-T12', 1.4, 6.8, 2.1, 16.1, 26.1, 80.3, 'fastvit_t12', note=FASTVIT_COUNTS),
    PublishedRow('MobileViG-M', 1.5, 14.0, 1.6, 6.7, 19.4, 80.6),
    PublishedRow('MobileOne-S4', 3.0, 14.8, 2.4, 7.2, 50.8, 79.4, 'mobileone_s4'),
    PublishedRow('MLLA-T', 4.2, 25.0, 5.1, 21.3, 51.5, 83.5, 'mlla_t', accuracy_note=WITH_MESA),
    PublishedRow('CARE-S0', 0.7, 7.3, 1.1, 4.3, 9.8, 78.4, 'care_s0', accuracy_note=WITH_TEACHER),
    PublishedRow('CARE-S1', 1.0, 9.6, 1.4, 6.6, 14.2, 80.1, 'care_s1', accuracy_note=WITH_TEACHER),
    PublishedRow('CARE-S2', 1.9, 19.5, 2.0, 9.4, 20.4, 82.1, 'care_s2', accuracy_note=WITH_TEACHER),
    PublishedRow('MLLA-S', 7.3, 43, None, None, None, 84.4, 'mlla_s', MLLA, WITH_MESA),
    PublishedRow('MLLA-B', 16.2, 96, None, None, None, 85.3, 'mlla_b', MLLA, WITH_MESA),
    PublishedRow('MNv4-Conv-S', 0.2, 3.8, None, None, None, 73.8, 'mobilenetv4_conv_small', MOBILENET_V4),
    _cas_vit('CAS-ViT-XS', 0.560, 3.20, 78.3, 'casvit_xs'),
    _cas_vit('CAS-ViT-S', None, 5.76, 80.9, 'casvit_s'),
    _cas_vit('CAS-ViT-M', None, 12.42, 82.8, 'casvit_m'),
    _cas_vit('CAS-ViT-T', 3.597, 21.76, 83.9, 'casvit_t'),
)

_BY_NAME: dict[str, PublishedRow] = {row.timm_name: row for row in PUBLISHED if row.timm_name}


def list_paper_models() -> list[str]:
    """The models of the CARE paper's table that timm or this package has, in its order."""
    return [name for name, row in _BY_NAME.items() if row.source == CARE]


def find_published(model: str) -> PublishedRow | None:
    """The row of a model, by its name or an alias, with or without a tag of weights; None if there is none."""
    return _BY_NAME.get(resolve_alias(model).partition('.')[0])


def _number_notes(models: Sequence[str]) -> dict[str, list[str]]:
    """The notes on accuracies, in order, each with its models."""
    notes: dict[str, list[str]] = {}
    for model in dict.fromkeys(models):
        row = find_published(model)
        if row is not None and row.accuracy_note:
            notes.setdefault(row.accuracy_note, []).append(model)
    return notes


def mark_accuracy(model: str, models: Sequence[str]) -> str | None:
    """Published top-1 % of a model, with the number of its footnote in the table of `models`; None if unknown."""
    row = find_published(model)
    if row is None:
        return None
    notes = list(_number_notes(models))
    return f'{row.top1} [{notes.index(row.accuracy_note) + 1}]' if row.accuracy_note else str(row.top1)


def list_footnotes(models: Sequence[str]) -> list[str]:
    """Notes on the published figures of these models, one per line; numbered notes first."""
    rows = {model: row for model in models if (row := find_published(model)) is not None}
    lines = [f'[{number}] top-1 of {", ".join(names)}, {note}'
             for number, (note, names) in enumerate(_number_notes(models).items(), 1)]
    lines += dict.fromkeys(row.note for row in rows.values() if row.note)
    if any(row.rtx4090_ms is not None for row in rows.values()):
        lines += DEVICES
    sources: dict[str, list[str]] = {}
    for model, row in rows.items():
        sources.setdefault(row.source, []).append(model)
    return lines + [f'published figures of {", ".join(names)}: {source}' for source, names in sources.items()]
