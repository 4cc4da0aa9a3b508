_base_ = 'casvit.py'

model = dict(backbone=dict(arch='tiny'), head=dict(in_channels=512))
