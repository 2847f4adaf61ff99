"""The loop of Hugging Face's course: dict batches, `model(**batch).loss`, a scheduler, a progress bar, a metric."""

import torch
from tests.scripts.data import Settings, zen
from tests.scripts.script import Script
from torch.utils.data import DataLoader, Dataset


class Sentences(Dataset):
    """Lines of a text as a tokenizer would give them: is the line longer than the median?"""

    def __init__(self, lines, vocabulary, length=10):
        self.rows = []
        for line in lines:
            ids = [1, *(vocabulary[w] for w in line.lower().split())][:length]
            pad = length - len(ids)
            self.rows.append(
                {
                    "input_ids": torch.tensor(ids + [0] * pad),
                    "attention_mask": torch.tensor([1] * len(ids) + [0] * pad),
                    "labels": torch.tensor(int(len(line) > 42)),
                }
            )

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


class Accuracy:
    """A metric that collects batches, as `evaluate`'s do."""

    def __init__(self):
        self.right = self.count = 0

    def add_batch(self, predictions, references):
        self.right += int((predictions == references).sum())
        self.count += len(references)

    def compute(self):
        return {"accuracy": self.right / self.count}


def bert(vocabulary):
    from transformers import BertConfig, BertForSequenceClassification

    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    return BertForSequenceClassification(
        BertConfig(vocab_size=len(vocabulary) + 2, max_position_embeddings=16, num_labels=2, **size)
    )


def main(args, model, train_dataset, eval_dataset):
    from torch.optim import AdamW
    from tqdm.auto import tqdm
    from transformers import get_scheduler

    train_dataloader = DataLoader(train_dataset, shuffle=True, batch_size=4)
    eval_dataloader = DataLoader(eval_dataset, batch_size=4)
    # was: optimizer = AdamW(model.parameters(), lr=1e-2)
    optimizer = AdamW(model.parameters(), lr=1e-2, weight_decay=args.weight_decay)
    num_epochs = 2
    num_training_steps = num_epochs * len(train_dataloader)
    lr_scheduler = get_scheduler(
        "linear", optimizer=optimizer, num_warmup_steps=1, num_training_steps=num_training_steps
    )
    device = torch.device("cuda") if torch.cuda.is_available() and args.cuda else torch.device("cpu")
    model.to(device)

    progress_bar = tqdm(range(num_training_steps))
    for epoch in range(num_epochs):
        model.train()
        for batch in train_dataloader:
            batch = {k: v.to(device) for k, v in batch.items()}
            outputs = model(**batch)
            loss = outputs.loss
            loss.backward()
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            progress_bar.set_postfix(loss=loss.item())
            progress_bar.update(1)

        metric = Accuracy()
        model.eval()
        for batch in eval_dataloader:
            batch = {k: v.to(device) for k, v in batch.items()}
            with torch.no_grad():
                outputs = model(**batch)
            predictions = torch.argmax(outputs.logits, dim=-1)
            metric.add_batch(predictions=predictions, references=batch["labels"])
        print(epoch, metric.compute())

    model.eval()
    return sum(model(**batch).loss for batch in eval_dataloader) / len(eval_dataloader)


def make():
    lines = [line for line in zen().split("\n") if len(line.split()) > 3][:18]
    words = sorted({w for line in lines for w in line.lower().split()})
    vocabulary = {w: i + 2 for i, w in enumerate(words)}
    decay = torch.tensor(0.1, requires_grad=True)
    return {
        "args": Settings(weight_decay=decay, cuda=False),
        "model": bert(vocabulary),
        "train_dataset": Sentences(lines[:10], vocabulary),
        "eval_dataset": Sentences(lines[10:], vocabulary),
    }


SCRIPT = Script(
    "transformers_loop",
    main,
    make,
    lambda a: {"weight_decay": a["args"].weight_decay},
    slow=True,
    needs=("transformers", "tqdm"),
)
