"""Every torch.optim optimizer with a derivative, with the flags that users set, by name.

`eps` is moderate throughout: after one step of an Adam-like optimizer the meta-gradient passes almost
only through it.
"""

from typing import Any

import torch.optim as O

EPS = 1e-3

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (O.SGD, {"lr": 0.1}),
    "sgd_momentum": (O.SGD, {"lr": 0.1, "momentum": 0.9}),
    "sgd_dampening": (O.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "sgd_nesterov": (O.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.02}),
    "sgd_decay": (O.SGD, {"lr": 0.1, "weight_decay": 0.05}),
    "sgd_maximize": (O.SGD, {"lr": 0.02, "momentum": 0.5, "maximize": True, "weight_decay": 0.01}),
    "sgd_foreach": (O.SGD, {"lr": 0.1, "momentum": 0.9, "foreach": True}),
    "sgd_loop": (O.SGD, {"lr": 0.1, "momentum": 0.9, "foreach": False}),
    "sgd_fused": (O.SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
    "adam": (O.Adam, {"lr": 0.05, "eps": EPS}),
    "adam_betas": (O.Adam, {"lr": 0.05, "eps": EPS, "betas": (0.5, 0.8), "weight_decay": 0.05}),
    "adam_amsgrad": (O.Adam, {"lr": 0.05, "eps": EPS, "amsgrad": True, "betas": (0.9, 0.5)}),
    "adam_maximize": (O.Adam, {"lr": 0.01, "eps": EPS, "maximize": True}),
    "adam_decoupled": (O.Adam, {"lr": 0.05, "eps": EPS, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "adam_foreach": (O.Adam, {"lr": 0.05, "eps": EPS, "foreach": True}),
    "adam_fused": (O.Adam, {"lr": 0.05, "eps": EPS, "fused": True}),
    "adamw": (O.AdamW, {"lr": 0.05, "eps": EPS, "weight_decay": 0.1}),
    "adamw_amsgrad": (O.AdamW, {"lr": 0.05, "eps": EPS, "amsgrad": True, "betas": (0.8, 0.5)}),
    "adamw_maximize": (O.AdamW, {"lr": 0.01, "eps": EPS, "maximize": True, "weight_decay": 0.1}),
    "adamw_fused": (O.AdamW, {"lr": 0.05, "eps": EPS, "fused": True, "weight_decay": 0.1}),
    "nadam": (O.NAdam, {"lr": 0.05, "eps": EPS}),
    "nadam_decay": (O.NAdam, {"lr": 0.05, "eps": EPS, "weight_decay": 0.05, "momentum_decay": 0.1}),
    "nadam_decoupled": (
        O.NAdam,
        {"lr": 0.05, "eps": EPS, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
    "nadam_maximize": (O.NAdam, {"lr": 0.01, "eps": EPS, "maximize": True}),
    "radam": (O.RAdam, {"lr": 0.05, "eps": EPS, "betas": (0.9, 0.99)}),
    "radam_decay": (O.RAdam, {"lr": 0.05, "eps": EPS, "weight_decay": 0.05, "betas": (0.5, 0.9)}),
    "radam_decoupled": (
        O.RAdam,
        {"lr": 0.05, "eps": EPS, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
    "radam_maximize": (O.RAdam, {"lr": 0.01, "eps": EPS, "maximize": True}),
    "adamax": (O.Adamax, {"lr": 0.05, "eps": EPS}),
    "adamax_decay": (O.Adamax, {"lr": 0.05, "eps": EPS, "weight_decay": 0.05, "betas": (0.8, 0.7)}),
    "adamax_maximize": (O.Adamax, {"lr": 0.01, "eps": EPS, "maximize": True}),
    "adagrad": (O.Adagrad, {"lr": 0.1, "eps": EPS}),
    "adagrad_decay": (
        O.Adagrad,
        {"lr": 0.1, "eps": EPS, "lr_decay": 0.1, "initial_accumulator_value": 0.1, "weight_decay": 0.05},
    ),
    "adagrad_maximize": (O.Adagrad, {"lr": 0.02, "eps": EPS, "maximize": True}),
    "adadelta": (O.Adadelta, {"lr": 1.0, "eps": EPS}),
    "adadelta_decay": (O.Adadelta, {"lr": 0.5, "eps": EPS, "rho": 0.7, "weight_decay": 0.05}),
    "adadelta_maximize": (O.Adadelta, {"lr": 0.2, "eps": EPS, "maximize": True}),
    "asgd": (O.ASGD, {"lr": 0.1, "lambd": 0.05, "alpha": 0.6, "t0": 1}),
    "asgd_decay": (O.ASGD, {"lr": 0.1, "weight_decay": 0.05}),
    "asgd_maximize": (O.ASGD, {"lr": 0.02, "maximize": True}),
    "rmsprop": (O.RMSprop, {"lr": 0.02, "eps": EPS}),
    "rmsprop_momentum": (O.RMSprop, {"lr": 0.02, "eps": EPS, "momentum": 0.9, "weight_decay": 0.05}),
    "rmsprop_centered": (O.RMSprop, {"lr": 0.02, "eps": EPS, "centered": True, "alpha": 0.9}),
    "rmsprop_both": (O.RMSprop, {"lr": 0.02, "eps": EPS, "centered": True, "alpha": 0.9, "momentum": 0.8}),
    "rmsprop_maximize": (O.RMSprop, {"lr": 0.01, "eps": EPS, "maximize": True}),
    "adafactor": (O.Adafactor, {"lr": 0.05}),
    "adafactor_decay": (O.Adafactor, {"lr": 0.05, "weight_decay": 0.1, "d": 1.5, "beta2_decay": -0.6}),
    "adafactor_maximize": (O.Adafactor, {"lr": 0.01, "maximize": True}),
}
