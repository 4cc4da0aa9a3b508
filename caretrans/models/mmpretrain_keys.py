"""The keys of CAS-ViT in the files of the converter for mmpretrain (`casvit_to_mmpretrain.py` of BackboneHub)."""

__all__ = ['MMPRETRAIN_KEYS']

MMPRETRAIN_KEYS = (  # part of a published key, part of one for mmpretrain, as in `published_keys`
    ('^patch_embed.0', '^backbone.downsample_layers.0.conv1.conv'),
    ('^patch_embed.1', '^backbone.downsample_layers.0.conv1.bn'),
    ('^patch_embed.3', '^backbone.downsample_layers.0.conv2.conv'),
    ('^patch_embed.4', '^backbone.downsample_layers.0.conv2.bn'),
    *((f'^network.{2 * i}', f'^backbone.stages.{i}') for i in range(4)),
    *((f'^network.{2 * i + 1}', f'^backbone.downsample_layers.{i + 1}') for i in range(3)),
    *((f'attn.oper_{x}.0.block.0', f'attn.oper_{x}.0.block.0.conv') for x in 'qk'),  # before what becomes block.1
    *((f'attn.oper_{x}.0.block.1', f'attn.oper_{x}.0.block.0.bn') for x in 'qk'),
    *((f'attn.oper_{x}.0.block.3', f'attn.oper_{x}.0.block.1.conv') for x in 'qk'),
    *((f'attn.oper_{x}.1.block.1', f'attn.oper_{x}.1.block.1.conv') for x in 'qk'),
    ('local_perception.network.0', 'local_perception.network.0.conv'),
    ('local_perception.network.1', 'local_perception.network.0.bn'),
    ('local_perception.network.2', 'local_perception.network.1.conv'),
    ('local_perception.network.4', 'local_perception.network.2'),
    ('^norm', '^backbone.norm3'),
    ('^head', '^head.fc'),
)
