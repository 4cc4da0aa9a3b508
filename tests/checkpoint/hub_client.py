"""Calls of timm's hub functions, in a separate process: huggingface_hub reads HF_ENDPOINT when it is imported.

    HF_ENDPOINT=... python tests/checkpoint/hub_client.py    # prints {step: outcome} as JSON
"""
import json
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import timm  # noqa: E402
import torch  # noqa: E402
from reference import published_state_dict  # noqa: E402
from timm.models import push_to_hf_hub  # noqa: E402

import caretrans  # noqa: E402, F401 (registers the models)
from caretrans.models.published_keys import rename_keys  # noqa: E402


def is_published(model, *parts):
    """Whether the tensors of a care_s0, or those whose keys begin with one of `parts`, are the published ones."""
    published = rename_keys(model.state_dict(), model.published_keys, to_published=True)
    keys = [key for key in published if key.startswith(parts or ('',))]
    return bool(keys) and all(torch.equal(published[key], published_state_dict('care_s0')[key]) for key in keys)


def load_published():
    return is_published(timm.create_model('care_s0', pretrained=True))


def load_published_for_other_classes():
    model = timm.create_model('care_s0', pretrained=True, num_classes=14)
    return is_published(model, 'stem', 'stages') and list(model(torch.zeros(1, 3, 64, 64)).shape) == [1, 14]


def load_wrapped():
    return is_published(timm.create_model('care_s0', pretrained=True, pretrained_cfg_overlay=dict(
        hf_hub_id='someone/wrapped', hf_hub_filename='best.pth.tar')))


def load_missing_file():
    timm.create_model('care_s1', pretrained=True)


def load_missing_repository():
    timm.create_model('care_s0', pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id='nobody/nothing'))


def push_and_load():
    torch.manual_seed(1)
    pushed = timm.create_model('care_s0', num_classes=14, in_chans=1, ablation='no_inter1').eval()
    push_to_hf_hub(pushed, 'me/care-fruit', model_config=dict(label_names=[f'fruit{i}' for i in range(14)]))
    loaded = timm.create_model('hf-hub:me/care-fruit', pretrained=True).eval()
    x = torch.randn(2, 1, 64, 64)
    return torch.equal(loaded(x), pushed(x)) and loaded.pretrained_cfg['label_names'][13] == 'fruit13'


def load_pushed_for_other_classes():
    model = timm.create_model('hf-hub:me/care-fruit', pretrained=True, num_classes=5)
    return list(model(torch.zeros(1, 1, 64, 64)).shape) == [1, 5]


def load_pushed_features():
    model = timm.create_model('hf-hub:me/care-fruit', pretrained=True, features_only=True)
    return [x.shape[2] for x in model(torch.zeros(1, 1, 64, 64))] == [16, 8, 4, 2]


def load_published_from_a_hub_model():
    return is_published(timm.create_model('hf-hub:someone/published', pretrained=True))


STEPS = (
    load_published, load_published_for_other_classes, load_wrapped, load_missing_file, load_missing_repository,
    push_and_load, load_pushed_for_other_classes, load_pushed_features, load_published_from_a_hub_model)


if __name__ == '__main__':
    outcomes = {}
    with tempfile.TemporaryDirectory() as folder:
        torch.hub.set_dir(folder)
        for step in STEPS:
            try:
                outcomes[step.__name__] = step()
            except Exception as error:  # an outcome too
                outcomes[step.__name__] = f'{type(error).__name__}: {error}'
    print(json.dumps(outcomes))
