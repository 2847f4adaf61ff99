"""Libraries that own the loop, or parts of it: accelerate, Lightning's Fabric and Trainer, transformers' Trainer."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from tests.scripts.data import Settings, digits
from tests.scripts.script import Script


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))


def weighted(weights, output, target):
    return (weights[target] * F.cross_entropy(output, target, reduction="none")).mean()


def with_accelerate(args, model, train_set, val):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    loader = torch.utils.data.DataLoader(train_set, batch_size=8, shuffle=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    model.train()
    for epoch in range(args.epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = weighted(args.class_weights, model(x), y)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
        accelerator.print(f"epoch {epoch}: loss {loss.item():.4f}")
    return F.cross_entropy(model(val[0]), val[1])


def with_fabric(args, model, train_set, val):
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1, precision="64-true")
    fabric.launch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(train_set, batch_size=8, shuffle=True))
    model.train()
    for epoch in range(args.epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = weighted(args.class_weights, model(x), y)
            fabric.backward(loss)
            optimizer.step()
        fabric.print(f"epoch {epoch}: loss {loss.item():.4f}")
    return F.cross_entropy(model(val[0]), val[1])


def with_lightning(args, model, train_set, val):
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def training_step(self, batch, batch_idx):
            x, y = batch
            loss = weighted(args.class_weights, self.net(x), y)
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=args.lr)

    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        devices=1,
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(model), torch.utils.data.DataLoader(train_set, batch_size=8, shuffle=True))
    return F.cross_entropy(model(val[0]), val[1])


def with_transformers(args, model, train_set, val):
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    class Weighted(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return weighted(args.class_weights, model(inputs["x"]), inputs["labels"])

    rows = [{"x": x, "labels": y} for x, y in train_set]
    settings = TrainingArguments(
        output_dir="out",
        num_train_epochs=args.epochs,
        learning_rate=args.lr,
        per_device_train_batch_size=8,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = Weighted(model=model, args=settings, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)  # it prints durations
    trainer.train()
    model.eval()
    return F.cross_entropy(model(val[0]), val[1])


def make():
    images, labels = digits(60)
    weights = torch.linspace(0.5, 1.5, 10).requires_grad_()
    return {
        "args": Settings(lr=0.02, epochs=2, class_weights=weights),
        "model": network(),
        "train_set": torch.utils.data.TensorDataset(images[:24], labels[:24]),
        "val": (images[24:], labels[24:]),
    }


def metas(a):
    return {"class_weights": a["args"].class_weights}


SCRIPTS = [
    Script("accelerate", with_accelerate, make, metas, needs=("accelerate",)),
    Script("fabric", with_fabric, make, metas, needs=("lightning_fabric",)),
    Script("lightning_trainer", with_lightning, make, metas, needs=("lightning",)),
    Script("transformers_trainer", with_transformers, make, metas, needs=("transformers", "accelerate")),
]
