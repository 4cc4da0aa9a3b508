"""Data sets, transforms, loaders, shards, and the preparation of ImageNet."""
from ..errors import DataError
from .datasets import (
    CHANNEL_ORDERS, build_eval_transform, check_labels, describe_classes, find_labels, list_classes, name_image,
    open_dataset)

__all__ = [
    'CHANNEL_ORDERS', 'DataError', 'build_eval_transform', 'check_labels', 'describe_classes', 'find_labels',
    'list_classes', 'name_image', 'open_dataset']
