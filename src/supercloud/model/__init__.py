"""The vocabulary of the whole system; imports nothing of ours."""
