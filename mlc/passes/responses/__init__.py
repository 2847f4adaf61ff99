"""Responses: how the derivative of what a level trained is obtained, one small file each."""
