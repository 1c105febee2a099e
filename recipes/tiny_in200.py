"""Train an image model on Tiny-ImageNet-200 and publish its weights, on two CPU cores or one GPU.

    pip install timm-softpool[train]
    python recipes/tiny_in200.py --data tiny-imagenet --model resnet18_softpool --output runs/resnet18_softpool

Everything but the reading of parquet files is timm's: augmentation, loader, loss, optimiser, schedule. The image
size grows during training, which is cheaper than one size throughout; validation uses the full 64 pixels. A killed
run continues from its last whole epoch when the same command is given again, with the same result. At the end it
writes the weights in float16, named by their hash, and prints their entry for weights/manifest.toml.
"""
from __future__ import annotations

import argparse
import io
import json
import os
import random
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import timm
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy
from torch.utils.data import Dataset
from tqdm import tqdm

import timm_softpool  # noqa: F401  (registers the models)
from timm_softpool.pretrained import file_hash, write_safetensors

TAG = 'tiny_in200'
NUM_CLASSES = 200
EVAL_SIZE = 64


class ParquetImages(Dataset):
    """Images and labels of parquet shards with the columns ``image`` (``{bytes, path}``) and ``label``."""

    transform = None

    def __init__(self, *shards: Path) -> None:
        tables = [pq.read_table(shard) for shard in shards]
        self.images = [image['bytes'] for table in tables for image in table['image'].to_pylist()]
        self.labels = [label for table in tables for label in table['label'].to_pylist()]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        image = Image.open(io.BytesIO(self.images[index])).convert('RGB')
        return self.transform(image), self.labels[index]


def image_size(epoch: int, epochs: int, sizes: list[int]) -> int:
    """Each of ``sizes`` in turn for an equal share of the epochs."""
    return sizes[epoch * len(sizes) // epochs]


def loader(dataset: Dataset, size: int, args: argparse.Namespace, is_training: bool):
    return create_loader(
        dataset, input_size=(3, size, size), batch_size=args.batch_size, is_training=is_training,
        use_prefetcher=False, scale=(0.35, 1.0), color_jitter=None, interpolation='bicubic', crop_pct=1.0,
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, num_workers=args.workers, persistent_workers=False)


def forward(model: torch.nn.Module, images: torch.Tensor, device: torch.device, amp: bool = True) -> torch.Tensor:
    images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        return model(images).float()


@torch.inference_mode()
def validate(model: torch.nn.Module, dataset: Dataset, size: int, args: argparse.Namespace,
             device: torch.device, amp: bool = True) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent."""
    model.eval()
    top1, top5 = AverageMeter(), AverageMeter()
    for images, labels in loader(dataset, size, args, is_training=False):
        correct = accuracy(forward(model, images, device, amp).cpu(), labels, topk=(1, 5))
        top1.update(correct[0].item(), len(labels))
        top5.update(correct[1].item(), len(labels))
    return {'top1': round(top1.avg, 2), 'top5': round(top5.avg, 2)}


def save(checkpoint: dict, path: Path) -> None:
    temporary = path.with_suffix('.tmp')
    torch.save(checkpoint, temporary)
    os.replace(temporary, path)


def publish(model: torch.nn.Module, val: Dataset, args: argparse.Namespace, device: torch.device) -> None:
    """Write the weights in float16, and print their manifest entry with the accuracy that is left after rounding."""
    weights = {name: value.half() if value.is_floating_point() else value
               for name, value in model.state_dict().items()}
    path = args.output / f'{args.model}-{TAG}.safetensors'
    write_safetensors(weights, path)
    digest = file_hash(path)
    path = path.rename(path.with_stem(f'{path.stem}-{digest[:8]}'))
    model.load_state_dict(weights)
    metrics = validate(model, val, EVAL_SIZE, args, device, amp=False)
    options = ' '.join(f'--{key.replace("_", "-")} {" ".join(map(str, value)) if isinstance(value, list) else value}'
                       for key, value in vars(args).items()
                       if key not in ('data', 'output', 'workers', 'device') and value is not None)
    print(f"""
[models.{args.model}.{TAG}]
file = "{path.name}"
sha256 = "{digest}"
data = "{TAG}"
recipe = "python recipes/tiny_in200.py --data {args.data.name} --output {args.output.name} {options}"
metrics = {{ top1 = {metrics['top1']}, top5 = {metrics['top5']} }}
license = "for non-commercial research, as the ImageNet images it was trained on"
""")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True, help='folder of train-*.parquet and val.parquet')
    parser.add_argument('--model', default='resnet18_softpool')
    parser.add_argument('--output', type=Path, required=True, help='folder of the checkpoint and the log')
    parser.add_argument('--epochs', type=int, default=16)
    parser.add_argument('--sizes', type=int, nargs='+', default=[40, 48, 56], help='image sizes, first to last')
    parser.add_argument('--batch-size', type=int, default=256)
    parser.add_argument('--lr', type=float, default=0.3)
    parser.add_argument('--warmup-epochs', type=int, default=1)
    parser.add_argument('--init', type=Path, help='checkpoint (last.pt) of another run whose weights to start from')
    parser.add_argument('--weight-decay', type=float, default=3e-4)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args()

    shards = sorted(args.data.glob('train-*.parquet'))
    if not shards:
        parser.error(f'--data: there is no train-*.parquet in {args.data}')

    device = torch.device(args.device)
    train = ParquetImages(*shards)
    val = ParquetImages(args.data / 'val.parquet')
    torch.manual_seed(args.seed)
    model = timm.create_model(args.model, num_classes=NUM_CLASSES).to(device, memory_format=torch.channels_last)
    criterion = LabelSmoothingCrossEntropy(0.1)
    optimizer = create_optimizer_v2(model, opt='sgd', lr=args.lr, weight_decay=args.weight_decay, momentum=0.9)
    steps = len(train) // args.batch_size
    if steps < 1 or args.epochs < 1:
        parser.error(f'--epochs must be at least 1 and --batch-size at most {len(train)}, the number of images')
    scheduler, _ = create_scheduler_v2(
        optimizer, 'cosine', num_epochs=args.epochs, warmup_epochs=args.warmup_epochs, warmup_lr=args.lr / 10,
        min_lr=args.lr / 1000, step_on_epochs=False, updates_per_epoch=steps)

    args.output.mkdir(parents=True, exist_ok=True)
    if args.init:
        model.load_state_dict(torch.load(args.init, map_location=device, weights_only=True)['model'])
    last = args.output / 'last.pt'
    first_epoch = 0
    if last.exists():
        checkpoint = torch.load(last, map_location=device, weights_only=True)
        model.load_state_dict(checkpoint['model'])
        optimizer.load_state_dict(checkpoint['optimizer'])
        first_epoch = checkpoint['epoch'] + 1

    for epoch in range(first_epoch, args.epochs):
        for seed in (random.seed, np.random.seed, torch.manual_seed):  # an epoch depends on its number alone
            seed(args.seed + epoch)
        start, losses = time.time(), AverageMeter()
        size = image_size(epoch, args.epochs, args.sizes)
        model.train()
        batches = loader(train, size, args, is_training=True)
        for step, (images, labels) in enumerate(tqdm(batches, f'epoch {epoch}, {size} px', disable=None)):
            scheduler.step_update(epoch * steps + step)
            loss = criterion(forward(model, images, device), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.update(loss.item(), len(labels))
        record = {'epoch': epoch, 'size': size, 'loss': round(losses.avg, 4), 'seconds': round(time.time() - start),
                  **validate(model, val, EVAL_SIZE, args, device)}
        save({'epoch': epoch, 'model': model.state_dict(), 'optimizer': optimizer.state_dict()}, last)
        with open(args.output / 'log.jsonl', 'a') as log:
            print(json.dumps(record), file=log)
        print(json.dumps(record), flush=True)
    publish(model, val, args, device)


if __name__ == '__main__':
    main()
