"""Scripts that mlc does not take yet: name -> how the failure begins.

Strict both ways: a script of this table must fail, and in the way that is written here. When it passes, or fails
otherwise than it did, its line goes or changes. `python -m tests.scripts` prints the table as it stands.
"""

KNOWN = {
    "word_language_best": "call 1: CaptureError: meta-parameter word_weights has no path to the result",
    "accelerate": "call 1 prints 'epoch 0: loss <traced>'",
    "lightning_trainer": "call 1: CaptureError: AssertionError while tracing: Mixing fake modes",
    "transformers_trainer": "call 1: CaptureError: a tensor appeared that mlc did not see being made",
}
