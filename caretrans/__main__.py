"""Small commands: python -m caretrans predict | convert. See --help of each."""
import argparse
import json
import os
import sys
from typing import Optional, Sequence

from .checkpoint import CheckpointError, convert_checkpoint
from .config import ConfigError, number
from .data import DataError
from .engine import resolve_device
from .evaluation import predict_images
from .progress import show_messages


def _parse_flags(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='python -m caretrans', description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True)

    predict = commands.add_parser('predict', help='name what is on images')
    predict.add_argument('images', nargs='+', help='image files, and folders of them')
    predict.add_argument('--checkpoint', required=True, help='.pth, .pth.tar or .safetensors, published or of train.py')
    predict.add_argument('--model', dest='model_name', help='where the checkpoint does not say it')
    predict.add_argument('--entry', help='entry of the file that holds the weights, e.g. state_dict_ema')
    predict.add_argument('--topk', type=number(int, 1), default=5, help='how many classes per image (default: 5)')
    predict.add_argument('--img-size', type=number(int, 32), help='side of the images, pixels')
    predict.add_argument('--crop-pct', type=number(float, 0.01, 1), help='centre crop as a share of the image')
    predict.add_argument('--interpolation', choices=['bicubic', 'bilinear', 'nearest', 'lanczos'], help='of resizing')
    predict.add_argument('--device', default='auto', help='cpu, cuda, mps or auto')
    predict.add_argument('--json', action='store_true', help='print one JSON object per image')

    convert = commands.add_parser('convert', help='rewrite a checkpoint in the published layout, or in ours')
    convert.add_argument('source')
    convert.add_argument('target', help='.pth, .pth.tar or .safetensors decides the format')
    convert.add_argument('--to', dest='layout', required=True, choices=['published', 'caretrans'])
    convert.add_argument('--entry', help='entry of the source that holds the weights')
    convert.add_argument('--overwrite', action='store_true', help='replace the target')
    return parser.parse_args(argv)


def _predict(as_json: bool, device: str, **options) -> int:
    failed = 0
    for result in predict_images(device=resolve_device(device), **options):
        if as_json:
            print(json.dumps(result))
        elif 'error' not in result:
            print(result['image'])
            for name, probability in zip(result['classes'], result['probabilities'], strict=True):
                print(f'  {100 * probability:5.1f} %  {name}')
        if 'error' in result:
            failed += 1
            print(f'{result["image"]}: {result["error"]}', file=sys.stderr)
    return 1 if failed else 0


def main(argv: Optional[Sequence[str]] = None) -> int:
    options = vars(_parse_flags(argv))
    command = options.pop('command')
    show_messages()
    try:
        if command == 'predict':
            return _predict(options.pop('json'), **options)
        print(convert_checkpoint(**options))
        return 0
    except BrokenPipeError:  # the reader, `head` for instance, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (CheckpointError, ConfigError, DataError) as error:
        print(f'caretrans {command}: {error}', file=sys.stderr)
        return 2


if __name__ == '__main__':
    sys.exit(main())
