"""Training scripts in the forms that people write them, and the referee that judges what mlc makes of them."""
