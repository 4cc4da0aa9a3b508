"""Data sets, transforms, loaders, shards, and the preparation of ImageNet."""
from ..errors import DataError
from .datasets import check_labels, describe_classes, find_labels, list_classes, name_image, open_dataset
from .decode import EvalTransform

__all__ = [
    'DataError', 'EvalTransform', 'check_labels', 'describe_classes', 'find_labels', 'list_classes', 'name_image',
    'open_dataset']
