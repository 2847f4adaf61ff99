"""A vision transformer on digits: patches, a class token, encoder blocks with multi-head attention, Adam."""

import torch
import torch.nn as nn
import torch.optim as optim
from tests.scripts.data import Digits, Settings
from tests.scripts.script import Script
from torch.utils.data import DataLoader


class PatchExtractor(nn.Module):
    def __init__(self, patch_size=4):
        super().__init__()
        self.patch_size = patch_size

    def forward(self, input_data):
        batch_size, channels, height, width = input_data.size()
        assert height % self.patch_size == 0 and width % self.patch_size == 0
        num_patches = (height // self.patch_size) * (width // self.patch_size)
        patches = (
            input_data.unfold(2, self.patch_size, self.patch_size)
            .unfold(3, self.patch_size, self.patch_size)
            .permute(0, 2, 3, 1, 4, 5)
            .contiguous()
            .view(batch_size, num_patches, -1)
        )
        assert patches.size() == (batch_size, num_patches, channels * self.patch_size**2)
        return patches


class InputEmbedding(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.linear = nn.Linear(args.patch_size**2, args.latent_size)
        self.class_token = nn.Parameter(torch.randn(1, 1, args.latent_size))
        self.pos_embedding = nn.Parameter(torch.randn(1, 1, args.latent_size))
        self.patchify = PatchExtractor(args.patch_size)

    def forward(self, input_data):
        patches = self.patchify(input_data)
        linear_projection = self.linear(patches)
        b, n, _ = linear_projection.shape
        linear_projection = torch.cat((self.class_token.expand(b, -1, -1), linear_projection), dim=1)
        return linear_projection + self.pos_embedding[:, :1, :].repeat(b, n + 1, 1)


class EncoderBlock(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.norm = nn.LayerNorm(args.latent_size)
        self.attention = nn.MultiheadAttention(args.latent_size, args.num_heads, dropout=args.dropout)
        self.enc_MLP = nn.Sequential(
            nn.Linear(args.latent_size, args.latent_size * 2),
            nn.GELU(),
            nn.Dropout(args.dropout),
            nn.Linear(args.latent_size * 2, args.latent_size),
            nn.Dropout(args.dropout),
        )

    def forward(self, emb_patches):
        first_norm = self.norm(emb_patches)
        attention_out = self.attention(first_norm, first_norm, first_norm)[0]
        first_added = attention_out + emb_patches
        second_norm = self.norm(first_added)
        return self.enc_MLP(second_norm) + first_added


class ViT(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.embedding = InputEmbedding(args)
        self.encoders = nn.ModuleList([EncoderBlock(args) for _ in range(args.num_encoders)])
        self.MLP_head = nn.Sequential(nn.LayerNorm(args.latent_size), nn.Linear(args.latent_size, 10))

    def forward(self, x):
        enc_output = self.embedding(x)
        for enc_layer in self.encoders:
            enc_output = enc_layer(enc_output)
        return self.MLP_head(enc_output[:, 0])


def evaluate(model, loader, criterion):
    model.eval()
    correct, total, running_loss = 0, 0, 0.0
    with torch.inference_mode():
        for images, labels in loader:
            outputs = model(images)
            running_loss += criterion(outputs, labels).item()
            _, predicted = torch.max(outputs, 1)
            total += labels.size(0)
            correct += (predicted == labels).sum().item()
    print(f"Validation Loss: {running_loss / len(loader):.4f} | Accuracy: {100 * correct / total:.2f}%")


def main(args):
    model = ViT(args).to("cpu")
    criterion = nn.CrossEntropyLoss()
    # was: optimizer = optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-6)
    optimizer = optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    train_loader = DataLoader(args.train_set, batch_size=8, shuffle=True, drop_last=True)
    val_loader = DataLoader(args.val_set, batch_size=8)
    for epoch in range(args.epochs):
        model.train()
        epoch_loss = 0.0
        for images, labels in train_loader:
            optimizer.zero_grad(set_to_none=True)
            outputs = model(images)
            loss = criterion(outputs, labels)
            loss.backward()
            optimizer.step()
            epoch_loss += loss.item()
        print(f"Epoch [{epoch + 1}/{args.epochs}], Loss: {epoch_loss / len(train_loader):.4f}")
        evaluate(model, val_loader, criterion)
    model.eval()
    return sum(criterion(model(images), labels) for images, labels in val_loader) / len(val_loader)


def make():
    decay = torch.tensor(0.1, requires_grad=True)
    sizes = {"patch_size": 4, "latent_size": 8, "num_heads": 2, "num_encoders": 2, "dropout": 0.1}
    sets = {"train_set": Digits(20), "val_set": Digits(16)}
    return {"args": Settings(lr=0.01, weight_decay=decay, epochs=2, **sizes, **sets)}


SCRIPT = Script("vision_transformer", main, make, lambda a: {"weight_decay": a["args"].weight_decay}, slow=True)
