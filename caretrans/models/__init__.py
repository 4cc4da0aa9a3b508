"""The networks; importing this package registers them with timm."""
from .attention import linear_attention
from .care import CareTransformer
from .casvit import CasVit
from .mlla import Mlla

__all__ = ['CareTransformer', 'CasVit', 'Mlla', 'linear_attention']
