"""Evaluate a checkpoint: python validate.py CHECKPOINT [DATA] [flags].

Prints top-1, top-5, loss, images and images/s of a classifier, average precision (COCO) of a detector, the mean IoU of
a segmenter.
"""
import sys
from collections.abc import Sequence
from typing import Any

import caretrans  # noqa: F401 (registers the models)
from caretrans.checkpoint import is_dense, read_checkpoint
from caretrans.devices import resolve_device
from caretrans.distributed import find_processes, is_primary, shared_errors
from caretrans.errors import ConfigError, run_command
from caretrans.evaluation import EvalConfig, describe_result, evaluate_checkpoint
from caretrans.flags import (
    DEVICE_HELP, FlagParser, add_checkpoint_flags, add_weights_flags, check_weights, keep_flags, number)
from caretrans.fuse import FORMS
from caretrans.progress import show_messages
from caretrans.strict_json import to_json


def build_parser() -> FlagParser:
    parser = FlagParser(description=__doc__)
    parser.add_argument(
        'checkpoint_and_data', nargs='*', metavar='CHECKPOINT DATA', help='same as --checkpoint, unless it is given or '
        '--pretrained; folder with val/CLASS/* (default: that of the training)')
    parser.add_argument('--dataset', default='', help="data set of timm's factory instead of folders")
    parser.add_argument('--split', default='', help='split to evaluate (default: that of the training, else val)')
    add_weights_flags(parser)
    add_checkpoint_flags(parser)
    parser.add_argument('--batch-size', type=number(int, 1), default=64, help='images per batch (default: 64)')
    parser.add_argument('--workers', type=number(int, 0), default=2, help='image loading processes (default: 2)')
    parser.add_argument('--amp', default='off', choices=['off', 'bf16', 'fp16'], help='autocast of the forward pass')
    parser.add_argument('--form', default='trained', choices=FORMS,
                        help='network to run: the original, fused for inference, or as exported to phones')
    parser.add_argument('--device', default='auto', help=DEVICE_HELP)
    parser.add_argument('--expect', type=number(int, 1), metavar='N', help='fail unless N images are counted')
    parser.add_argument('--per-class', default='', metavar='FILE.csv', help='write the accuracy of each class')
    parser.add_argument('--confusion', dest='worst', type=number(int, 1), default=0, metavar='N',
                        help='list the N worst classes and what they are mistaken for')
    parser.add_argument('--real-labels', nargs='?', const='', metavar='FILE',
                        help="also score by the ImageNet-ReaL labels, timm's or those of a file")
    parser.add_argument('--json', action='store_true', help='print one JSON object instead of text')
    return parser


def parse_flags(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The flags of a command line, with the arguments without a flag as `checkpoint` and `data`.

    Raises:
        ConfigError: They cannot work, or no weights are named.
    """
    flags = vars(build_parser().parse_intermixed_args(argv))
    rest = flags.pop('checkpoint_and_data')
    if rest and not flags['checkpoint'] and not flags['pretrained']:
        flags['checkpoint'] = rest.pop(0)
    if len(rest) > 1:
        raise ConfigError(f'{" ".join(rest)}: name one folder of data.')
    flags['data'] = rest[0] if rest else ''
    check_weights(flags['checkpoint'], flags['pretrained'], flags['model_name'], flags['entry'])
    return flags


def run() -> int:
    processes = find_processes()
    show_messages(processes.is_primary)
    with shared_errors():  # all processes have the same command line
        flags = parse_flags()
        as_json = flags.pop('json')
        stream = sys.stderr if as_json else None
        dense = flags['checkpoint'] and is_dense(read_checkpoint(flags['checkpoint'], flags['entry']))
        if dense:
            parser = build_parser()
            flags = keep_flags(flags, ('checkpoint', 'data', 'split', 'entry', 'device', 'amp'),
                               'a detector or segmenter', {name: parser.get_default(name) for name in flags})
            if 'data' not in flags:
                raise ConfigError('Name a folder of data with annotations after the checkpoint.')
    flags['device'] = resolve_device(flags['device'], processes.local_rank)
    if dense:
        from caretrans.dense.evaluate import describe_scores, evaluate_dense
        result, describe = evaluate_dense(**flags, progress_stream=stream), describe_scores
    else:
        result, describe = evaluate_checkpoint(EvalConfig(**flags), stream), describe_result
    if processes.is_primary:
        print(to_json(result.to_dict(), indent=2) if as_json else '\n'.join(describe(result)))
    return 0


def main() -> int:
    return run_command('validate.py', run, is_primary())


if __name__ == '__main__':
    sys.exit(main())
