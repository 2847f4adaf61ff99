"""From a flat recording to loops: liveness, folding of equal iterations, quotients of optimizer steps."""
