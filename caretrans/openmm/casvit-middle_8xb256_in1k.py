_base_ = 'casvit.py'

model = dict(backbone=dict(arch='middle'), head=dict(in_channels=384))
