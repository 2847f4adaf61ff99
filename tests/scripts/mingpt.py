"""A trainer class: callbacks by event, a loader's iterator started again when it ends, all kept in attributes."""

from collections import defaultdict

import torch
from tests.scripts.data import Settings, characters
from tests.scripts.gpt import GPT
from tests.scripts.script import Script
from torch.utils.data import Dataset
from torch.utils.data.dataloader import DataLoader


class CharDataset(Dataset):
    def __init__(self, data, block_size):
        self.data, self.block_size = data, block_size

    def __len__(self):
        return len(self.data) - self.block_size

    def __getitem__(self, idx):
        chunk = [int(c) for c in self.data[idx : idx + self.block_size + 1]]
        return torch.tensor(chunk[:-1], dtype=torch.long), torch.tensor(chunk[1:], dtype=torch.long)


class Trainer:
    def __init__(self, config, model, train_dataset):
        self.config = config
        self.model = model
        self.optimizer = None
        self.train_dataset = train_dataset
        self.callbacks = defaultdict(list)
        self.device = "cpu"
        self.model = self.model.to(self.device)
        self.iter_num = 0

    def add_callback(self, onevent, callback):
        self.callbacks[onevent].append(callback)

    def trigger_callbacks(self, onevent):
        for callback in self.callbacks.get(onevent, []):
            callback(self)

    def run(self):
        model, config = self.model, self.config
        # was: self.optimizer = model.configure_optimizers(0.1, config.learning_rate, config.betas)
        self.optimizer = model.configure_optimizers(config.weight_decay, config.learning_rate, config.betas)
        train_loader = DataLoader(
            self.train_dataset,
            sampler=torch.utils.data.RandomSampler(
                self.train_dataset, replacement=True, num_samples=config.num_samples
            ),
            shuffle=False,
            pin_memory=False,
            batch_size=config.batch_size,
            num_workers=0,
        )
        model.train()
        self.iter_num = 0
        data_iter = iter(train_loader)
        while True:
            try:
                batch = next(data_iter)
            except StopIteration:
                data_iter = iter(train_loader)
                batch = next(data_iter)
            batch = [t.to(self.device) for t in batch]
            x, y = batch
            logits, self.loss = model(x, y)
            model.zero_grad(set_to_none=True)
            self.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_norm_clip)
            self.optimizer.step()
            self.trigger_callbacks("on_batch_end")
            self.iter_num += 1
            if config.max_iters is not None and self.iter_num >= config.max_iters:
                break


def main(trainer, val):
    def batch_end_callback(trainer):
        if trainer.iter_num % 2 == 0:
            print(f"iter {trainer.iter_num}: train loss {trainer.loss.item():.5f}")
        if trainer.iter_num % 4 == 3:
            trainer.model.eval()
            with torch.no_grad():
                _, loss = trainer.model(*val)
            print("saving model, validation loss", round(float(loss), 5))
            torch.save(trainer.model.state_dict(), "model.pt")
            trainer.model.train()

    trainer.add_callback("on_batch_end", batch_end_callback)
    trainer.run()
    trainer.model.eval()
    return trainer.model(*val)[1]


def make():
    text, number = characters()
    train, test = CharDataset(text[:300], 8), CharDataset(text[300:], 8)
    model = GPT(len(number), block_size=8, fused=False)
    decay = torch.tensor(0.1, requires_grad=True)
    config = Settings(
        num_samples=9,
        batch_size=3,
        max_iters=5,
        learning_rate=0.02,
        betas=(0.9, 0.95),
        grad_norm_clip=1.0,
        weight_decay=decay,
    )
    val = [torch.stack(t) for t in zip(*(test[i] for i in (0, 17, 43, 91)), strict=True)]
    return {"trainer": Trainer(config, model, train), "val": val}


SCRIPT = Script("mingpt", main, make, lambda a: {"weight_decay": a["trainer"].config.weight_decay})
