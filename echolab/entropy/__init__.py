"""Entropies of a policy: the output head, and who feeds it. Its modules need torch; nothing imports them unasked."""
