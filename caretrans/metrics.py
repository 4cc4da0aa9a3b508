import time
import torch
from timm.task import ClassificationEvaluator
from .distributed import Processes
from .engine import autocast

@torch.inference_mode()
def evaluate(model, loader, device, amp='off', report=lambda images: None, processes=Processes(), num_classes=None):  # noqa
    model.eval()
    evaluator = ClassificationEvaluator(device=device)
    start = time.perf_counter()
    for x, target in loader.run():
        with autocast(device, amp):
            logits = model(x)
        evaluator.update(logits, target)
        report(evaluator.num_samples)
    result = {key: float(value) for key, value in evaluator.compute(distributed=not processes.is_alone).items()}
    seconds = time.perf_counter() - start
    return dict(result, images=evaluator.num_samples, seconds=seconds, images_per_s=evaluator.num_samples / seconds)
