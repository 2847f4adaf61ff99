"""Scripts that mlc does not take yet: name -> how the failure begins.

Strict both ways: a script of this table must fail, and in the way that is written here. When it passes, or fails
otherwise than it did, its line goes or changes. `python -m tests.scripts` prints the table as it stands.
"""

# A model made and moved inside the function: whether the move fails depends on when Python collects garbage, so
# there is no more to the message than this.
MOVED = "call 1: CaptureError: "
BRANCH = "call 1: CaptureError: a branch depends on the value of a tensor"
FLOAT = "call 1: CaptureError: a Python float depends on the value of a tensor"

KNOWN = {
    "mnist": MOVED,
    "mnist_rnn": "call 1: MlcError: an iterable changes from one iteration over it to the next",
    "vae": MOVED,
    "word_language": FLOAT,
    "word_language_cut": FLOAT,
    "word_language_best": FLOAT,
    "siamese": MOVED,
    "super_resolution": MOVED,
    "regression": BRANCH,
    "vision_transformer": MOVED,
    "dcgan": MOVED,
    "gat": BRANCH,
    "gcn": "call 1: NotImplementedError: Cannot access storage of SparseTensorImpl",
    "forward_forward": "call 1 prints 'Loss:  <traced>'",
    "nanogpt": MOVED,
    "mingpt": FLOAT,
    "unrolled_gan": "call 1 prints 'iteration 0: D <traced> G <traced>'",
    "unrolled_gan_backup": "call 1: CaptureError: RuntimeError while tracing: Cannot access data pointer of Tensor",
    "maml": FLOAT,
    "reweight": BRANCH,
    "meta_weight_net": BRANCH,
    "darts": "call 1: CaptureError: a tensor is converted to NumPy while tracing",
    "distill": "call 1: CaptureError: AttributeError while tracing: Can't pickle local object",
    "transformers_loop": "call 1: CaptureError: a Python int depends on the value of a tensor",
    "accelerate": "call 1 prints 'epoch 0: loss <traced>'",
    "fabric": "call 1: CaptureError: backward hooks cannot be traced",
    "lightning_trainer": "call 1: CaptureError: AssertionError while tracing: Mixing fake modes",
    "transformers_trainer": "call 1: CaptureError: a tensor appeared that mlc did not see being made",
}
