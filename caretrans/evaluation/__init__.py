"""Evaluation and prediction."""
from .evaluate import EvalConfig, EvalResult, describe_result, evaluate_checkpoint, load_for_evaluation, open_data
from .predict import find_images, predict_images

__all__ = [
    'EvalConfig', 'EvalResult', 'describe_result', 'evaluate_checkpoint', 'find_images', 'load_for_evaluation',
    'open_data', 'predict_images']
