"""What at least two papers need in numerically identical form."""
