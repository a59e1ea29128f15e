"""What the library's training costs beside a plain PyTorch loop: ResNet-18, batches of 128, in one run.

    python tests/bench/training.py                # on the GPU if there is one
    python tests/bench/training.py --epochs 5 --size 64

Both sides train the same network from the same weights on the same images (the textures, in memory, not augmented), with AdamW and a
one-cycle schedule, and validate after each epoch. The epochs take turns, so that a machine that slows down slows both. Each ratio is
between neighbours; the median and the range are printed, first for the training alone, then with what `imgcls run` adds to it: the log,
the progress, and a checkpoint after every epoch.
"""
import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

from imgcls_nb.data import textures
from imgcls_nb.models import create_model
from imgcls_nb.train import Checkpoint, EpochLog, ReportProgress, image_learner, train

warnings.filterwarnings('ignore')
BATCH = 128


class PlainLoop:
    "The loop that everyone writes, over images in memory."
    def __init__(self, dls, classes: int, device):
        self.device, parts = device, [dls[i].dataset for i in range(2)]
        (self.x, self.x_valid), p = [torch.from_numpy(part.pixels).permute(0, 3, 1, 2) for part in parts], parts[0].preprocessing
        self.y, self.y_valid = [torch.as_tensor(part.labels) for part in parts]
        self.mean, self.std = [torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (p.mean, p.std)]
        self.model = create_model('resnet18', classes, p.channels, (p.height, p.width)).to(device)

    def batch(self, x, y, rows):
        return (x[rows].to(self.device).float() / 255 - self.mean) / self.std, y[rows].to(self.device)

    def epoch(self) -> None:
        steps = len(self.x) // BATCH
        optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
        self.model.train()
        for rows in torch.randperm(len(self.x))[:steps * BATCH].split(BATCH):
            x, y = self.batch(self.x, self.y, rows)
            F.cross_entropy(self.model(x), y).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        self.model.eval()
        right = 0
        with torch.no_grad():
            for rows in torch.arange(len(self.x_valid)).split(BATCH):
                x, y = self.batch(self.x_valid, self.y_valid, rows)
                right += (self.model(x).argmax(1) == y).sum().item()


def seconds(work) -> float:
    "How long a call takes, the GPU's work included."
    start = time.perf_counter()
    work()
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--epochs', type=int, default=5, help='pairs of epochs that are measured')
    parser.add_argument('--size', type=int, default=64, help='pixels a side')
    args = parser.parse_args()
    learn = image_learner(textures(), 'resnet18', pretrained=False, size=args.size, batch_size=BATCH, augment='none')
    plain = PlainLoop(learn.dls, len(learn.dls.vocab), learn.dls.device)
    plain.model.load_state_dict(learn.model.state_dict())
    files = tempfile.TemporaryDirectory()
    folder = Path(files.name)

    def library(callbacks=()):
        with learn.no_bar(), learn.no_logging(): train(learn, 1, 1e-3, callbacks)

    def with_all(): library((EpochLog(folder/'log.csv'), ReportProgress(lambda *_: None), Checkpoint(folder/'checkpoint')))

    plain.epoch(), library()  # to warm up
    print(f'ResNet-18, {args.size} px, batches of {BATCH}, {len(plain.x) // BATCH} steps an epoch, on {learn.dls.device}, '
          f'{torch.get_num_threads()} threads')
    for name, work in (('training alone', library), ('with log, progress and checkpoint', with_all)):
        pairs = [(seconds(plain.epoch), seconds(work)) for _ in range(args.epochs)]
        ratios = [own / other for other, own in pairs]
        print(f'{name}: plain loop {statistics.median(p for p, _ in pairs):.2f} s an epoch, library '
              f'{statistics.median(o for _, o in pairs):.2f} s, ratio {statistics.median(ratios):.3f} '
              f'({min(ratios):.3f} to {max(ratios):.3f})', flush=True)
    files.cleanup()


if __name__ == '__main__': main()
