"""A language model's training loop in one file, with batches sliced from a memory-mapped array at random places.

A warm-up and cosine schedule written into the parameter groups, micro-steps, an idle gradient scaler, checkpoints of
the best.
"""

import math
import os
import time
from contextlib import nullcontext

import numpy as np
import torch
from tests.scripts.data import Settings, characters
from tests.scripts.gpt import GPT
from tests.scripts.script import Script


def main(cfg):
    torch.manual_seed(cfg.seed)
    os.makedirs(cfg.out_dir, exist_ok=True)
    device_type = "cuda" if "cuda" in cfg.device else "cpu"
    ctx = nullcontext() if device_type == "cpu" else torch.amp.autocast(device_type=device_type, dtype=torch.bfloat16)

    def get_batch(split):
        # opened anew at every batch, against a leak
        if split == "train":
            data = np.memmap("train.bin", dtype=np.uint16, mode="r")
        else:
            data = np.memmap("val.bin", dtype=np.uint16, mode="r")
        ix = torch.randint(len(data) - cfg.block_size, (cfg.batch_size,))
        x = torch.stack([torch.from_numpy((data[i : i + cfg.block_size]).astype(np.int64)) for i in ix])
        y = torch.stack([torch.from_numpy((data[i + 1 : i + 1 + cfg.block_size]).astype(np.int64)) for i in ix])
        if device_type == "cuda":
            x, y = x.pin_memory().to(cfg.device, non_blocking=True), y.pin_memory().to(cfg.device, non_blocking=True)
        else:
            x, y = x.to(cfg.device), y.to(cfg.device)
        return x, y

    iter_num = 0
    best_val_loss = 1e9
    model_args = {"vocab_size": cfg.vocab_size, "block_size": cfg.block_size, "dropout": cfg.dropout}
    model = GPT(**model_args)
    model.to(cfg.device)
    scaler = torch.amp.GradScaler(device_type, enabled=(cfg.dtype == "float16"))
    # was: optimizer = model.configure_optimizers(0.1, cfg.learning_rate, (cfg.beta1, cfg.beta2))
    optimizer = model.configure_optimizers(cfg.weight_decay, cfg.learning_rate, (cfg.beta1, cfg.beta2))

    @torch.no_grad()
    def estimate_loss():
        out = {}
        model.eval()
        for split in ["train", "val"]:
            losses = torch.zeros(cfg.eval_iters)
            for k in range(cfg.eval_iters):
                X, Y = get_batch(split)
                with ctx:
                    logits, loss = model(X, Y)
                losses[k] = loss.item()
            out[split] = losses.mean()
        model.train()
        return out

    def get_lr(it):
        if it < cfg.warmup_iters:
            return cfg.learning_rate * (it + 1) / (cfg.warmup_iters + 1)
        if it > cfg.lr_decay_iters:
            return cfg.min_lr
        decay_ratio = (it - cfg.warmup_iters) / (cfg.lr_decay_iters - cfg.warmup_iters)
        assert 0 <= decay_ratio <= 1
        coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))
        return cfg.min_lr + coeff * (cfg.learning_rate - cfg.min_lr)

    X, Y = get_batch("train")
    t0 = time.time()
    local_iter_num = 0
    while True:
        lr = get_lr(iter_num) if cfg.decay_lr else cfg.learning_rate
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr

        if iter_num % cfg.eval_interval == 0:
            losses = estimate_loss()
            print(f"step {iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
            if losses["val"] < best_val_loss or cfg.always_save_checkpoint:
                best_val_loss = losses["val"]
                if iter_num > 0:
                    checkpoint = {
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "model_args": model_args,
                        "iter_num": iter_num,
                        "best_val_loss": best_val_loss,
                    }
                    print(f"saving checkpoint to {cfg.out_dir}")
                    torch.save(checkpoint, os.path.join(cfg.out_dir, "ckpt.pt"))

        for _ in range(cfg.gradient_accumulation_steps):
            with ctx:
                logits, loss = model(X, Y)
                loss = loss / cfg.gradient_accumulation_steps
            X, Y = get_batch("train")
            scaler.scale(loss).backward()
        if cfg.grad_clip != 0.0:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        t1 = time.time()
        dt = t1 - t0
        t0 = t1
        if iter_num % cfg.log_interval == 0:
            lossf = loss.item() * cfg.gradient_accumulation_steps
            print(f"iter {iter_num}: loss {lossf:.4f}, time {dt * 1000:.2f}ms")
        iter_num += 1
        local_iter_num += 1
        if iter_num > cfg.max_iters:
            break

    model.eval()
    X, Y = get_batch("val")
    return model(X, Y)[1]


def make():
    text, number = characters()
    text[:400].tofile("train.bin")
    text[400:].tofile("val.bin")
    decay = torch.tensor(0.1, requires_grad=True)
    size = {
        "vocab_size": len(number),
        "block_size": 8,
        "batch_size": 3,
        "dropout": 0.1,
        "device": "cpu",
        "dtype": "bfloat16",
    }
    rates = {"learning_rate": 0.02, "min_lr": 0.002, "warmup_iters": 2, "lr_decay_iters": 4, "decay_lr": True}
    steps = {"max_iters": 4, "eval_interval": 2, "eval_iters": 2, "log_interval": 1, "gradient_accumulation_steps": 2}
    more = {
        "beta1": 0.9,
        "beta2": 0.95,
        "grad_clip": 1.0,
        "always_save_checkpoint": False,
        "out_dir": "out",
        "seed": 1337,
    }
    return {"cfg": Settings(weight_decay=decay, **size, **rates, **steps, **more)}


SCRIPT = Script("nanogpt", main, make, lambda a: {"weight_decay": a["cfg"].weight_decay}, slow=True)
