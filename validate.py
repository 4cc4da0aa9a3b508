"""Evaluate a checkpoint: python validate.py CHECKPOINT [DATA] [flags]. Prints top-1, top-5, loss, images, images/s."""
import argparse
import json
import sys

import caretrans  # noqa: F401 (registers the models)
from caretrans.checkpoint import CheckpointError
from caretrans.config import ConfigError, number
from caretrans.data import DataError
from caretrans.engine import resolve_device
from caretrans.evaluation import evaluate_checkpoint
from caretrans.progress import show_messages


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('checkpoint', help='.pth, .pth.tar or .safetensors, published or of train.py')
    parser.add_argument('data', nargs='?', default='', help='folder with val/CLASS/*; by default that of the training')
    parser.add_argument('--dataset', default='', help="a data set of timm's factory instead of folders")
    parser.add_argument('--split', default='', help='split to evaluate, by default that of the training, or val')
    parser.add_argument('--model', dest='model_name', help='where the checkpoint does not say it')
    parser.add_argument('--entry', help='entry of the file that holds the weights, e.g. state_dict_ema')
    parser.add_argument('--img-size', type=number(int, 32), help='side of the images, pixels')
    parser.add_argument('--crop-pct', type=number(float, 0.01, 1), help='centre crop as a share of the image')
    parser.add_argument('--interpolation', choices=['bicubic', 'bilinear', 'nearest', 'lanczos'], help='of resizing')
    parser.add_argument('--batch-size', type=number(int, 1), default=64)
    parser.add_argument('--workers', type=number(int, 0), default=2, help='processes that load images')
    parser.add_argument('--amp', default='off', choices=['off', 'bf16', 'fp16'], help='autocast of the forward pass')
    parser.add_argument('--device', default='auto', help='cpu, cuda, mps or auto')
    parser.add_argument('--json', action='store_true', help='print one JSON object instead of text')
    return parser.parse_args()


def main() -> int:
    flags = vars(parse_flags())
    show_messages()
    as_json = flags.pop('json')
    try:
        flags['device'] = resolve_device(flags['device'])
        result = evaluate_checkpoint(**flags, progress_stream=sys.stderr if as_json else None)
    except (ConfigError, DataError, CheckpointError) as error:
        print(f'validate.py: {error}', file=sys.stderr)
        return 2
    if as_json:
        print(json.dumps(result, indent=2))
        return 0
    config = result['eval_config']
    size = 'x'.join(str(side) for side in config['input_size'][1:])
    entry = f', entry {result["entry"]}' if result['entry'] else ''
    print(f'{result["model"]} from {result["checkpoint"]}{entry}, on {result["data"]}')
    print(f'{size} pixels, {config["interpolation"]}, crop_pct {config["crop_pct"]}')
    print(f'top-1 {result["top1"]:.3f} %   top-5 {result["top5"]:.3f} %   loss {result["loss"]:.4f}   '
          f'{result["images"]} images   {result["images_per_s"]:.1f} images/s')
    return 0


if __name__ == '__main__':
    sys.exit(main())
