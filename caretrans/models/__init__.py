"""The networks; importing this package registers them with timm."""
from .attention import linear_attention
from .care import CareTransformer

__all__ = ['CareTransformer', 'linear_attention']
