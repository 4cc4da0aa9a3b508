_base_ = 'casvit.py'

model = dict(backbone=dict(arch='xsmall'), head=dict(in_channels=220))
