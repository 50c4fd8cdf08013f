"""A training function of one's own: a small regression under DistributedDataParallel."""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from train_fn.custom import TrialContext

WIDTH = 64


def train(context: TrialContext) -> tuple[float, float]:
    """Fit the sum of a vector's elements; the same optimizer step for every split of the global batch."""
    per_device = context.params.per_device_train_batch_size
    accumulation = context.params.gradient_accumulation_steps
    inputs = torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(context.seed))
    inputs, targets = inputs.to(context.device), inputs.sum(1, keepdim=True).to(context.device)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1)).to(context.device)
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=context.optimizer.learning_rate)
    scaler = torch.amp.GradScaler(context.device.type, enabled=context.params.precision == "fp16")

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        with context.autocast():
            return nn.functional.mse_loss(ddp(inputs[rows]).float(), targets[rows])

    for step in range(context.steps):
        batch = torch.arange(context.global_batch_size) + step * context.global_batch_size
        mine = batch[context.rank :: context.world_size] % 192
        total = 0.0
        for index, rows in enumerate(mine.split(per_device)):
            last = index == accumulation - 1
            with contextlib.nullcontext() if last else ddp.no_sync():
                loss = loss_of(rows) / accumulation
                scaler.scale(loss).backward()
            total += loss.item()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        context.report_step(num_samples=len(mine), loss=total)

    with torch.no_grad():
        held_out = torch.arange(192, 256)[context.rank :: context.world_size]
        return float(loss_of(held_out)) * len(held_out), len(held_out)
