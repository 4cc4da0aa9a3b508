"""Evaluate a checkpoint: python validate.py CHECKPOINT [DATA] [flags]. Prints top-1, top-5, loss, images, images/s."""
import argparse
import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout

import caretrans  # noqa: F401 (registers the models)
from caretrans.config import CROP_MODES, number
from caretrans.data import CHANNEL_ORDERS
from caretrans.devices import resolve_device
from caretrans.distributed import find_processes
from caretrans.errors import CheckpointError, ConfigError, DataError
from caretrans.evaluation import describe_result, evaluate_checkpoint
from caretrans.fuse import FORMS
from caretrans.progress import show_messages


def parse_flags() -> argparse.Namespace:
    """The flags; of several processes only the primary says what is wrong with them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('checkpoint', help='.pth, .pth.tar or .safetensors, published or of train.py')
    parser.add_argument('data', nargs='?', default='', help='folder with val/CLASS/*; by default that of the training')
    parser.add_argument('--dataset', default='', help="a data set of timm's factory instead of folders")
    parser.add_argument('--split', default='', help='split to evaluate, by default that of the training, or val')
    parser.add_argument('--model', dest='model_name', help='where the checkpoint does not say it')
    parser.add_argument('--entry', help='entry of the file that holds the weights, e.g. state_dict_ema')
    parser.add_argument('--img-size', type=number(int, 32), help='side of the images, pixels')
    parser.add_argument('--crop-pct', type=number(float, 0.01, 1), help='centre crop as a share of the image')
    parser.add_argument('--crop-mode', choices=CROP_MODES,
                        help='crop the centre, squash the whole image to a square (CAS-ViT from 384 pixels on), or '
                             'border; by default of the checkpoint')
    parser.add_argument('--channel-order', choices=CHANNEL_ORDERS,
                        help='by default of the checkpoint, else rgb; published files of CAS-ViT may need bgr')
    parser.add_argument('--interpolation', choices=['bicubic', 'bilinear', 'nearest', 'lanczos'], help='of resizing')
    parser.add_argument('--batch-size', type=number(int, 1), default=64)
    parser.add_argument('--workers', type=number(int, 0), default=2, help='processes that load images')
    parser.add_argument('--amp', default='off', choices=['off', 'bf16', 'fp16'], help='autocast of the forward pass')
    parser.add_argument('--form', default='trained', choices=FORMS,
                        help='of the network: as trained, fused for inference, or as exported to phones')
    parser.add_argument('--device', default='auto', help='cpu, cuda, mps or auto')
    parser.add_argument('--expect', type=number(int, 1), metavar='N', help='fail unless N images are counted')
    parser.add_argument('--per-class', default='', metavar='FILE.csv', help='write the accuracy of each class')
    parser.add_argument('--confusion', dest='worst', type=number(int, 1), default=0, metavar='N',
                        help='list the N worst classes with what they are taken for')
    parser.add_argument('--real-labels', nargs='?', const='', metavar='FILE',
                        help="score by the ImageNet-ReaL labels as well, timm's or those of a file")
    parser.add_argument('--json', action='store_true', help='print one JSON object instead of text')
    silent = io.StringIO()
    quiet = not find_processes().is_primary
    with redirect_stdout(silent if quiet else sys.stdout), redirect_stderr(silent if quiet else sys.stderr):
        return parser.parse_args()


def main() -> int:
    flags = vars(parse_flags())
    processes = find_processes()
    is_primary = processes.is_primary
    show_messages(is_primary)
    as_json = flags.pop('json')
    try:
        flags['device'] = resolve_device(flags['device'], processes.local_rank)
        result = evaluate_checkpoint(**flags, progress_stream=sys.stderr if as_json else None)
    except (ConfigError, DataError, CheckpointError) as error:
        if is_primary:
            print(f'validate.py: {error}', file=sys.stderr)
        return 2
    if is_primary:
        print(json.dumps(result, indent=2) if as_json else '\n'.join(describe_result(result)))
    return 0


if __name__ == '__main__':
    sys.exit(main())
