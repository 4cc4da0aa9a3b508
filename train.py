"""Train a model of caretrans or timm: python train.py DATA --recipe NAME [flags]. See --help and caretrans/recipes."""
import shlex
import sys

import caretrans  # noqa: F401 (registers the models)
from caretrans.checkpoint import CheckpointError
from caretrans.config import ConfigError, parse_train_config
from caretrans.data import DataError
from caretrans.engine import TrainingError
from caretrans.progress import show_messages
from caretrans.training import train


def main() -> int:
    show_messages()
    try:
        config = parse_train_config(description=__doc__)
        result = train(config)
    except (ConfigError, DataError, CheckpointError, TrainingError) as error:
        print(f'train.py: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('train.py: stopped; the checkpoints so far are in the run folder', file=sys.stderr)
        return 130
    best = result.best
    print(f'best top-1 {best["val_top1"]:.1f} % after epoch {best["epoch"]}, last {result.last["val_top1"]:.1f} %')
    print(f'curves: {result.folder / "curves.png"}   table: {result.folder / "summary.csv"}')
    print(f'next: bash cmd/eval.sh {shlex.quote(str(result.folder / "best.pth.tar"))}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
