"""Detection, instance and semantic segmentation with any backbone here, as mmdet and mmseg compute them.

    model, checkpoint = create_from_checkpoint('retinanet_casvit_xs.pth')   # published, or written by this package
    model = create_dense_model('mask_rcnn', 'care_s0', num_classes=3, checkpoint='CARETrans_S0.pth.tar')
"""
from .backbone import DenseBackbone, create_dense_backbone
from .load import TASKS, convert_checkpoint, create_dense_model, create_from_checkpoint, save_checkpoint

__all__ = [
    'TASKS', 'DenseBackbone', 'convert_checkpoint', 'create_dense_backbone', 'create_dense_model',
    'create_from_checkpoint', 'save_checkpoint']
