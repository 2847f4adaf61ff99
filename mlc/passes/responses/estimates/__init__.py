"""Responses that are estimated: from random directions, from perturbed runs, from two first-order runs."""
