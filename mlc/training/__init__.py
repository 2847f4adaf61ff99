"""The declarative front door: problems instead of loops.

    inner = mlc.Level("inner", model, lambda p: torch.optim.SGD(p, lr=0.1), inner_loss, loader, steps=5)
    outer = mlc.Level("outer", weigh, torch.optim.Adam(weigh.parameters()), outer_loss, val_loader)
    mlc.Training([inner, outer]).run(1000)

Each level says what it trains, by which loss, on which data; what reads what is found, and the loop that the levels
stand for is written, compiled and run like a loop of yours.
"""

from mlc.training.engine import Training
from mlc.training.events import EarlyStopping, Event
from mlc.training.game import Alternating, Simultaneous
from mlc.training.level import Level
from mlc.training.loggers import CSV, Logger, Stdout, TensorBoard
from mlc.training.state.archive import load_checkpoint

__all__ = [
    "CSV",
    "Alternating",
    "EarlyStopping",
    "Event",
    "Level",
    "Logger",
    "Simultaneous",
    "Stdout",
    "TensorBoard",
    "Training",
    "load_checkpoint",
]
