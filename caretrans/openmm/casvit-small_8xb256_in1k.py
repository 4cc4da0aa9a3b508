_base_ = 'casvit.py'

model = dict(backbone=dict(arch='small'), head=dict(in_channels=256))
